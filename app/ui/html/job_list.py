"""What the tabs of caches and of trainings share: cards of jobs with their progress and buttons, tables, curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
from markupsafe import escape

from app.api.service import JobAction
from app.storage.jobs import Job, JobKind, JobState
from app.ui.html.buttons import DELETE, PAUSE, RESUME, STOP, Button, media_url
from app.ui.html.labels import format_duration
from app.ui.html.templates import render
from app.ui.page import SILENT_EVENT, Page, error_html, owner_of, read_static
from odvae.utils.errors import UserError

SHOWN = 8  # jobs, the newest
REMOVE = replace(DELETE, label="Remove")
Detail = Callable[[Job], str]


def job_list_panel(
    page: Page, kind: JobKind, name: str, detail: Detail, empty: str
) -> tuple[gr.State, dict[str, Any], gr.HTML]:
    """The newest jobs of a kind as cards, and what one of them found. Adds the components where it is called.

    Args:
        name: of the tab, for elem_ids.
        detail: HTML of what a job found.
        empty: what is said where there is no job yet.

    Returns:
        the id of the job that is shown (""; the newest), to be set by what submits; the event that looks at once; a
        notice for mistakes.
    """
    chosen = gr.State("")
    notice = gr.HTML("", elem_id=f"{name}-notice", padding=False)
    cards = gr.HTML("", elem_id=f"{name}-jobs", js_on_load=read_static("works.js"), padding=False)
    found = gr.HTML("", elem_id=f"{name}-found", padding=False)

    def look(picked: str, request: gr.Request) -> tuple[str, str]:
        jobs = page.service.history(owner_of(request), kinds=[kind], limit=SHOWN)
        if not jobs:
            return render("job_list.html", "empty", empty), ""
        shown = next((job for job in jobs if job.id == picked), jobs[0])
        return "".join(card(job, job.id == shown.id) for job in jobs), detail(shown)

    def act(picked: str, request: gr.Request, event: gr.EventData) -> tuple[Any, str]:
        owner, job_id = owner_of(request), str(event.job)
        try:
            if event.action == "open":
                return page.service.find(job_id, owner).id, ""
            job = page.service.act(job_id, str(event.action), owner)
            return "" if event.action == JobAction.DELETE else job.id, ""
        except UserError as error:
            return gr.skip(), error_html(error)

    event = page.poll(look, [chosen], [cards, found])
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


def chart(series: Mapping[str, Sequence[Sequence[float]]], title: str) -> str:
    """Curves over steps as SVG, in the page's colours. The scale is logarithmic where the values are above 0."""
    drawn = {name: [(float(x), float(y)) for x, y in points] for name, points in series.items() if points}
    if not drawn:
        return ""
    width, height, left, right, top, bottom = 640, 260, 52, 12, 12, 26
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    scale = math.log if min(ys) > 0 and max(ys) / min(ys) > 8 else float
    x0, x1, y0, y1 = min(xs), max(xs), scale(min(ys)), scale(max(ys))
    x1, pad = (x1 if x1 > x0 else x0 + 1), (0.05 * (y1 - y0) or 0.1)
    y0, y1 = y0 - pad, y1 + pad

    def at(x: float, y: float) -> str:
        return (f"{left + (x - x0) / (x1 - x0) * (width - left - right):.1f},"
                f"{height - bottom - (scale(y) - y0) / (y1 - y0) * (height - top - bottom):.1f}")

    lines = []
    for k in range(5):
        value = y0 + (y1 - y0) * k / 4
        shown = math.exp(value) if scale is math.log else value
        y = height - bottom - (height - top - bottom) * k / 4
        lines.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{shown:.3g}</text>')
    for k, anchor in ((0, "start"), (1, "middle"), (2, "end")) if max(xs) - x0 >= 2 else ((0, "start"),):
        x = left + (width - left - right) * k / 2
        lines.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{x0 + (x1 - x0) * k / 2:.0f}</text>')
    for number, points in enumerate(drawn.values()):
        if len(points) == 1:
            place = at(*points[0]).split(",")
            lines.append(f'<circle class="lw-c{number % 4}" cx="{place[0]}" cy="{place[1]}" r="3"/>')
        else:
            lines.append(f'<polyline class="lw-c{number % 4}" points="{" ".join(at(*point) for point in points)}"/>')
    key = "".join(f'<span class="lw-c{number % 4}">{escape(NAMES.get(name, name))} <b>{points[-1][1]:.4g}</b></span>'
                  for number, (name, points) in enumerate(drawn.items()))
    return (f'<h4 class="lw-head">{escape(title)}</h4><div class="lw-chart"><div class="lw-key">{key}</div>'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(lines)}</svg></div>')


NAMES = {"loss": "loss", "loss_heldout": "loss on held-out clips", "perceptual": "perceptual distance"}



def submit(page: Page, kind: JobKind, raw: Mapping[str, Any], request: gr.Request) -> tuple[Any, str]:
    """Queue a job; returns its id, for the page to follow, and a notice where something is wrong with it."""
    try:
        return page.service.submit(kind, raw, owner_of(request)).id, ""
    except UserError as error:
        return gr.skip(), error_html(error)


def choices(page: Page, kind: Any, first: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """(label, id) of the places of a kind, for a dropdown."""
    return [*first, *((f"{place.name}  ({place.detail})" if place.detail else place.name, place.id)
                      for place in page.service.services.places.list(kind))]
