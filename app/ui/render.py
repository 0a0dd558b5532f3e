"""The page's HTML, written by pure functions of jobs. Every text that came from a user is escaped here."""

from __future__ import annotations

from datetime import datetime
from html import escape
from typing import Any

from app.jobs import Job, State
from app.params import Grid, Params

LABELS = {
    State.QUEUED: "waiting",
    State.RUNNING: "in the making",
    State.DONE: "done",
    State.CANCELLED: "cancelled",
    State.FAILED: "failed",
    State.INTERRUPTED: "interrupted",
}


def length_hint(seconds: float, grid: Grid, max_seconds: float) -> str:
    """What a length becomes on the model's grid."""
    frames = grid.frames_for(min(max(seconds, 0), max_seconds))
    return f"{count(frames, 'frame')}, plays {frames / grid.frame_rate:.1f} s at {grid.frame_rate:g} frames a second"


def player(job: Job | None) -> dict[str, Any]:
    """What the player (player.js) has to show."""
    if job is None:
        return {"job": "", "url": "", "live": False, "hint": "Your video appears here, and grows while it is made."}
    hint = {
        State.QUEUED: "Waiting for its turn.",
        State.RUNNING: "The first picture comes in a moment.",
        State.FAILED: "No video was made.",
        State.DONE: "",
    }.get(job.state, "It ended before its first picture.")
    return {
        "job": job.id,
        "url": video_url(job) if job.has_video else "",
        "live": job.state.active,
        "hint": hint,
    }


def video_url(job: Job) -> str:
    return f"media/{job.id}/video.mp4?v={job.revision}-{job.state.value}"


def status(job: Job | None, ahead: int = 0) -> str:
    """The panel under the player: how far the job is, with which settings, and what can be done with it."""
    if job is None:
        return '<section class="lv-status lv-idle">Describe a video and press <b>Generate</b>.</section>'
    progress = job.progress
    line, aside = _phase(job, ahead)
    fraction = 1.0 if job.state is State.DONE else progress.fraction
    ticks = max(1, progress.groups)
    made = progress.frames / job.params.frame_rate
    parts = [
        f'<section class="lv-status" data-state="{job.state}" data-job="{job.id}" data-frames="{progress.frames}">',
        f'<div class="lv-line">{chip(job.state)}<strong class="lv-phase">{line}</strong>',
        f'<span class="lv-left">{aside}</span></div>',
        f'<div class="lv-bar" role="progressbar" aria-label="progress" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{100 * fraction:.0f}" style="--ticks:{ticks}"><i style="width:{fraction:.1%}"></i></div>',
        f'<div class="lv-sub">{made:.1f} of {job.params.seconds:.1f} s are ready'
        f" &middot; {progress.frames} of {count(job.params.frames, 'frame')}</div>",
    ]
    if job.error:
        advice = f"<p>{escape(job.advice)}</p>" if job.advice else ""
        parts.append(f'<div class="lv-error" role="alert"><p><b>{escape(job.error)}</b></p>{advice}</div>')
    parts += [
        f'<p class="lv-prompt">{escape(job.params.prompt)}</p>',
        f'<p class="lv-settings">{settings(job.params)}</p>',
        actions(job),
        "</section>",
    ]
    return "".join(parts)


def _phase(job: Job, ahead: int) -> tuple[str, str]:
    """What happens at the moment, and how long it will go on."""
    progress = job.progress
    match job.state:
        case State.QUEUED:
            return (f"{count(ahead, 'video')} before this one" if ahead else "Next in the queue"), ""
        case State.RUNNING if not progress.groups:
            return "Loading the model", ""
        case State.RUNNING if job.cancel_requested:
            return "Stopping", ""
        case State.RUNNING:
            left = "" if progress.seconds_left is None else f"about {duration(progress.seconds_left)} left"
            group = f"Group {min(progress.group + 1, progress.groups)} of {progress.groups}"
            what = "decoding" if progress.phase == "decoding" else f"step {progress.step} of {progress.steps}"
            return f"{group}, {what}", left
        case State.DONE:
            return "Finished", f"made in {duration((job.finished or 0) - (job.started or 0))}"
        case State.CANCELLED:
            return "What was finished is kept" if job.has_video else "Cancelled before the first picture", ""
        case State.INTERRUPTED:
            return "The server stopped in the middle of it", ""
        case State.FAILED:
            return "It went wrong", ""


def actions(job: Job) -> str:
    """The buttons of one job. Who presses one is told by data-action and data-job (actions.js)."""
    buttons = []
    if job.state.active:
        buttons.append(_button(job, "cancel", "Cancel", "Stop; what is finished is kept"))
    buttons.append(_button(job, "reuse", "Reuse settings", "Copy prompt, seed and settings into the form"))
    if not job.state.active:
        buttons.append(_button(job, "again", "Queue again", "Make it once more with exactly these settings"))
        if job.has_video:
            name = f"video-{job.id[:8]}.mp4"
            buttons.append(f'<a class="lv-button" href="{video_url(job)}" download="{name}">Download</a>')
    if job.state is not State.RUNNING:
        buttons.append(_button(job, "delete", "Delete", "Remove the video and its files"))
    return f'<div class="lv-actions">{"".join(buttons)}</div>'


def notice(text: str) -> str:
    """What is wrong with what was asked, shown at the form."""
    return f'<div class="lv-error" role="alert">{escape(text)}</div>'


def _button(job: Job, action: str, label: str, title: str) -> str:
    return f'<button data-action="{action}" data-job="{job.id}" title="{title}">{label}</button>'


def history(jobs: list[Job], followed: str | None) -> str:
    """All jobs as cards, newest first."""
    if not jobs:
        return '<p class="lv-none">Nothing yet. Every video that you make stays here, also after a restart.</p>'
    return f'<div class="lv-cards">{"".join(_card(job, job.id == followed) for job in jobs)}</div>'


def _card(job: Job, followed: bool) -> str:
    still = (
        f'<img src="media/{job.id}/poster.webp?v={job.revision}" alt="" loading="lazy">'
        if job.has_video
        else '<span class="lv-nothing"></span>'
    )
    prompt = escape(job.params.prompt)
    when = datetime.fromtimestamp(job.created).strftime("%d %b %Y, %H:%M")
    return (
        f'<article class="lv-card{" lv-followed" if followed else ""}" data-job="{job.id}" data-state="{job.state}">'
        f'<button class="lv-still" data-action="open" data-job="{job.id}" aria-label="Show {prompt}">'
        f"{still}{chip(job.state)}</button>"
        f'<div class="lv-text"><p class="lv-prompt" title="{prompt}">{prompt}</p>'
        f'<p class="lv-settings">{settings(job.params)}</p><p class="lv-when">{when}</p>'
        f"{actions(job)}</div></article>"
    )


def chip(state: State) -> str:
    return f'<span class="lv-chip lv-{state}">{LABELS[state]}</span>'


def settings(params: Params) -> str:
    """The used settings in one line."""
    parts = [
        f"seed {params.seed}",
        f"{params.seconds:.1f} s ({count(params.frames, 'frame')})",
        count(params.steps, "step"),
        f"guidance {params.guidance:g}",
    ]
    if params.negative_prompt:
        parts.append(f"without: {escape(params.negative_prompt)}")
    return " &middot; ".join(f"<span>{part}</span>" for part in parts)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
