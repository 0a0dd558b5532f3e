"""What runs and what is queued, in order, and when each job is expected to start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from app.api.service import JobService
from app.storage.jobs import Job, JobKind, JobState
from app.tasks.context import Services
from app.tasks.estimate import estimate
from app.tasks.generate import GenerateParams, pipeline_folder
from app.tasks.pipeline_spec import load_pipeline_spec
from app.ui.html.job import settings_parts
from app.ui.html.labels import count
from app.ui.html.templates import render
from odvae.utils.errors import UserError
from odvae.utils.format import format_duration

SHOWN = 24  # jobs of the queue that are shown, and whose time is estimated


@dataclass(frozen=True)
class Turn:
    """A job that runs, is queued or paused, and where it stands."""

    job: Job
    before: int = 0  # jobs that run or wait before it,
    others: int = 0  # those of them that are other users'
    starts: float | None = None  # seconds until its turn; None: not known

    @property
    def parts(self) -> list[str]:
        """Its place and its settings in words."""
        parts = []
        if self.job.state is JobState.QUEUED:
            others = f" ({count(self.others, 'job')} of others)" if self.others else ""
            parts.append((f"{self.before} before it" if self.before else "next") + others)
            if self.starts is not None and self.before:
                parts.append(f"starts in {roughly(self.starts)}")
            if self.job.revision:
                parts.append("resumes from what is kept")
        return parts + settings_parts(self.job, short=True)


def turns_of(service: JobService, owner: str) -> list[Turn]:
    """Return the owner's jobs: what runs, what is queued in order, what is paused."""
    when = expected(service.services)
    running = service.history(owner, states=[JobState.RUNNING])
    mine, found = len(running), [Turn(job) for job in running]
    for before, job in service.queue(owner):
        found.append(Turn(job, before, max(0, before - mine), when.get(job.id)))
        mine += 1
    return found + [Turn(job) for job in service.history(owner, states=[JobState.PAUSED])]


def expected(services: Services) -> dict[str, float]:
    """Return the seconds until each queued job starts; those after one of unknown duration are missing."""
    get_value = cache(services.store.get_value)  # read once, however many jobs are queued
    folder_of = cache(lambda pipeline: pipeline_folder(pipeline, services))
    found, start = dict[str, float](), 0.0
    for job in [*services.store.find(states=[JobState.RUNNING]), *services.store.queue()[:SHOWN]]:
        if job.state is JobState.QUEUED:
            found[job.id] = start
        known = job.progress.seconds_left if job.state is JobState.RUNNING else None
        seconds = _seconds(job, folder_of, get_value) if known is None else known
        if seconds is None:
            break
        start += seconds
    return found


def _seconds(job: Job, folder_of: Callable[[str], Path | None], get_value: Callable[[str], Any]) -> float | None:
    """Estimate how long the whole job takes."""
    if job.kind is not JobKind.GENERATE:
        return None
    try:
        params = GenerateParams.model_validate(job.params)
        folder = folder_of(params.pipeline)
        return estimate(params, load_pipeline_spec(folder), folder, get_value).seconds
    except (UserError, ValueError):
        return None  # its checkpoint is gone: it will fail, and say so


def roughly(seconds: float) -> str:
    """Format a duration coarsely, so that what is shown does not change at every poll."""
    if seconds < 15:
        return "a moment"
    coarse = 10 * round(seconds / 10) if seconds < 90 else 60 * round(seconds / 60)
    return f"about {format_duration(coarse)}".removesuffix(" 00 s")


def queue(turns: Sequence[Turn], worker: Mapping[str, Any] | None = None, followed: str = "") -> str:
    """Return the panel as HTML.

    Args:
        worker: the state that the worker reports.
        followed: the id of the job that the player shows.
    """
    waiting = sum(turn.job.state is JobState.QUEUED for turn in turns)
    if len(turns) == 1 and turns[0].job.id == followed and turns[0].job.state is JobState.RUNNING:
        turns = ()  # the panel above shows all of it
    return render("queue.html", "queue", turns[:SHOWN], max(0, len(turns) - SHOWN), waiting, worker or {}, followed)
