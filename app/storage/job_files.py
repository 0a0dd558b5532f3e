"""The files of the jobs, a folder each, and which of them may be seen.

    DATA/jobs.sqlite3                  the store
    DATA/jobs/ID/params.json           what was asked for, as it is used
                 log.txt               what happened
                 ...                   what its task makes; those named in `PUBLIC_FILES` can be fetched

Nothing that a client sends becomes a part of a path, except an id that the store knows.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock

from app.storage.jobs import Job, JobKind, is_id
from app.storage.store import JobStore
from odvae.utils import locks
from odvae.utils.errors import UserError
from odvae.utils.files import remove_temporaries, write_json

PUBLIC_FILES = {  # the files of a job's folder that can be fetched, and their types
    "final.mp4": "video/mp4",  # the video, whole or as far as it came
    "poster.webp": "image/webp",
    "preview.webp": "image/webp",  # of latents, while they are sampled
    "final.safetensors": "application/octet-stream",  # its latents
    "original.mp4": "video/mp4",  # of `compress`
    "reconstruction.mp4": "video/mp4",
    "latents.safetensors": "application/octet-stream",
    "frames.webp": "image/webp",  # original and reconstruction, frame beside frame
    "sheet.webp": "image/webp",  # a contact sheet
    "drift.webp": "image/webp",
    "report.json": "application/json",
    "log.txt": "text/plain; charset=utf-8",
}


class JobFiles:
    """Jobs and their files below `folder`."""

    def __init__(self, folder: Path):
        self.root = folder
        self.jobs = folder / "jobs"
        try:
            self.jobs.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"{folder} cannot be used ({error.strerror}). Choose another --data-dir.") from error
        self.store = JobStore(folder / "jobs.sqlite3")

    def folder(self, job: Job) -> Path:
        return self.jobs / job.id

    def begin(self, job: Job) -> Path:
        """Make the job's folder, where it is missing, with its settings; remove what a kill left half written."""
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        write_json(folder / "params.json", {"kind": job.kind, "title": job.title, **job.params})
        return folder

    def public_file(self, job: Job, name: str) -> tuple[Path, str] | None:
        """A file that may be fetched and its type; None: no such name, or it is not there."""
        path = self.folder(job) / name if name in PUBLIC_FILES else None
        return (path, PUBLIC_FILES[name]) if path is not None and path.is_file() else None

    def chunk(self, job: Job, number: int) -> Path | None:
        """A chunk of a video that is being made, see `media`."""
        path = self.folder(job) / "chunks" / f"{number:06d}.mp4"
        return path if 0 <= number < 10**6 and path.is_file() else None

    def find(self, job_id: str) -> Job:
        """The job of that id. Raises UserError where there is none."""
        job = self.store.get(job_id)
        if job is None:
            name = job_id if is_id(job_id) else "that name"
            raise UserError(f"There is no job {name} here. It may have been deleted: look into the history.")
        return job

    def finished(self, job: Job, name: str = "final.mp4") -> Path:
        """A file of a job that has ended. Raises UserError where it has not, or ended without."""
        if not job.state.ended:
            raise UserError(f"It is not finished: it is {job.state.value}. JobSignal again later.")
        found = self.public_file(job, name)
        if found is None:
            raise UserError(f"The job ended without {name} ({job.state.value}). {job.error}".strip())
        return found[0]

    def remove_previews(self, job: Job) -> None:
        """Remove what only served to watch a video while it was made, where it has ended."""
        now = self.store.get(job.id)
        if now is None or not now.state.ended:
            return
        shutil.rmtree(self.folder(job) / "chunks", ignore_errors=True)
        (self.folder(job) / "preview.webp").unlink(missing_ok=True)

    def discard(self, job: Job) -> None:
        """Remove what was made so far of a video that cannot become right."""
        for name in ("chunks", "final.parts"):
            shutil.rmtree(self.folder(job) / name, ignore_errors=True)
        for name in ("poster.webp", "preview.webp"):
            (self.folder(job) / name).unlink(missing_ok=True)

    def clear(self, job: Job) -> None:
        """Remove the job's files."""
        shutil.rmtree(self.folder(job), ignore_errors=True)

    def delete(self, job: Job) -> None:
        """Remove a job with its files. Raises UserError while it runs."""
        if not self.store.delete(job.id):
            raise UserError("This is being made at the moment. Cancel it first.")
        self.clear(job)

    def bytes_of(self, job: Job) -> int:
        """What the job's files take, but for the chunks that go soon after its end."""
        return sum(path.stat().st_size for path in self.folder(job).glob("**/*")
                   if path.is_file() and path.parent.name != "chunks")  # fmt: skip

    def enforce_quota(self, limit: int, keep: str = "") -> list[Job]:
        """Delete the oldest jobs that have ended, and are no favorites, until the files take at most `limit` bytes; 0:
        no limit. Returns those deleted.

        Args:
            keep: the id of a job that stays in any case: the one that has just ended.
        """
        gone: list[Job] = []
        if not limit:
            return gone
        jobs = self.store.find(limit=-1)
        sizes = {job.id: self.bytes_of(job) for job in jobs}
        total = sum(sizes.values())
        ended = [job for job in jobs if job.state.ended and not job.favorite and job.id != keep]
        for job in sorted(ended, key=lambda job: job.created):
            if total <= limit:
                break
            if job.kind in (JobKind.CACHE, JobKind.TRAIN) or not self.store.delete(job.id):
                continue  # their products lie elsewhere
            self.clear(job)
            total -= sizes[job.id]
            gone.append(job)
        return gone

    def remove_orphans(self) -> None:
        """Do what a kill came between: remove folders of jobs that the store does not know, and what ended jobs need no
        more."""
        for folder in self.jobs.iterdir():
            job = self.store.get(folder.name)
            if job is not None:
                self.remove_previews(job)
            elif job is None and is_id(folder.name):
                shutil.rmtree(folder, ignore_errors=True)


def lock(path: Path, wait: bool = False) -> FileLock | None:
    """Hold the lock file as `odvae.utils.locks` does. Raises UserError where another process holds it and `wait` is
    not set."""
    return locks.lock(path, f"Another lvdm-app is using {path.parent}. Stop it, or choose another --data-dir.", wait)
