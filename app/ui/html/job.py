"""The page's HTML, written by pure functions of jobs. Every text that came from a user is escaped here."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from html import escape
from typing import Any

from app.storage.jobs import Job, JobKind, JobSignal, JobState
from app.tasks.generate import DEFAULT_PIPELINE
from app.ui.html.buttons import actions, has_video, media
from lvdm.sampling.params import PER_VIDEO, GenerationParams
from odvae.utils.format import format_duration

STATES = {
    JobState.QUEUED: "waiting",
    JobState.RUNNING: "being made",
    JobState.PAUSED: "paused",
    JobState.DONE: "done",
    JobState.STOPPED: "stopped",
    JobState.CANCELLED: "cancelled",
    JobState.FAILED: "failed",
}
KINDS = {JobKind.GENERATE: "video", JobKind.DECODE: "decoding", JobKind.COMPRESS: "compression", JobKind.CACHE: "cache",
         JobKind.TRAIN: "training"}  # fmt: skip
PHASES = {"waiting": "Getting ready", "loading": "Loading the model", "text": "Reading the prompt",
          "encoding": "Encoding what it begins from", "writing": "Writing the file"}  # fmt: skip
ALWAYS_SHOWN = {*PER_VIDEO, "frames", "height", "width", "frame_rate", "steps", "guidance_scale"}  # or by themselves
TICKS = 40  # groups of which the bar shows each
ASKED = {JobSignal.PAUSE: "Pausing after this step", JobSignal.STOP: "Stopping; what is finished is kept",
         JobSignal.CANCEL: "Cancelling", JobSignal.SHUTDOWN: "The server ends"}  # fmt: skip


# ---- what the player shows ----


def player(job: Job | None, preview: bool = False) -> dict[str, Any]:
    """What player.js has to show. `preview`: there is a picture of latents."""
    if job is None:
        return {"job": "", "revision": 0, "chunks": 0, "live": False, "final": "", "preview": "",
                "hint": "Your video appears here, and grows while it is made."}  # fmt: skip
    live = job.state in (JobState.QUEUED, JobState.RUNNING)
    hints = {
        JobState.QUEUED: "Waiting for its turn.",
        JobState.RUNNING: "A first impression; pictures follow." if preview else "The first picture comes in a moment.",
        JobState.PAUSED: "Paused before its first picture.",
        JobState.FAILED: "No video was made.",
    }
    return {
        "job": job.id,
        "revision": job.revision,
        "chunks": int(job.result.get("chunks", 0)),
        "live": live,
        "final": media(job, "final.mp4") if has_video(job) else "",
        "preview": preview_url(job) if preview else "",
        "hint": hints.get(job.state, "It ended before its first picture."),
    }


def preview_url(job: Job) -> str:
    return f"media/{job.id}/preview.webp?v={job.revision}-{job.progress.done:g}"


# ---- the panel under the player ----

IDLE = '<section class="lv-status lv-idle">Describe a video and press <b>Generate</b>.</section>'


def status(job: Job | None, before: int = 0, starts: float | None = None, preview: bool = False) -> str:
    """How far the job is.

    Args:
        before: jobs that run or wait before it.
        starts: in so many seconds its turn is expected; None: not known.
        preview: show the latents of what comes next beside the progress.
    """
    if job is None:
        return IDLE
    progress = job.progress
    line, aside = phase(job, before, starts)
    fraction = 1.0 if job.state is JobState.DONE else progress.fraction
    ticks = progress.groups if 1 <= progress.groups <= TICKS else 1
    peek = (f'<img class="lv-peek" src="{preview_url(job)}" alt="the part that comes next, roughly">'
            if preview and progress.frames else "")  # fmt: skip
    return (
        f'<section class="lv-status" data-state="{job.state}" data-job="{job.id}" data-frames="{progress.frames}">'
        f'<div class="lv-now">{peek}<div class="lv-line">{chip(job.state)}'
        f'<strong class="lv-phase">{line}</strong><span class="lv-left">{aside}</span></div></div>'
        f'<div class="lv-bar" role="progressbar" aria-label="progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * fraction:.0f}" style="--ticks:{ticks}">'
        f'<i style="width:{fraction:.1%}"></i></div>'
        f'<div class="lv-sub">{ready(job)}</div></section>'
    )


def phase(job: Job, before: int = 0, starts: float | None = None) -> tuple[str, str]:
    """What happens at the moment, and how long that or the whole takes."""
    p = job.progress
    match job.state:
        case JobState.QUEUED:
            line = f"{count(before, 'job')} before this one" if before else "Next in the queue"
            return line, "" if starts is None or not before else f"starts in about {format_duration(starts)}"
        case JobState.RUNNING if job.signal:
            return ASKED[job.signal], ""
        case JobState.RUNNING:
            left = "" if p.seconds_left is None else f"about {format_duration(p.seconds_left)} left"
            return _doing(job), left
        case JobState.PAUSED:
            return "Paused; it goes on from where it was", ""
        case JobState.DONE:
            return "Finished", f"made in {format_duration((job.finished or 0) - (job.started or 0))}"
        case JobState.STOPPED:
            return "Stopped; what was finished is kept" if has_video(job) else "Stopped before its first picture", ""
        case JobState.CANCELLED:
            return "Cancelled; nothing is kept", ""
        case JobState.FAILED:
            return "It went wrong" + ("; what was finished is kept" if has_video(job) else ""), ""


def _doing(job: Job) -> str:
    p = job.progress
    if p.phase not in ("sampling", "decoding"):
        word = PHASES.get(p.phase) or escape(p.phase[:1].upper() + p.phase[1:])
        return f"{word}: {escape(p.detail)}" if p.detail and p.phase not in PHASES else word
    if job.kind not in (JobKind.GENERATE, JobKind.DECODE):
        return " ".join(filter(None, (p.phase.capitalize(), escape(p.detail))))
    group = f"Group {min(max(1, p.group), max(1, p.groups))} of {max(1, p.groups)}"
    if p.phase == "sampling":
        return f"{group}, step {p.step} of {p.steps}" if p.steps else f"{group}, first step"
    piece = f"decoding piece {max(1, p.piece)} of {p.pieces}" if p.pieces > 1 else "decoding"
    return f"{group}, {piece}{' of what is kept' if p.detail else ''}"


def ready(job: Job) -> str:
    """How much of the video is there."""
    settings = used(job)
    frames = (
        job.progress.frames if job.state is JobState.RUNNING else int(job.result.get("frames", job.progress.frames))
    )
    rate = settings.get("frame_rate")
    if not rate:
        return f"{count(frames, 'frame')} are ready" if frames else ""
    whole = job.params.get("frames") or settings.get("frames")
    if job.state is JobState.DONE or not whole:
        return f"{frames / rate:.1f} s, {count(frames, 'frame')}"
    return f"{frames / rate:.1f} of {whole / rate:.1f} s are ready &middot; {frames} of {count(whole, 'frame')}"


def about(job: Job | None) -> str:
    """What changes rarely: what went wrong, notes, the prompt, the settings, what can be done."""
    if job is None:
        return ""
    return (
        f'<section class="lv-about" data-job="{job.id}" data-state="{job.state}">{trouble(job)}{notes(job)}'
        f'<p class="lv-prompt">{escape(job.title)}</p>{_sections(job)}'
        f'<p class="lv-settings">{settings_line(job)}</p>{drift(job)}{actions(job)}</section>'
    )


def trouble(job: Job) -> str:
    if not job.error:
        return ""
    advice = f"<p>{escape(job.advice)}</p>" if job.advice else ""
    return f'<div class="lv-error" role="alert"><p><b>{escape(job.error)}</b></p>{advice}</div>'


def notes(job: Job) -> str:
    if not job.notes:
        return ""
    return f'<ul class="lv-notes">{"".join(f"<li>{escape(note)}</li>" for note in job.notes)}</ul>'


def _sections(job: Job) -> str:
    sections = job.params.get("sections") or ()
    items = "".join(f"<li><span>from {second:g} s</span> {escape(text)}</li>" for second, text in sections)
    return f'<ul class="lv-sections">{items}</ul>' if items else ""


def drift(job: Job) -> str:
    """How steady the video is, in small print."""
    figures = job.result.get("drift") or {}
    parts = []
    jump, change = figures.get("jump"), figures.get("first_to_last") or {}
    if jump is not None:
        parts.append(f'<span title="change from frame to frame where groups join, against elsewhere; '
                     f'1: joins are not seen">jump at joins {jump:.2f}</span>')
    if change.get("colour") is not None:
        parts.append(f'<span title="of the mean colour from the first second to the last; 0 to 1">'
                     f'colour change {change["colour"]:.3f}</span>')
    return f'<p class="lv-drift">{" &middot; ".join(parts)}</p>' if parts else ""


def used(job: Job) -> Mapping[str, Any]:
    """The settings that were used, as far as they are known."""
    return job.result.get("settings") or job.params


def settings_line(job: Job, short: bool = False) -> str:
    """The settings in one line, those that are seldom changed only where they were. `short`: only the first."""
    s = used(job)
    if job.kind is JobKind.DECODE:
        tile = job.params.get("tile")
        parts = [f"decoded again in tiles of {tile} pixels" if tile else "decoded again"]
    elif job.kind is JobKind.GENERATE:
        parts = []
    else:
        return KINDS[job.kind]
    if s.get("frames") and s.get("frame_rate"):
        seconds = f"{s['frames'] / s['frame_rate']:.1f} s"
        parts += [seconds, f"{s.get('width')}x{s.get('height')}", count(s.get("steps", 0), "step")] if short else [
            f"seed {s.get('seed')}", f"{s.get('width')}x{s.get('height')}",
            f"{seconds} ({count(s['frames'], 'frame')}, {s['frame_rate']:g} a second)",
            count(s.get("steps", 0), "step"), f"guidance {s.get('guidance_scale', 0):g}"]  # fmt: skip
    if short:
        return " &middot; ".join(f"<span>{part}</span>" for part in parts)
    for name, field in GenerationParams.model_fields.items():
        if name not in ALWAYS_SHOWN and name in s and s[name] != field.default:
            parts.append(f"{name.replace('_', ' ')} {escape(str(s[name]))}")
    if job.kind is JobKind.GENERATE:
        p = job.params
        parts += ["begins from a file"] if p.get("upload") else ["goes on from a video"] if p.get("job") else []
        parts += ["another checkpoint"] if p.get("pipeline") not in (None, "", DEFAULT_PIPELINE) else []
    if s.get("negative_prompt"):
        parts.append(f"without: {escape(s['negative_prompt'])}")
    return " &middot; ".join(f"<span>{part}</span>" for part in parts)


def chip(state: JobState) -> str:
    return f'<span class="lv-chip lv-{state}">{STATES[state]}</span>'


# ---- words ----


def notice(text: str, kind: str = "note") -> str:
    """A line for the user: `kind` is note or error."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="lv-{kind}" role="{role}">{escape(text)}</div>' if text else ""


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%d %b %Y, %H:%M")


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
