"""The operations of requests: the page, the HTTP API and the Gradio API all use this service, with the owner's name.

A request only changes the store. So closing the browser, refreshing the page or opening a second one does not affect
running jobs.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from app.storage.jobs import Job, JobKind, JobSignal, JobState
from app.tasks import get_task
from app.tasks.conflicts import must_wait
from app.tasks.context import Services
from odvae.utils.errors import UserError

MIN_FREE_DISK = 2**28  # bytes that must be free before a job is accepted


class JobAction(StrEnum):
    """The actions on a job, see `JobService.act`."""

    PAUSE = "pause"
    STOP = "stop"
    CANCEL = "cancel"
    RESUME = "resume"
    DUPLICATE = "duplicate"
    EARLIER = "earlier"
    LATER = "later"
    FIRST = "first"
    FAVORITE = "favorite"
    UNFAVORITE = "unfavorite"
    DELETE = "delete"


MOVES = {JobAction.EARLIER: -1, JobAction.LATER: 1, JobAction.FIRST: -(10**6)}


class JobService:
    """Every method is fast, thread-safe, validates its input, and raises UserError.

    With passwords, every user has their own history and jobs; without, everybody sees everything.
    """

    def __init__(self, services: Services, wake: Callable[[], None] = lambda: None) -> None:
        self.services = services
        self.config, self.job_files, self.store = services.config, services.job_files, services.store
        self._wake = wake

    @property
    def private(self) -> bool:
        """Whether every user has a history of their own."""
        return len(self.config.credentials) > 0

    def submit(self, kind: JobKind, raw: Mapping[str, Any], owner: str, parent: str = "") -> Job:
        """Validate the settings of a job and queue it."""
        params, title = get_task(kind).validate(raw, self.services, owner)
        waiting = len(self.store.find(states=[JobState.QUEUED], limit=self.config.max_queued))
        if waiting >= self.config.max_queued:
            raise UserError(f"The queue is full: {waiting} jobs are queued. Try again when some are done.")
        if shutil.disk_usage(self.job_files.jobs).free < MIN_FREE_DISK:
            raise UserError("The server's disk is nearly full. Delete something from the history, then try again.")
        try:
            job = self.store.submit(kind, owner, params, title, parent)
        except sqlite3.Error as error:
            raise UserError(f"The queue cannot be written ({error}). Free space on the server's disk.") from error
        self._wake()
        return job

    def find(self, job_id: str, owner: str) -> Job:
        """Return the owner's job of that id."""
        job = self.job_files.find(job_id)
        if self.private and job.owner != owner:
            raise UserError(f"There is no job {job_id} here. It may have been deleted: see the history.")
        return job

    def history(self, owner: str, **filters: Any) -> list[Job]:
        """Return the owner's jobs, newest first; the filters are those of `JobStore.find`."""
        return self.store.find(owner=owner if self.private else None, **filters)

    def queue(self, owner: str) -> list[tuple[int, Job]]:
        """Return the owner's queued jobs, each with the number of running and queued jobs that end before it starts: it
        needs a free worker, and no running job that it conflicts with."""
        running, queued = self.store.find(states=[JobState.RUNNING], limit=-1), self.store.queue()
        free = max(1, len(self.store.workers())) - len(running)
        found = []
        for place, job in enumerate(queued):
            if not self.private or job.owner == owner:
                others = running + queued[:place] if place < free else running
                found.append((max(place + 1 - free, sum(must_wait(self.config, job, [other]) for other in others)),
                              job))
        return found

    def act(self, job_id: str, action: str, owner: str) -> Job:
        """Do one of `JobAction` with the owner's job.

        Returns:
            the job as it is now; the new one of `duplicate`; as it was before `delete`.
        """
        match action:
            case JobAction.PAUSE | JobAction.STOP | JobAction.CANCEL:
                return self.signal(job_id, JobSignal(action), owner)
            case JobAction.RESUME:
                return self.resume(job_id, owner)
            case JobAction.DUPLICATE:
                return self.duplicate(job_id, owner)
            case JobAction.EARLIER | JobAction.LATER | JobAction.FIRST:
                return self.move(job_id, MOVES[JobAction(action)], owner)
            case JobAction.FAVORITE | JobAction.UNFAVORITE:
                return self.favorite(job_id, action == JobAction.FAVORITE, owner)
            case JobAction.DELETE:
                return self.delete(job_id, owner)
        raise UserError(f"action: must be one of {', '.join(JobAction)}.")

    def signal(self, job_id: str, signal: JobSignal, owner: str) -> Job:
        """Pause, stop or cancel a job; does nothing to one that has ended."""
        job = self.find(job_id, owner)
        self.store.signal(job.id, signal)
        if signal is JobSignal.CANCEL and (stored := self.job_files.find(job.id)).state is JobState.CANCELLED:
            self.job_files.clear(stored)
        self._wake()
        return self.job_files.find(job.id)

    def resume(self, job_id: str, owner: str) -> Job:
        """Resume a paused job, or retry one that ended early, from its files."""
        job = self.find(job_id, owner)
        if job.state is JobState.DONE:
            raise UserError("It is done already. Duplicate it to run it again.")
        if not self.store.requeue(job.id):
            raise UserError(f"It is {job.state.value} already.")
        self._wake()
        return self.job_files.find(job.id)

    def duplicate(self, job_id: str, owner: str) -> Job:
        """Queue a new job with exactly the settings of an old one, its seed included."""
        job = self.find(job_id, owner)
        return self.submit(job.kind, {**job.params}, owner, job.parent)

    def edit(self, job_id: str, raw: Mapping[str, Any], owner: str) -> Job:
        """Give a queued job other settings."""
        job = self.find(job_id, owner)
        params, title = get_task(job.kind).validate(raw, self.services, owner)
        if not self.store.edit(job.id, params, title):
            raise UserError("Only a queued job that has not started can be changed. Duplicate it instead.")
        return self.job_files.find(job.id)

    def move(self, job_id: str, by: int, owner: str) -> Job:
        """Move a job earlier (negative) or later in its owner's queue."""
        job = self.find(job_id, owner)
        self.store.move(job.id, by)
        return self.job_files.find(job.id)

    def favorite(self, job_id: str, favorite: bool, owner: str) -> Job:
        """Mark a job: a favorite is never deleted to free disk space."""
        job = self.find(job_id, owner)
        self.store.set_favorite(job.id, favorite)
        return self.job_files.find(job.id)

    def delete(self, job_id: str, owner: str) -> Job:
        """Remove a job with its files; not while it runs."""
        job = self.find(job_id, owner)
        self.job_files.delete(job)
        return job
