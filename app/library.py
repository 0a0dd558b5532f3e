"""The app's folder: the history database and one folder of files for each job.

    jobs.sqlite3              the store
    videos/{id}/video.mp4     grows while it is made
    videos/{id}/poster.webp   a still of it
    videos/{id}/latents-0001.safetensors ...   the finished groups, normalised latents (c, t, h, w)

All names are generated here; nothing that a client sends becomes a part of a path, except an id that the store knows.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from app.jobs import Job, is_id
from app.store import Store
from odvae.runtime.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two servers on one folder are not noticed
    fcntl = None  # type: ignore[assignment]


class Library:
    """Jobs and their files in `folder`, which belongs to one server at a time. `close` gives it back."""

    def __init__(self, folder: Path):
        self.videos = folder / "videos"
        try:
            self.videos.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(
                f"{folder} cannot hold the videos ({error.strerror}). Choose another --data-dir."
            ) from error
        try:
            self.store = Store(folder / "jobs.sqlite3")
        except BaseException:
            self.close()
            raise
        for leftover in self.videos.glob("*/.*.tmp-*"):  # of a server that was killed while writing
            leftover.unlink(missing_ok=True)

    def folder(self, job: Job) -> Path:
        return self.videos / job.id

    def video(self, job: Job) -> Path:
        """Where the job's MP4 is, or will be."""
        return self.folder(job) / "video.mp4"

    def poster(self, job: Job) -> Path:
        return self.folder(job) / "poster.webp"

    def latents(self, job: Job, group: int) -> Path:
        """Where the latents of a group are; groups count from 1."""
        return self.folder(job) / f"latents-{group:04d}.safetensors"

    def find(self, job_id: str) -> Job:
        """The job of that id. Raises UserError where there is none."""
        job = self.store.get(job_id)
        if job is None:
            name = job_id if is_id(job_id) else "that name"
            raise UserError(f"There is no video {name} here. It may have been deleted: look into the history.")
        return job

    def finished_video(self, job_id: str) -> Path:
        """The MP4 of a job that has ended, whole or as far as it came. Raises UserError where there is none yet."""
        job = self.find(job_id)
        if job.state.active:
            raise UserError(f"The video is not finished: it is {job.state.value}. Ask again later.")
        if not self.video(job).is_file():
            raise UserError(f"The job ended without a video ({job.state.value}). {job.error}".strip())
        return self.video(job)

    def delete(self, job_id: str) -> None:
        """Remove a job with its files. Raises UserError while it runs."""
        job = self.find(job_id)
        if not self.store.delete(job_id):
            raise UserError("This video is being made at the moment. Cancel it first.")
        if self.folder(job).exists():
            shutil.rmtree(self.folder(job))

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise UserError(f"Another lvdm-app is using {folder}. Stop it, or choose another --data-dir.") from error
    return handle
