"""The queue in order, with the expected start of each job."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from app.api.service import JobService
from app.storage.jobs import Job, JobKind, JobState
from app.tasks.conflicts import must_wait
from app.tasks.context import Services
from app.tasks.estimate import estimate
from app.tasks.generate import GenerateParams, pipeline_folder
from app.tasks.pipeline_spec import load_pipeline_spec
from app.ui.html.job import settings_parts
from app.ui.html.labels import count
from app.ui.html.templates import render
from odvae.utils.errors import UserError
from odvae.utils.format import format_duration

SHOWN = 24  # jobs that are shown and whose start is estimated


@dataclass(frozen=True)
class QueueEntry:
    """A running, queued or paused job, and its place in the queue."""

    job: Job
    before: int = 0  # running and queued jobs that end before it starts
    others: int = 0  # those of other users, at least
    starts: float | None = None  # seconds until its start; None if unknown

    @property
    def parts(self) -> list[str]:
        """The place and the settings in words."""
        parts = []
        if self.job.state is JobState.QUEUED:
            others = f" ({count(self.others, 'job')} of others)" if self.others else ""
            parts.append((f"{self.before} before it" if self.before else "next") + others)
            if self.starts is not None and self.before:
                parts.append(f"starts in {format_roughly(self.starts)}")
            if self.job.revision:
                parts.append("resumes from its finished part")
        return parts + settings_parts(self.job, short=True)


def queue_entries(service: JobService, owner: str) -> list[QueueEntry]:
    """Return the owner's jobs: running, queued in order, paused."""
    starts = expected_starts(service.services)
    running = service.history(owner, states=[JobState.RUNNING])
    own, entries = len(running), [QueueEntry(job) for job in running]
    for before, job in service.queue(owner):
        entries.append(QueueEntry(job, before, max(0, before - own), starts.get(job.id)))
        own += 1
    return entries + [QueueEntry(job) for job in service.history(owner, states=[JobState.PAUSED])]


def expected_starts(services: Services) -> dict[str, float]:
    """Return the seconds until each queued job starts, in the first worker that is free then and after the jobs that it
    conflicts with; jobs that wait for one of unknown duration are missing."""
    get_value = cache(services.store.get_value)  # read once, however many jobs are queued
    folder_of = cache(lambda pipeline: pipeline_folder(pipeline, services))

    def duration(job: Job) -> float:
        seconds = job.progress.seconds_left if job.state is JobState.RUNNING else None
        seconds = _seconds(job, folder_of, get_value) if seconds is None else seconds
        return math.inf if seconds is None else seconds

    planned = [(job, duration(job)) for job in services.store.find(states=[JobState.RUNNING], limit=-1)]  # and its end
    ends = [end for _, end in planned]
    ends += [0.0] * (max(1, len(services.store.workers())) - len(ends))  # of workers that have no job
    heapq.heapify(ends)
    starts: dict[str, float] = {}
    for job in services.store.queue()[:SHOWN]:
        start = max(ends[0], *(end for other, end in planned if must_wait(services.config, job, [other])), 0.0)
        if start < math.inf:
            starts[job.id] = start
            heapq.heapreplace(ends, start + duration(job))
        planned.append((job, start + duration(job)))
    return starts


def _seconds(job: Job, folder_of: Callable[[str], Path | None], get_value: Callable[[str], Any]) -> float | None:
    """Estimate how long the whole job takes."""
    if job.kind is not JobKind.GENERATE:
        return None
    try:
        params = GenerateParams.model_validate(job.params)
        folder = folder_of(params.pipeline)
        return estimate(params, load_pipeline_spec(folder), folder, get_value).seconds
    except (UserError, ValueError):
        return None  # its pipeline is gone: the job will fail with a message


def format_roughly(seconds: float) -> str:
    """Format a duration coarsely, so that it does not change at every poll."""
    if seconds < 15:
        return "a moment"
    coarse = 10 * round(seconds / 10) if seconds < 90 else 60 * round(seconds / 60)
    return f"about {format_duration(coarse)}".removesuffix(" 00 s")


def worker_notices(workers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the errors and the notices of the workers; several may have the same."""
    errors = list(dict.fromkeys(worker["error"] for worker in workers if worker.get("error")))
    states = {worker["state"] for worker in workers}
    notices = []
    if "loading" in states and states <= {"loading", "starting"}:
        notices.append("The model is being loaded; jobs wait until it is ready.")
    for worker in workers:
        if worker["state"] == "restarting":
            name = "The worker" if len(workers) == 1 else f"Worker {worker['number']}"
            notices.append(f"{name} crashed and is being restarted; its job resumes from its finished part.")
    return errors, notices


def queue(entries: Sequence[QueueEntry], workers: Sequence[Mapping[str, Any]] = (), followed: str = "") -> str:
    """Return the panel as HTML.

    Args:
        workers: the status of each.
        followed: the id of the job that the player shows.
    """
    queued = sum(entry.job.state is JobState.QUEUED for entry in entries)
    if len(entries) == 1 and entries[0].job.id == followed and entries[0].job.state is JobState.RUNNING:
        entries = ()  # the status panel shows it already
    return render("queue.html", "queue", entries[:SHOWN], max(0, len(entries) - SHOWN), queued,
                  *worker_notices(workers), followed)
