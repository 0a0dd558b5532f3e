"""What runs and what waits, in order, and when each one's turn is expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from app.api.service import JobService
from app.storage.jobs import Job, JobKind, JobState
from app.storage.store import JobStore
from app.tasks.context import Services
from app.tasks.estimate import estimate
from app.tasks.generate import GenerateParams, pipeline_folder
from app.tasks.pipeline_spec import load_pipeline_spec
from app.ui.html.buttons import actions
from app.ui.html.job import chip, count, settings_line
from odvae.utils.errors import UserError
from odvae.utils.format import format_duration

LOOKED = 24  # jobs of the queue that are shown, and whose time is estimated


@dataclass(frozen=True)
class Turn:
    """A job that runs, waits or is paused, and where it stands."""

    job: Job
    before: int = 0  # jobs that run or wait before it,
    others: int = 0  # those of them that are other users'
    starts: float | None = None  # seconds until its turn; None: not known


def turns_of(service: JobService, owner: str) -> list[Turn]:
    """The owner's jobs: what runs, what waits in order, what is paused."""
    when = expected(service.services)
    running = service.history(owner, states=[JobState.RUNNING])
    mine, found = len(running), [Turn(job) for job in running]
    for before, job in service.queue(owner):
        found.append(Turn(job, before, max(0, before - mine), when.get(job.id)))
        mine += 1
    return found + [Turn(job) for job in service.history(owner, states=[JobState.PAUSED])]


def expected(services: Services) -> dict[str, float]:
    """In how many seconds each waiting job's turn is; those after one of unknown length are missing."""
    facts: dict[str, Any] = {}  # asked for once, however many jobs wait

    def fact(name: str, default: Any = None) -> Any:
        if name not in facts:
            facts[name] = services.store.get_value(name)
        return default if facts[name] is None else facts[name]

    store, found, at = cast(JobStore, SimpleNamespace(get_value=fact)), dict[str, float](), 0.0
    folder = cache(lambda pipeline: pipeline_folder(pipeline, services))
    running = services.store.find(states=[JobState.RUNNING])
    for job in [*running, *services.store.queue()[:LOOKED]]:
        left = job.progress.seconds_left if job.state is JobState.RUNNING else None
        if job.state is JobState.QUEUED:
            found[job.id] = at
        took = _seconds(job, folder, store) if left is None else left
        if took is None:
            break
        at += took
    return found


def _seconds(job: Job, folder_of: Callable[[str], Path | None], store: JobStore) -> float | None:
    """What the whole job is expected to take."""
    if job.kind is not JobKind.GENERATE:
        return None
    try:
        params = GenerateParams.model_validate(job.params)
        folder = folder_of(params.pipeline)
        return estimate(params, load_pipeline_spec(folder), folder, store).seconds
    except (UserError, ValueError):
        return None  # its checkpoint is gone: it will fail, and say so


def roughly(seconds: float) -> str:
    """Coarse, so that what is shown does not change with every look."""
    if seconds < 15:
        return "a moment"
    coarse = 10 * round(seconds / 10) if seconds < 90 else 60 * round(seconds / 60)
    return f"about {format_duration(coarse)}".removesuffix(" 00 s")


def queue(turns: Sequence[Turn], worker: Mapping[str, Any] | None = None, followed: str = "") -> str:
    """The panel. `worker`: what the worker says of itself."""
    waiting = sum(turn.job.state is JobState.QUEUED for turn in turns)
    if [turn.job.state for turn in turns if turn.job.id == followed] == [JobState.RUNNING] and len(turns) == 1:
        turns = ()  # the panel above tells all of it
    items = "".join(_item(turn, turn.job.id == followed, waiting) for turn in turns[:LOOKED])
    if len(turns) > LOOKED:
        items += f'<li class="lv-turn lv-when">and {len(turns) - LOOKED} more</li>'
    summary = f"{count(waiting, 'job')} waiting" if waiting else "nothing waits"
    body = f'<ol class="lv-turns">{items}</ol>' if items else ""
    return f'<section class="lv-queue"><h2>Queue <small>{summary}</small></h2>{_worker(worker or {})}{body}</section>'


def _worker(worker: Mapping[str, Any]) -> str:
    if worker.get("error"):
        return f'<div class="lv-error" role="alert"><p>{escape(str(worker["error"]))}</p></div>'
    line = {"loading": "The model is being loaded; what you ask for waits until it is there.",
            "restarting": "The worker ended and is started again; what ran goes on from what is kept."}  # fmt: skip
    text = line.get(str(worker.get("state")), "")
    return f'<div class="lv-note" role="status">{text}</div>' if text else ""


def _item(turn: Turn, followed: bool, waiting: int) -> str:
    job = turn.job
    title = escape(job.title)
    moves = ""
    if job.state is JobState.QUEUED and waiting > 1 and not job.priority:
        moves = "".join(
            f'<button type="button" class="lv-move" data-action="{action}" data-job="{job.id}" '
            f'aria-label="{label}" title="{label}">{sign}</button>'
            for action, label, sign in (("up", "Earlier", "&uarr;"), ("down", "Later", "&darr;"),
                                        ("first", "First of mine", "&#10514;")))  # fmt: skip
    # Of the one that the player shows, the panel below the player has the buttons.
    below = "" if followed and job.state is JobState.RUNNING else actions(job)
    return (
        f'<li class="lv-turn{" lv-followed" if followed else ""}" data-job="{job.id}" data-state="{job.state}">'
        f'<div class="lv-head-of"><button type="button" class="lv-open" data-action="open" data-job="{job.id}" '
        f'title="Show it in the player">{title}</button><span class="lv-moves">{moves}</span></div>'
        f'<p class="lv-when">{chip(job.state)} {_place(turn)}</p>{below}</li>'
    )


def _place(turn: Turn) -> str:
    job, parts = turn.job, []
    if job.state is JobState.QUEUED:
        before = f"{turn.before} before it" if turn.before else "next"
        parts.append(before + (f" ({count(turn.others, 'job')} of others)" if turn.others else ""))
        if turn.starts is not None and turn.before:
            parts.append(f"starts in {roughly(turn.starts)}")
        if job.revision:
            parts.append("goes on from what is kept")
    parts.append(settings_line(job, short=True))
    return " &middot; ".join(parts)
