"""What the tabs Caches and Training share: cards of jobs with progress and buttons, tables, curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
import pandas as pd

from app.api.service import JobAction
from app.storage.jobs import Job, JobKind, JobState
from app.ui.html.buttons import DELETE, PAUSE, RESUME, STOP, Button, media_url
from app.ui.html.templates import render
from app.ui.page import SILENT_EVENT, Page, error_html, owner_of, read_static
from odvae.utils.errors import UserError
from odvae.utils.format import format_duration

SHOWN = 8  # jobs, the newest
REMOVE = replace(DELETE, label="Remove")
Curves = Mapping[str, Sequence[tuple[float, float]]]  # (step, value) of each


def job_list_panel(page: Page, kind: JobKind, name: str, detail: Callable[[Job], str], empty: str,
                   curves: Callable[[Job], Curves] | None = None) -> tuple[gr.State, dict[str, Any], gr.HTML]:
    """Add the newest jobs of a kind as cards, and what one of them found.

    Args:
        name: of the tab, for elem_ids.
        detail: returns what a job found as HTML.
        empty: shown where there is no job yet.
        curves: returns the losses of a job.

    Returns:
        the id of the job that is shown ("": the newest), to be set by what submits; the event that refreshes the panel;
        a notice for mistakes.
    """
    chosen = gr.State("")
    notice = gr.HTML("", elem_id=f"{name}-notice", padding=False)
    cards = gr.HTML("", elem_id=f"{name}-jobs", js_on_load=read_static("works.js"), padding=False)
    found = gr.HTML("", elem_id=f"{name}-found", padding=False)
    plots = [gr.LinePlot(x="step", y="loss", color="curve", title="Losses by step", height=280, visible=False,
                         elem_id=f"{name}-curves")] if curves else []  # fmt: skip

    def update(picked: str, request: gr.Request) -> tuple[Any, ...]:
        jobs = page.service.history(owner_of(request), kinds=[kind], limit=SHOWN)
        if not jobs:
            return render("job_list.html", "empty", empty), "", *(gr.update(visible=False) for _ in plots)
        shown = next((job for job in jobs if job.id == picked), jobs[0])
        cards = "".join(card(job, job.id == shown.id) for job in jobs)
        return cards, detail(shown), *([plot(curves(shown))] if curves else [])

    def act(picked: str, request: gr.Request, event: gr.EventData) -> tuple[Any, str]:
        owner, job_id = owner_of(request), str(event.job)
        try:
            if event.action == "open":
                return page.service.find(job_id, owner).id, ""
            job = page.service.act(job_id, str(event.action), owner)
            return "" if event.action == JobAction.DELETE else job.id, ""
        except UserError as error:
            return gr.skip(), error_html(error)

    event = page.poll(update, [chosen], [cards, found, *plots])
    cards.click(act, [chosen], [chosen, notice], **SILENT_EVENT).success(**event)
    return chosen, event, notice


def card(job: Job, shown: bool) -> str:
    """Return a job in a few lines as HTML; pressing its title shows what it found."""
    seconds = job.progress.seconds_left if job.state is JobState.RUNNING else None
    left = "" if seconds is None else f"{format_duration(seconds)} left"
    when = job.finished or job.started or job.created
    return render("job_list.html", "card", job, shown, _shorten(job.error), _buttons(job), left, when)


def _buttons(job: Job) -> list[Button]:
    match job.state:
        case JobState.RUNNING:
            return [] if job.signal else [PAUSE, STOP]
        case JobState.QUEUED:
            return [PAUSE, STOP]
        case JobState.PAUSED:
            return [RESUME, STOP]
        case JobState.DONE:
            return [REMOVE]
    return [RESUME, REMOVE]


def _shorten(error: str) -> str:
    """Return the first line, and the last of a longer text: it may be a whole log."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    kept = lines if len(lines) <= 4 else [lines[0], "...", lines[-1]]
    return "\n".join(line[:400] for line in kept)


def metric_grid(metrics: Mapping[str, str]) -> str:
    """Return figures with their names, side by side, as HTML."""
    return render("job_list.html", "metric_grid", metrics) if metrics else ""


def report(title: str, lines: Sequence[str]) -> str:
    """Return the lines of a table that a command wrote as HTML."""
    return render("job_list.html", "report", title, lines) if lines else ""


def picture(job: Job, name: str, title: str) -> str:
    """Return one of the job's pictures, which opens whole in a tab of its own, as HTML."""
    return render("job_list.html", "picture", media_url(job, name), title)


def plot(curves: Curves) -> dict[str, Any]:
    """Return an update of a plot of curves over steps, hidden where there are none."""
    points = [(step, value, name) for name, curve in curves.items() for step, value in curve]
    return gr.update(value=pd.DataFrame(points, columns=["step", "loss", "curve"]), visible=bool(points))


def submit(page: Page, kind: JobKind, raw: Mapping[str, Any], request: gr.Request) -> tuple[Any, str]:
    """Queue a job; returns its id, for the page to follow, and a notice where something is wrong with it."""
    try:
        return page.service.submit(kind, raw, owner_of(request)).id, ""
    except UserError as error:
        return gr.skip(), error_html(error)


def choices(page: Page, kind: Any, first: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """(label, id) of the places of a kind, for a dropdown."""
    return [*first, *((f"{asset.name}  ({asset.detail})" if asset.detail else asset.name, asset.id)
                      for asset in page.service.services.assets.list(kind))]
