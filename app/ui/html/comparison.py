"""The Compress tab's HTML, written by pure functions of jobs. Every text that came from a user is escaped here."""

from __future__ import annotations

import re
from datetime import datetime
from html import escape
from typing import Any

from app.storage.jobs import Job, JobState
from app.tasks.compress import SourceVideo
from app.ui.html.job import count
from odvae.utils.format import format_bytes, format_duration

LABELS = {JobState.QUEUED: "waiting", JobState.RUNNING: "at work", JobState.PAUSED: "paused", JobState.DONE: "done",
          JobState.STOPPED: "stopped", JobState.CANCELLED: "cancelled", JobState.FAILED: "failed"}  # fmt: skip
PHASES = {"encoding": "Encoding", "decoding": "Decoding and comparing", "loading": "Loading the VAE"}

VIEWER = """<div class="lvc-view" data-mode="slider" data-state="empty" role="group" aria-label="Comparison">
<div class="lvc-stage">
<video class="lvc-original" muted playsinline preload="auto" aria-label="Original"></video>
<video class="lvc-coded" muted playsinline preload="auto" aria-label="Reconstruction"></video>
<div class="lvc-handle" role="slider" tabindex="0" aria-label="Original left of here, reconstruction right"
 aria-valuemin="0" aria-valuemax="100" aria-valuenow="50"></div>
<span class="lvc-tag lvc-left">Original</span><span class="lvc-tag lvc-right">Reconstruction</span>
<div class="lvc-hint"></div></div>
<div class="lvc-bar"><button class="lvc-play" type="button" aria-label="Play">
<svg viewBox="0 0 16 16" aria-hidden="true"><path class="lvc-playing" d="M3.5 1.5v13l11-6.5z"/>
<path class="lvc-pausing" d="M3 2h3.5v12H3zM9.5 2H13v12H9.5z"/></svg></button>
<input class="lvc-scrub" type="range" min="0" max="1" step="1" value="0" aria-label="Frame">
<span class="lvc-modes" role="group" aria-label="How to compare">
<button type="button" data-mode="slider" aria-pressed="true">Slider</button>
<button type="button" data-mode="side" aria-pressed="false">Side by side</button></span>
<span class="lvc-told"></span></div>
<div class="lvc-plot" title="PSNR of each frame; red: the worst. Click to go there.">
<span class="lvc-high"></span><span class="lvc-low"></span><div class="lvc-area">
<svg viewBox="0 0 1000 100" preserveAspectRatio="none" aria-hidden="true"><polyline points=""/></svg></div></div>
</div>"""


def view(job: Job | None) -> dict[str, Any]:
    """What the viewer (compress.js) has to show."""
    if job is None:
        return {"key": "", "hint": "Upload a video, press Compress, and see here what the OD-VAE keeps of it."}
    found = job.result
    if "psnr" not in found:
        return {"key": "", "hint": {JobState.QUEUED: "Waiting for its turn.",
                                    JobState.FAILED: "There is nothing to see.",
                                    JobState.RUNNING: "Both videos appear here when all frames are compared."}.get(
                                        job.state, "It ended before there was something to see.")}  # fmt: skip
    return {"key": f"{job.id}-{job.revision}", "hint": "", "original": url(job, "original.mp4"),
            "reconstruction": url(job, "reconstruction.mp4"), "report": url(job, "report.json"),
            "height": found["height"], "width": found["width"], "frames": found["frames"],
            "rate": found["frame_rate"]}  # fmt: skip


def status(job: Job | None, ahead: int = 0) -> str:
    """Under the viewer: how far it is, or what came out."""
    if job is None:
        return ""
    if job.state is JobState.DONE and "psnr" in job.result:
        plan = f'<p class="lvc-dim">{escape(job.result["plan"])}</p>'
        parts = [_box(job, _settings(job)), figures(job.result), _downloads(job), _sheet(job), plan]
    elif not job.state.ended:
        line, aside = _phase(job, ahead)
        done = 100 * job.progress.fraction
        bar = (f'<div class="lvc-progress" role="progressbar" aria-label="progress" aria-valuemin="0" '
               f'aria-valuemax="100" aria-valuenow="{done:.0f}"><i style="width:{done:.1f}%"></i></div>')  # fmt: skip
        detail = f'<div class="lvc-dim">{escape(job.progress.detail)}</div>' if job.progress.detail else ""
        head = f'<span class="lvc-dim">{line}</span><span class="lvc-dim lvc-aside">{aside}</span>'
        parts = [_box(job, bar + detail, head), f'<div class="lvc-actions">{_button(job, "cancel", "Cancel")}</div>']
    else:
        error = f"<p>{escape(job.error)}</p>" if job.error else ""
        advice = f'<p class="lvc-dim">{escape(job.advice)}</p>' if job.advice else ""
        buttons = _button(job, "again", "Try again") + _button(job, "delete", "Delete")
        parts = [_box(job, error + advice, f'<span class="lvc-dim">{LABELS[job.state]}</span>', "lvc-wrong"),
                 f'<div class="lvc-actions">{buttons}</div>']  # fmt: skip
    return f'<div class="lvc-status" data-job="{job.id}" data-state="{job.state}">{"".join(parts)}</div>'


def _box(job: Job, inside: str, head: str = "", look: str = "") -> str:
    notes = "".join(f'<p class="lvc-dim">{escape(note)}</p>' for note in job.notes)
    title = f'<div class="lvc-head"><strong>{escape(job.title)}</strong>{head}</div>'
    return f'<div class="lvc-box {look}">{title}{inside}{notes}</div>'


def _phase(job: Job, ahead: int) -> tuple[str, str]:
    """What happens at the moment, and how long it will go on."""
    progress = job.progress
    if job.state is JobState.QUEUED:
        return (f"{ahead} before this one" if ahead else "next in the queue"), ""
    if job.state is JobState.PAUSED:
        return "paused", ""
    if job.signal:
        return "ending", ""
    left = "" if progress.seconds_left is None else f"about {format_duration(progress.seconds_left)} left"
    frames = f", frame {progress.piece} of {progress.pieces}" if progress.pieces else ""
    return PHASES.get(progress.phase, "Starting") + frames, left


def figures(found: dict[str, Any]) -> str:
    """The numbers, with what they mean."""
    _, c, *_ = found["latents_shape"]
    rows = [
        ("PSNR", f"{found['psnr']:.2f} dB", f"worst {found['worst_psnr']:.2f} dB, frame {found['worst_frame'] + 1}"),
        ("SSIM", f"{found['ssim']:.4f}", f"worst {found['worst_ssim']:.4f}"),
        ("Fewer values", f"{found['ratio']:.1f}&times;", f"{c} channels, 4&times;8&times;8 smaller"),
        ("Latents", format_bytes(found["latents_bytes"]), f"float16, {found['bits_per_pixel']:.2f} bits a pixel"),
        ("Source file", format_bytes(found["source_bytes"]), "all of it, as it came"),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in rows)
    return f'<dl class="lvc-figures">{cells}</dl>'


def _settings(job: Job) -> str:
    found, params = job.result, job.params
    height, width = found["source_size"]
    parts = [count(found["frames"], "frame"), f"{found['seconds']:.2f} s at {found['frame_rate']:g} a second",
             f"{found['width']}&times;{found['height']}"]  # fmt: skip
    if (height, width) != (found["height"], found["width"]):
        parts[-1] += f" of {width}&times;{height}"
    if params.get("start"):
        parts.append(f"from {params['start']:g} s")
    took = (job.finished or 0) - (job.started or 0)
    if took > 0:
        parts.append(f"made in {format_duration(took)}")
    return f'<p class="lvc-dim">{" &middot; ".join(parts)}</p>'


def _downloads(job: Job) -> str:
    stem = re.sub(r"[^\w.-]+", "-", job.title.rsplit(".", 1)[0]).strip("-.")[:60] or job.id[:8]
    files = [("latents.safetensors", "Latents"), ("reconstruction.mp4", "Reconstruction"), ("original.mp4", "Original"),
             ("report.json", "Report")]  # fmt: skip
    links = "".join(f'<a href="{url(job, name)}" download="{escape(f"{stem}-{name}")}">{label}</a>'
                    for name, label in files if name in job.result.get("files", ()))  # fmt: skip
    return f'<div class="lvc-actions" aria-label="Downloads">{links}{_button(job, "delete", "Delete")}</div>'


def _sheet(job: Job) -> str:
    picture = url(job, "frames.webp")
    return (f'<figure class="lvc-sheet"><a href="{picture}" target="_blank"><img loading="lazy" src="{picture}" '
            'alt="Frames: original, reconstruction, difference"></a><figcaption class="lvc-dim">From above: the '
            "original, its reconstruction, four times their difference (black: none). The last column is the worst "
            "frame.</figcaption></figure>")  # fmt: skip


def recent_compressions(jobs: list[Job], current: str) -> str:
    """The newest compressions, to open again."""
    cards = "".join(_card(job, current) for job in jobs)
    return f'<h2 class="lvc-title">Former compressions</h2><div class="lvc-list">{cards}</div>' if jobs else ""


def _card(job: Job, current: str) -> str:
    done = "psnr" in job.result
    still = f'<img src="{url(job, "poster.webp")}" alt="" loading="lazy">' if done else LABELS[job.state]
    caption = f"{job.result['psnr']:.1f} dB &middot; {job.result['ratio']:.0f}&times;" if done else LABELS[job.state]
    title, now = escape(job.title), str(job.id == current).lower()
    return (f'<button type="button" class="lvc-card" data-action="open" data-job="{job.id}" title="{title}" '
            f'aria-current="{now}"><span class="lvc-still">{still}</span><span class="lvc-name">{title}</span>'
            f'<span class="lvc-dim">{caption}<br>{when(job)}</span></button>')  # fmt: skip


def hint(params: dict[str, Any], name: str, source: SourceVideo) -> str:
    """What these settings come to."""
    left = source.seconds - params["start"]
    seconds = min(left, params["seconds"] or left)
    rate = params["frame_rate"] or source.frame_rate
    frames = count(max(1, round(seconds * rate)), "frame")
    return (f'<p class="lvc-dim"><b>{escape(name)}</b>: {source.width}&times;{source.height}, {source.seconds:.1f} s, '
            f"{source.frame_rate:.4g} frames a second &rarr; {params['width']}&times;{params['height']}, about "
            f"{frames}</p>")  # fmt: skip


def url(job: Job, name: str) -> str:
    return f"media/{job.id}/{name}?v={job.revision}"


def _button(job: Job, action: str, label: str) -> str:
    return f'<button type="button" data-action="{action}" data-job="{job.id}">{label}</button>'


def when(job: Job) -> str:
    return datetime.fromtimestamp(job.created).strftime("%d %b, %H:%M")
