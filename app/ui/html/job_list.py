"""The panel of the tabs Caches and Training: cards of jobs with progress and buttons, tables, curves."""

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

SHOWN = 8  # newest jobs
REMOVE = replace(DELETE, label="Remove")
Curves = Mapping[str, Sequence[tuple[float, float]]]  # (step, value) by name


def job_list_panel(page: Page, kind: JobKind, name: str, detail: Callable[[Job], str], empty: str,
                   curves: Callable[[Job], Curves] | None = None) -> tuple[gr.State, dict[str, Any], gr.HTML]:
    """Add the newest jobs of a kind as cards, and the results of one of them.

    Args:
        name: prefix of the elem_ids.
        detail: returns the results of a job as HTML.
        empty: text to show if there are no jobs.
        curves: returns the losses of a job.

    Returns:
        the id of the selected job ("": the newest), to be set after a submission; the event that refreshes the panel;
        a notice for errors.
    """
    selected = gr.State("")
    notice = gr.HTML("", elem_id=f"{name}-notice", padding=False)
    cards = gr.HTML("", elem_id=f"{name}-jobs", js_on_load=read_static("jobs.js"), padding=False)
    results = gr.HTML("", elem_id=f"{name}-results", padding=False)
    plots = [gr.LinePlot(x="step", y="loss", color="curve", title="Losses by step", height=280, visible=False,
                         elem_id=f"{name}-curves")] if curves else []  # fmt: skip

    def update(selected_id: str, request: gr.Request) -> tuple[Any, ...]:
        jobs = page.service.history(owner_of(request), kinds=[kind], limit=SHOWN)
        if not jobs:
            return render("job_list.html", "empty", empty), "", *(gr.update(visible=False) for _ in plots)
        shown = next((job for job in jobs if job.id == selected_id), jobs[0])
        cards = "".join(card(job, job.id == shown.id) for job in jobs)
        return cards, detail(shown), *([plot(curves(shown))] if curves else [])

    def act(selected_id: str, request: gr.Request, event: gr.EventData) -> tuple[Any, str]:
        owner, job_id = owner_of(request), str(event.job)
        try:
            if event.action == "open":
                return page.service.find(job_id, owner).id, ""
            job = page.service.act(job_id, str(event.action), owner)
            return "" if event.action == JobAction.DELETE else job.id, ""
        except UserError as error:
            return gr.skip(), error_html(error)

    event = page.poll(update, [selected], [cards, results, *plots])
    cards.click(act, [selected], [selected, notice], **SILENT_EVENT).success(**event)
    return selected, event, notice


def card(job: Job, shown: bool) -> str:
    """Return a job as a card, in HTML; a click on its title shows its results."""
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
    """Return a short text as it is, and the first and the last line of a longer one, such as a log."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    shown = lines if len(lines) <= 4 else [lines[0], "...", lines[-1]]
    return "\n".join(line[:400] for line in shown)


def metric_grid(metrics: Mapping[str, str]) -> str:
    """Return named metrics as an HTML grid."""
    return render("job_list.html", "metric_grid", metrics) if metrics else ""


def report(title: str, lines: Sequence[str]) -> str:
    """Return the output of a command as HTML."""
    return render("job_list.html", "report", title, lines) if lines else ""


def picture(job: Job, name: str, title: str) -> str:
    """Return a picture of the job, with a link to its full size, as HTML."""
    return render("job_list.html", "picture", media_url(job, name), title)


def plot(curves: Curves) -> dict[str, Any]:
    """Return the update of a plot of curves over steps; hidden if there are none."""
    points = [(step, value, name) for name, curve in curves.items() for step, value in curve]
    return gr.update(value=pd.DataFrame(points, columns=["step", "loss", "curve"]), visible=bool(points))


def submit(page: Page, kind: JobKind, raw: Mapping[str, Any], request: gr.Request) -> tuple[Any, str]:
    """Queue a job. Return its id, to be selected, and a notice if it is invalid."""
    try:
        return page.service.submit(kind, raw, owner_of(request)).id, ""
    except UserError as error:
        return gr.skip(), error_html(error)


def choices(page: Page, kind: Any, first: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Return the assets of a kind as (label, id), for a dropdown."""
    return [*first, *((f"{asset.name}  ({asset.detail})" if asset.detail else asset.name, asset.id)
                      for asset in page.service.services.assets.list(kind))]
