"""The files of the jobs, a folder for each, and which of them are public.

    DATA/jobs.sqlite3                  the store
    DATA/jobs/ID/params.json           the settings that are used
                 log.txt               the log
                 ...                   written by its task; those in `PUBLIC_FILES` can be fetched

No client input becomes part of a path, except an id that the store knows.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import FileLock

from app.storage.jobs import Job, JobKind, is_id
from app.storage.store import JobStore
from odvae.utils import locks
from odvae.utils.errors import UserError
from odvae.utils.files import remove_temporaries, write_json

PUBLIC_FILES = {  # the files of a job's folder that can be fetched, and their media types
    "final.mp4": "video/mp4",  # the video, possibly only its finished part
    "poster.webp": "image/webp",
    "preview.webp": "image/webp",  # of latents, during sampling
    "final.safetensors": "application/octet-stream",  # its latents
    "original.mp4": "video/mp4",  # of `compress`
    "reconstruction.mp4": "video/mp4",
    "latents.safetensors": "application/octet-stream",
    "frames.webp": "image/webp",  # original and reconstruction, side by side
    "sheet.webp": "image/webp",  # a contact sheet
    "drift.webp": "image/webp",
    "report.json": "application/json",
    "log.txt": "text/plain; charset=utf-8",
}

PREVIEWS = ("chunks", "preview.webp")  # what a page shows of a growing video


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

    def prepare(self, job: Job) -> Path:
        """Create the job's folder, write its settings, and remove temporary files that a kill left."""
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        write_json(folder / "params.json", {"kind": job.kind, "title": job.title, **job.params})
        return folder

    def public_file(self, job: Job, name: str) -> tuple[Path, str] | None:
        """Return a public file and its media type; None if the name is not public or the file is missing."""
        path = self.folder(job) / name if name in PUBLIC_FILES else None
        return (path, PUBLIC_FILES[name]) if path is not None and path.is_file() else None

    def chunk(self, job: Job, number: int) -> Path | None:
        """Return a chunk of a growing video, see `fragmented_mp4`; None if it is missing."""
        path = self.folder(job) / "chunks" / f"{number:06d}.mp4"
        return path if 0 <= number < 10**6 and path.is_file() else None

    def find(self, job_id: str) -> Job:
        """Return a job. Raises UserError if there is none of that id."""
        job = self.store.get(job_id)
        if job is None:
            name = job_id if is_id(job_id) else "that name"
            raise UserError(f"There is no job {name} here. It may have been deleted: see the history.")
        return job

    def finished_file(self, job: Job, name: str = "final.mp4") -> Path:
        """Return a public file of a job that has ended. Raises UserError if it has not, or has no such file."""
        if not job.state.ended:
            raise UserError(f"It is not finished, it is {job.state.value}. Try again later.")
        public = self.public_file(job, name)
        if public is None:
            raise UserError(f"The job ended without {name} ({job.state.value}). {job.error}".strip())
        return public[0]

    def remove_previews(self, job: Job) -> None:
        """Remove the files for watching a growing video, if the job has ended."""
        stored = self.store.get(job.id)
        if stored is None or not stored.state.ended:
            return
        chunks, preview = (self.folder(job) / name for name in PREVIEWS)
        shutil.rmtree(chunks, ignore_errors=True)
        preview.unlink(missing_ok=True)

    def discard(self, job: Job) -> None:
        """Remove the partial results of a job that cannot be completed."""
        for name in ("chunks", "final.parts"):
            shutil.rmtree(self.folder(job) / name, ignore_errors=True)
        for name in ("poster.webp", "preview.webp"):
            (self.folder(job) / name).unlink(missing_ok=True)

    def clear(self, job: Job) -> None:
        """Remove the job's files."""
        shutil.rmtree(self.folder(job), ignore_errors=True)

    def delete(self, job: Job) -> None:
        """Delete a job with its files. Raises UserError if it is running."""
        if not self.store.delete(job.id):
            raise UserError("This job is running. Cancel it first.")
        self.clear(job)

    def size_of(self, job: Job) -> int:
        """Return the bytes of the job's files, without the chunks, which are removed soon after its end. It may be
        deleted meanwhile, and written."""
        return sum(_file_size(f"{folder}/{name}") for folder, _, names in os.walk(self.folder(job))
                   if os.path.basename(folder) != "chunks" for name in names)

    def enforce_quota(self, limit: int, keep: str = "") -> list[Job]:
        """Delete the oldest ended jobs that are no favorites until all files take at most `limit` bytes (0: no limit).
        Return the deleted jobs. Several workers may do so at once: they delete the same ones.

        Args:
            keep: the id of a job that is never deleted: the one that has just ended. Nor is the last one of each other
                worker.
        """
        deleted: list[Job] = []
        if not limit:
            return deleted
        jobs = self.store.find(limit=-1)
        sizes = {job.id: self.size_of(job) for job in jobs}
        total = sum(sizes.values())
        ended = sorted((job for job in jobs if job.state.ended), key=lambda job: job.finished or 0)
        last = {job.worker: job.id for job in ended}
        kept = {keep, *(last.get(worker["number"]) for worker in self.store.workers())}
        for job in sorted(ended, key=lambda job: job.created):
            if total <= limit:
                break
            if job.favorite or job.id in kept or job.kind in (JobKind.CACHE, JobKind.TRAIN):
                continue  # the output of the last two lies elsewhere
            if self.store.delete(job.id):
                self.clear(job)
                deleted.append(job)
            elif self.store.get(job.id) is not None:
                continue  # it runs again
            total -= sizes[job.id]
        return deleted

    def remove_orphans(self) -> list[Job]:
        """Remove what a kill left: folders of jobs that are not in the store. Return the ended jobs that still have
        previews."""
        previewed: list[Job] = []
        for folder in self.jobs.iterdir():
            job = self.store.get(folder.name)
            if job is None and is_id(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
            elif job is not None and job.state.ended and any((folder / name).exists() for name in PREVIEWS):
                previewed.append(job)
        return previewed


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:  # it was temporary
        return 0


def lock(path: Path, wait: bool = False) -> FileLock | None:
    """Lock a file as `odvae.utils.locks` does. Raises UserError if another process holds it and `wait` is false."""
    return locks.lock(path, f"Another lvdm-app is using {path.parent}. Stop it, or choose another --data-dir.", wait)
