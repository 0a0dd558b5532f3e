"""What the tabs of caches and of trainings share: cards of jobs with their progress and buttons, tables, curves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from app.storage.jobs import Job, JobKind, JobSignal, JobState
from app.ui.page import SILENT_EVENT, Page, error_html, owner_of, read_static
from odvae.utils.errors import UserError
from odvae.utils.format import format_duration

SHOWN = 8  # jobs, the newest
LABELS = {JobState.QUEUED: "waits", JobState.RUNNING: "runs", JobState.PAUSED: "paused", JobState.DONE: "done",
          JobState.STOPPED: "stopped", JobState.CANCELLED: "cancelled", JobState.FAILED: "failed"}  # fmt: skip
ASKED = {JobSignal.PAUSE: "pausing", JobSignal.STOP: "stopping", JobSignal.CANCEL: "cancelling"}
BUTTONS = {"pause": "Pause", "stop": "Stop", "resume": "Go on", "delete": "Remove"}
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
            return f'<p class="lw-empty">{escape(empty)}</p>', ""
        shown = next((job for job in jobs if job.id == picked), jobs[0])
        return "".join(card(job, job.id == shown.id) for job in jobs), detail(shown)

    def act(picked: str, request: gr.Request, event: gr.EventData) -> tuple[Any, str]:
        owner, job_id = owner_of(request), str(event.job)
        try:
            match event.action:
                case "pause" | "stop":
                    page.service.signal(job_id, JobSignal(event.action), owner)
                case "resume":
                    page.service.resume(job_id, owner)
                case "delete":
                    page.service.delete(job_id, owner)
                    return "", ""
            return page.service.find(job_id, owner).id, ""
        except UserError as error:
            return gr.skip(), error_html(error)

    event = page.poll(look, [chosen], [cards, found])
    cards.click(act, [chosen], [chosen, notice], **SILENT_EVENT).success(**event)
    return chosen, event, notice


def card(job: Job, shown: bool) -> str:
    """A job in a few lines; pressing its title shows what it found."""
    title = escape(job.title)
    state = ASKED.get(job.signal, "") if job.state is JobState.RUNNING else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in job.notes)
    parts = [
        f'<div class="lw-line"><button class="lw-title" data-action="open" data-job="{job.id}" '
        f'aria-pressed="{str(shown).lower()}">{title}</button>'
        f'<span class="lw-chip lw-{job.state}">{state or LABELS[job.state]}</span></div>']
    if job.state in (JobState.RUNNING, JobState.PAUSED) or (job.state is JobState.QUEUED and job.progress.total):
        parts.append(_progress(job))
    if job.error:
        parts.append(f'<div class="lv-error lw-error" role="alert">{escape(_short(job.error))}'
                     f'{f"<br>{escape(job.advice)}" if job.advice else ""}</div>')
    if notes:
        parts.append(f'<ul class="lw-notes">{notes}</ul>')
    buttons = "".join(f'<button data-action="{name}" data-job="{job.id}">{BUTTONS[name]}</button>'
                      for name in _possible(job))
    log = f'<a href="media/{job.id}/log.txt?v={job.revision}" target="_blank" rel="noopener">Log</a>' \
        if job.started else ""
    parts.append(f'<div class="lw-actions">{buttons}{log}<span class="lw-when">{_when(job)}</span></div>')
    return (f'<article class="lw-card" data-shown="{str(shown).lower()}" data-state="{job.state}">'
            f'{"".join(parts)}</article>')


def _possible(job: Job) -> list[str]:
    if job.state is JobState.RUNNING:
        return [] if job.signal else ["pause", "stop"]
    if job.state is JobState.QUEUED:
        return ["pause", "stop"]
    if job.state is JobState.PAUSED:
        return ["resume", "stop"]
    return ["delete"] if job.state is JobState.DONE else ["resume", "delete"]


def _progress(job: Job) -> str:
    now = job.progress
    counted = f"{now.done:g} of {now.total:g}" if now.total else ""
    known = now.seconds_left is not None and job.state is JobState.RUNNING
    left = f"{format_duration(now.seconds_left or 0)} left" if known else ""
    busy = " lw-busy" if not now.total and job.state is JobState.RUNNING else ""
    return (f'<div class="lw-line lw-sub"><span>{escape(now.phase)}</span><span>{counted}</span>'
            f'<span class="lw-left">{left}</span></div>'
            f'<div class="lw-bar{busy}" role="progressbar" aria-valuenow="{100 * now.fraction:.0f}" aria-valuemin="0" '
            f'aria-valuemax="100"><i style="width:{100 * now.fraction:.1f}%"></i></div>')


def _when(job: Job) -> str:
    at = job.finished or job.started or job.created
    return time.strftime("%d %b %H:%M", time.localtime(at))


def _short(error: str) -> str:
    """The first line, and the last of a longer one: a log stands in it whole."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    kept = lines if len(lines) <= 4 else [lines[0], "...", lines[-1]]
    return "\n".join(line[:400] for line in kept)


def metric_grid(pairs: Mapping[str, str]) -> str:
    """Figures with their names, side by side."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs.items())
    return f'<dl class="lw-numbers">{cells}</dl>' if cells else ""


def report(title: str, lines: Sequence[str]) -> str:
    """Lines of a table that a command wrote."""
    if not lines:
        return ""
    return (f'<h4 class="lw-head">{escape(title)}</h4>'
            f'<pre class="lw-report" tabindex="0">{escape(chr(10).join(lines))}</pre>')


def picture(job: Job, name: str, title: str) -> str:
    """One of the job's pictures, which opens whole in a tab of its own."""
    link = f"media/{job.id}/{name}?v={job.revision}"
    return (f'<h4 class="lw-head">{escape(title)}</h4>'
            f'<a class="lw-picture" href="{link}" target="_blank" rel="noopener">'
            f'<img src="{link}" alt="{escape(title)}" loading="lazy"></a>')


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
