"""The buttons of a job in each state."""

from __future__ import annotations

from dataclasses import dataclass

from app.storage.jobs import Job, JobKind, JobSignal, JobState
from app.ui.html.labels import VIDEO_KINDS

TILES = (64, 128, 256, 512)  # pixels a side, to decode again in


@dataclass(frozen=True)
class Button:
    """A button that triggers an action (actions.js), or a link to a file of the job."""

    label: str
    title: str = ""
    action: str = ""  # of `JobService.act`, or of `GenerateActions.act`
    tiles: tuple[int, ...] = ()  # sizes to choose from
    file: str = ""  # of a link
    download: str = ""  # the name to save the file as; "": open it in a new tab


PAUSE = Button("Pause", "Let other jobs run first; resume it later from where it is", "pause")
STOP = Button("Stop", "End it now; what is finished is kept as a video", "stop")
CANCEL = Button("Cancel", "End it now and discard what was generated", "cancel")
REMOVE = Button("Remove", "Take it out of the queue", "cancel")
RESUME = Button("Resume", "Put it back into the queue; what is finished is kept", "resume")
RETRY = Button("Retry", "Try again; what is finished is kept", "resume")
EDIT = Button("Edit", "Load it into the form, to change it while it is queued", "edit")
EXTEND = Button("Extend", "Continue from its end", "extend")
REUSE = Button("Reuse settings", "Copy prompt, settings and seed into the form", "reuse")
RESEED = Button("Reuse without the seed", "Copy prompt and settings into the form; the seed is drawn", "reseed")
DUPLICATE = Button("Duplicate", "Queue it again with the same seed and settings", "duplicate")
FAVORITE = Button("Favorite", "Keep it when older jobs are deleted to free disk space", "favorite")
UNFAVORITE = Button("Unfavorite", "It may be deleted to free disk space", "unfavorite")
DELETE = Button("Delete", "Remove it with its files", "delete")
DECODE = Button("Decode again", "From its latents, without sampling", "decode", tiles=TILES)
LOG = Button("Log", file="log.txt")


def media_url(job: Job, name: str) -> str:
    """Return the URL of a file of the job."""
    return f"media/{job.id}/{name}?v={job.revision}"


def has_video(job: Job) -> bool:
    """Whether a job has a video to play."""
    return bool(job.result.get("final")) and job.kind in VIDEO_KINDS


def can_be_extended(job: Job) -> bool:
    """Whether the job has a video, of a pipeline that continues videos."""
    return job.kind is JobKind.GENERATE and has_video(job) and bool(job.result.get("extendable", True))


def job_buttons(job: Job, small: bool = False) -> tuple[list[Button], list[Button]]:
    """Return the main buttons of a job and those behind "More". `small`: with few main buttons."""
    main = _main_buttons(job, small)
    if has_video(job):
        link = Button("Download", file="final.mp4", download=f"video-{job.id[:8]}.mp4")
        main.insert(0 if job.state is JobState.DONE else 1, link)
    return main, [button for button in _other_buttons(job) if button not in main]


def _main_buttons(job: Job, small: bool) -> list[Button]:
    video, has_results = job.kind is JobKind.GENERATE, job.revision > 0
    stop_or_edit = [STOP] if has_results else [EDIT] if video else []
    match job.state:
        case JobState.QUEUED:
            return [PAUSE, *stop_or_edit, CANCEL if has_results else REMOVE]
        case JobState.RUNNING if job.signal:
            return [] if job.signal is JobSignal.CANCEL else [CANCEL]
        case JobState.RUNNING:
            return [PAUSE, STOP, CANCEL]
        case JobState.PAUSED:
            return [RESUME, *stop_or_edit, CANCEL]
    first = {JobState.FAILED: [RETRY], JobState.CANCELLED: [RETRY], JobState.STOPPED: [RESUME]}.get(job.state, [])
    extend = [EXTEND] if can_be_extended(job) and not small and job.state is JobState.DONE else []
    return [*first, *extend, *([REUSE] if video else []), UNFAVORITE if job.favorite else FAVORITE]


def _other_buttons(job: Job) -> list[Button]:
    video, buttons = job.kind is JobKind.GENERATE, []
    if job.state.ended and video and has_video(job):
        latents = Button("Download latents", file="final.safetensors", download=f"latents-{job.id[:8]}.safetensors")
        buttons += [*([EXTEND] if can_be_extended(job) else []), DECODE, latents]
    if video:
        buttons += [RESEED] if job.state.ended else [REUSE, RESEED]
    if job.kind in (*VIDEO_KINDS, JobKind.COMPRESS):
        buttons.append(DUPLICATE)
    return buttons + [LOG] * (job.started is not None) + [DELETE] * job.state.ended
