"""The value of the comparison viewer and the panels below it: pure functions of jobs."""

from __future__ import annotations

import re
from typing import Any

from app.storage.jobs import Job, JobState
from app.tasks.compress import SourceVideo
from app.ui.html.buttons import media_url
from app.ui.html.labels import SIGNAL_LABELS, STATE_LABELS, count
from app.ui.html.templates import render
from odvae.utils.format import format_bytes, format_duration

VIEWER = render("comparison.html", "viewer")
PHASES = {"encoding": "Encoding", "decoding": "Decoding and comparing", "loading": "Loading the VAE"}
DOWNLOADS = {"latents.safetensors": "Latents", "reconstruction.mp4": "Reconstruction", "original.mp4": "Original",
             "report.json": "Report"}  # fmt: skip


def view(job: Job | None) -> dict[str, Any]:
    """Return the value of the viewer (compress.js)."""
    if job is None:
        return {"key": "", "hint": "Upload a video and press Compress to compare it with its OD-VAE reconstruction."}
    result = job.result
    if "psnr" not in result:
        hints = {JobState.QUEUED: "Queued.", JobState.FAILED: "The compression failed.",
                 JobState.RUNNING: "Both videos appear here when all frames are compared."}  # fmt: skip
        return {"key": "", "hint": hints.get(job.state, "It ended without a result.")}
    return {"key": f"{job.id}-{job.revision}", "hint": "", "original": media_url(job, "original.mp4"),
            "reconstruction": media_url(job, "reconstruction.mp4"), "report": media_url(job, "report.json"),
            "height": result["height"], "width": result["width"], "frames": result["frames"],
            "rate": result["frame_rate"]}  # fmt: skip


def status(job: Job | None, before: int = 0) -> str:
    """Return the progress or the results of a job as HTML. `before`: running and queued
    jobs that end before it starts."""
    if job is None:
        return ""
    if job.state is JobState.DONE and "psnr" in job.result:
        return render("comparison.html", "done", job, _settings(job), metrics(job.result), _downloads(job))
    if job.state.ended:
        return render("comparison.html", "ended", job)
    return render("comparison.html", "active", job, *_phase(job, before))


def _phase(job: Job, before: int) -> tuple[str, str]:
    """Return the current phase and the remaining time."""
    progress = job.progress
    if job.state is JobState.QUEUED:
        return (f"{before} before this one" if before else "next in the queue"), ""
    if job.state is JobState.PAUSED:
        return STATE_LABELS[job.state], ""
    if job.signal:
        return SIGNAL_LABELS[job.signal], ""
    left = "" if progress.seconds_left is None else f"about {format_duration(progress.seconds_left)} left"
    frames = f", frame {progress.part} of {progress.parts}" if progress.parts else ""
    return PHASES.get(progress.phase, "Starting") + frames, left


def metrics(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the name, the value and a detail of each metric."""
    channels = result["latents_shape"][1]
    return [
        ("PSNR", f"{result['psnr']:.2f} dB", f"worst {result['worst_psnr']:.2f} dB, frame {result['worst_frame'] + 1}"),
        ("SSIM", f"{result['ssim']:.4f}", f"worst {result['worst_ssim']:.4f}"),
        ("Compression", f"{result['ratio']:.1f}×", f"{channels} channels, 4×8×8 smaller"),
        ("Latents", format_bytes(result["latents_bytes"]), f"float16, {result['bits_per_pixel']:.2f} bits per pixel"),
        ("Source file", format_bytes(result["source_bytes"]), "the whole file"),
    ]


def _settings(job: Job) -> list[str]:
    result = job.result
    size, source = f"{result['width']}×{result['height']}", "×".join(map(str, reversed(result["source_size"])))
    parts = [count(result["frames"], "frame"), f"{result['seconds']:.2f} s at {result['frame_rate']:g} fps",
             size if size == source else f"{size} of {source}"]  # fmt: skip
    if job.params.get("start"):
        parts.append(f"from {job.params['start']:g} s")
    duration = (job.finished or 0) - (job.started or 0)
    return parts + [f"took {format_duration(duration)}"] * (duration > 0)


def _downloads(job: Job) -> list[tuple[str, str, str]]:
    """Return the file, the label and the download name of each file."""
    stem = re.sub(r"[^\w.-]+", "-", job.title.rsplit(".", 1)[0]).strip("-.")[:60] or job.id[:8]
    files = job.result.get("files", ())
    return [(file, label, f"{stem}-{file}") for file, label in DOWNLOADS.items() if file in files]


def recent_compressions(jobs: list[Job], current: str) -> str:
    """Return the recent compressions as HTML. `current`: the id of the shown one."""
    return render("comparison.html", "recent", jobs, current) if jobs else ""


def hint(params: dict[str, Any], name: str, source: SourceVideo) -> str:
    """Return a summary of the settings as HTML."""
    left = source.seconds - params["start"]
    seconds = min(left, params["seconds"] or left)
    frames = count(max(1, round(seconds * (params["frame_rate"] or source.frame_rate))), "frame")
    return render("comparison.html", "hint", name,
                  f"{source.width}×{source.height}, {source.seconds:.1f} s, {source.frame_rate:.4g} fps → "
                  f"{params['width']}×{params['height']}, about {frames}")  # fmt: skip
