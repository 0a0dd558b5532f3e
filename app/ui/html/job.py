"""The value of the player and the panels below it: pure functions of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.storage.jobs import Job, JobKind, JobState
from app.tasks.generate import DEFAULT_PIPELINE
from app.ui.html.buttons import has_video, media_url
from app.ui.html.labels import KIND_LABELS, SIGNAL_LABELS, VIDEO_KINDS, count
from app.ui.html.templates import render
from lvdm.sampling.params import PER_VIDEO, GenerationParams
from odvae.utils.format import format_duration

ALWAYS_SHOWN = {
    *PER_VIDEO,
    "num_frames",
    "height",
    "width",
    "frame_rate",
    "num_inference_steps",
    "guidance_scale",
}  # or separately
IDLE = '<section class="lv-status lv-idle">Describe a video and press <b>Generate</b>.</section>'
PHASES = {"waiting": "Getting ready", "loading": "Loading the model", "text": "Encoding the prompt",
          "encoding": "Encoding the source", "writing": "Writing the file"}  # fmt: skip


def player(job: Job | None, preview: bool = False) -> dict[str, Any]:
    """Return the value of player.js. `preview`: there is a preview of the latents."""
    if job is None:
        return {"job": "", "revision": 0, "chunks": 0, "live": False, "final": "", "preview": "",
                "hint": "Your video appears here and grows while it is generated."}  # fmt: skip
    hints = {
        JobState.QUEUED: "Queued.",
        JobState.RUNNING: "A preview; frames follow." if preview else "The first frames appear soon.",
        JobState.PAUSED: "Paused before its first frame.",
        JobState.FAILED: "No video was generated.",
    }
    return {
        "job": job.id,
        "revision": job.revision,
        "chunks": int(job.result.get("chunks", 0)),
        "live": job.state.active,
        "final": media_url(job, "final.mp4") if has_video(job) else "",
        "preview": preview_url(job) if preview else "",
        "hint": hints.get(job.state, "It ended before its first frame."),
    }


def preview_url(job: Job) -> str:
    """Return the URL of the preview of the latents that are being sampled."""
    return f"media/{job.id}/preview.webp?v={job.revision}-{job.progress.done:g}"


def status(job: Job | None, before: int = 0, starts: float | None = None, preview: bool = False) -> str:
    """Return the progress of a job as HTML.

    Args:
        before: running and queued jobs that end before it starts.
        starts: seconds until its start; None if unknown.
        preview: show the preview of the next group.
    """
    if job is None:
        return IDLE
    url = preview_url(job) if preview else ""
    return render("job.html", "status", job, *phase(job, before, starts), ready(job), url)


def phase(job: Job, before: int = 0, starts: float | None = None) -> tuple[str, str]:
    """Return the current phase, and the remaining or total time, as plain text."""
    left = job.progress.seconds_left
    match job.state:
        case JobState.QUEUED:
            line = f"{count(before, 'job')} before this one" if before else "Next in the queue"
            return line, "" if starts is None or not before else f"starts in about {format_duration(starts)}"
        case JobState.RUNNING if job.signal:
            return SIGNAL_LABELS[job.signal], ""
        case JobState.RUNNING:
            return _running(job), "" if left is None else f"about {format_duration(left)} left"
        case JobState.PAUSED:
            return "Can be resumed", ""
        case JobState.DONE:
            return "Finished", f"took {format_duration((job.finished or 0) - (job.started or 0))}"
        case JobState.STOPPED:
            return "The finished part is kept" if has_video(job) else "Stopped before its first frame", ""
        case JobState.CANCELLED:
            return "The results were discarded", ""
        case JobState.FAILED:
            return "An error occurred" + ("; the finished part is kept" if has_video(job) else ""), ""


def _running(job: Job) -> str:
    p = job.progress
    if p.phase not in ("sampling", "decoding"):
        word = PHASES.get(p.phase) or p.phase[:1].upper() + p.phase[1:]
        return f"{word}: {p.detail}" if p.detail and p.phase not in PHASES else word
    if job.kind not in VIDEO_KINDS:
        return " ".join(filter(None, (p.phase.capitalize(), p.detail)))
    group = f"group {min(max(1, p.group), p.groups)} of {p.groups}, " if p.groups > 1 else ""
    if p.phase == "sampling":
        doing = f"step {p.step} of {p.steps}" if p.steps else "first step"
    else:
        part = f"decoding part {max(1, p.part)} of {p.parts}" if p.parts > 1 else "decoding"
        doing = f"{part} of saved latents" if p.detail else part
    line = f"{group}{doing}"
    return line[:1].upper() + line[1:]


def ready(job: Job) -> str:
    """Return how much of the video can be played."""
    settings, progress = used_settings(job), job.progress
    frames = progress.frames if job.state is JobState.RUNNING else int(job.result.get("frames", progress.frames))
    rate = settings.get("frame_rate")
    if not rate:
        return f"{count(frames, 'frame')} ready" if frames else ""
    whole = job.params.get("num_frames") or settings.get("num_frames")
    if job.state is JobState.DONE or not whole:
        return f"{frames / rate:.1f} s, {count(frames, 'frame')}"
    return f"{frames / rate:.1f} of {whole / rate:.1f} s ready · {frames} of {count(whole, 'frame')}"


def about(job: Job | None) -> str:
    """Return the parts that change rarely, as HTML: errors, notes, the prompt, the settings, the buttons."""
    return render("job.html", "about", job, settings_parts(job)) if job is not None else ""


def used_settings(job: Job) -> Mapping[str, Any]:
    """Return the settings that were used, if known, or the params."""
    return job.result.get("settings") or job.params


def settings_parts(job: Job, short: bool = False) -> list[str]:
    """Return the settings in words, rarely used ones only if they are not the default. `short`: only the first."""
    s, p, parts = used_settings(job), job.params, []
    if job.kind not in VIDEO_KINDS:
        return [KIND_LABELS[job.kind]]
    if job.kind is JobKind.DECODE:
        parts.append(f"decoded again in tiles of {p['tile']} pixels" if p.get("tile") else "decoded again")
    if s.get("num_frames") and s.get("frame_rate"):
        seconds, size = f"{s['num_frames'] / s['frame_rate']:.1f} s", f"{s.get('width')}x{s.get('height')}"
        steps = count(s.get("num_inference_steps", 0), "step")
        parts += [seconds, size, steps] if short else [
            f"seed {s.get('seed')}", size, f"{seconds} ({count(s['num_frames'], 'frame')}, {s['frame_rate']:g} fps)",
            steps, f"guidance {s.get('guidance_scale', 0):g}"]  # fmt: skip
    if short:
        return parts
    for name, field in GenerationParams.model_fields.items():
        if name not in ALWAYS_SHOWN and name in s and s[name] != field.default:
            parts.append(f"{name.replace('_', ' ')} {s[name]}")
    if job.kind is JobKind.GENERATE:
        parts += ["starts from a file"] if p.get("upload") else ["extends a video"] if p.get("job") else []
        parts += [f"LoRA {lora['name']} {lora['weight']:g}" for lora in p.get("loras") or ()]
        if p.get("pipeline") not in (None, "", DEFAULT_PIPELINE):
            parts.append(f"pipeline {job.result['pipeline']}" if job.result.get("pipeline") else "another pipeline")
    if s.get("negative_prompt"):
        parts.append(f"negative prompt: {s['negative_prompt']}")
    return parts


def notice(text: str, kind: str = "note") -> str:
    """Return a notice as HTML, "" for no text. `kind`: note or error."""
    return render("macros.html", "notice", text, kind) if text else ""
