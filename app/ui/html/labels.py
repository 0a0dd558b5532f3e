"""Labels of states and kinds, and formats of dates and counts."""

from __future__ import annotations

from datetime import datetime

from app.storage.jobs import Job, JobKind, JobSignal, JobState

STATE_LABELS = {JobState.QUEUED: "Queued", JobState.RUNNING: "Running", JobState.PAUSED: "Paused",
                JobState.DONE: "Done", JobState.STOPPED: "Stopped", JobState.CANCELLED: "Cancelled",
                JobState.FAILED: "Failed"}  # fmt: skip
SIGNAL_LABELS = {JobSignal.PAUSE: "Pausing", JobSignal.STOP: "Stopping", JobSignal.CANCEL: "Cancelling",
                 JobSignal.SHUTDOWN: "Server shutting down"}  # fmt: skip
KIND_LABELS = {JobKind.GENERATE: "Video", JobKind.DECODE: "Decoding", JobKind.COMPRESS: "Compression",
               JobKind.CACHE: "Cache", JobKind.TRAIN: "Training"}  # fmt: skip
VIDEO_KINDS = (JobKind.GENERATE, JobKind.DECODE)  # shown by the player


def state_label(job: Job) -> str:
    """Return the label of a job's state."""
    if job.state is JobState.RUNNING and job.kind in VIDEO_KINDS:
        return "Rendering"
    return STATE_LABELS[job.state]


def format_date(seconds: float) -> str:
    """Format a time in seconds since 1970 as the server's local time."""
    return datetime.fromtimestamp(seconds).strftime("%d %b %Y, %H:%M")


def count(number: int, noun: str) -> str:
    """Format a number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
