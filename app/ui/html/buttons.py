"""The buttons of a job: which there are in each state, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass

from app.storage.jobs import Job, JobKind, JobSignal, JobState
from app.ui.html.labels import VIDEO_KINDS

TILES = (64, 128, 256, 512)  # pixels a side, to decode again in


@dataclass(frozen=True)
class Button:
    """A button that asks for an action (actions.js), or a link to one of the job's files."""

    label: str
    title: str = ""
    action: str = ""  # of `JobService.act`, or of `GenerateActions.act`
    tiles: tuple[int, ...] = ()  # sizes to choose from beside it
    file: str = ""  # of a link
    download: str = ""  # the name to save the file as; "": it opens in a tab of its own


PAUSE = Button("Pause", "Let other jobs run first; resume it later from where it is", "pause")
STOP = Button("Stop", "End it now; what is finished is kept as a video", "stop")
CANCEL = Button("Cancel", "End it now and discard what was generated", "cancel")
REMOVE = Button("Remove", "Take it out of the queue", "cancel")
RESUME = Button("Resume", "Put it back into the queue; what is finished is kept", "resume")
RETRY = Button("Retry", "Try again; what is finished is kept", "resume")
EDIT = Button("Edit", "Load it into the form, to change it while it is queued", "edit")
LONGER = Button("Extend", "Continue from its end", "longer")
REUSE = Button("Reuse settings", "Copy prompt, settings and seed into the form", "reuse")
RESEED = Button("Reuse without the seed", "Copy prompt and settings into the form; the seed is drawn", "reseed")
DUPLICATE = Button("Duplicate", "Queue it again with the same seed and settings", "duplicate")
FAVORITE = Button("Favorite", "Keep it when older jobs are deleted to free disk space", "favorite")
UNFAVORITE = Button("Unfavorite", "It may be deleted to free disk space", "unfavorite")
DELETE = Button("Delete", "Remove it with its files", "delete")
DECODE = Button("Decode again", "From its latents, without sampling", "decode", tiles=TILES)
LOG = Button("Log", file="log.txt")


def media_url(job: Job, name: str) -> str:
    """Return where the browser gets a file of the job's."""
    return f"media/{job.id}/{name}?v={job.revision}"


def has_video(job: Job) -> bool:
    """Whether a job has a video to play."""
    return bool(job.result.get("final")) and job.kind in VIDEO_KINDS


def job_buttons(job: Job, small: bool = False) -> tuple[list[Button], list[Button]]:
    """Return the usual buttons of a job and those behind "More". `small`: there is room for few."""
    usual = _usual(job, small)
    if has_video(job):
        link = Button("Download", file="final.mp4", download=f"video-{job.id[:8]}.mp4")
        usual.insert(0 if job.state is JobState.DONE else 1, link)
    return usual, [one for one in _others(job) if one not in usual]


def _usual(job: Job, small: bool) -> list[Button]:
    video, begun = job.kind is JobKind.GENERATE, job.revision > 0
    stop_or_edit = [STOP] if begun else [EDIT] if video else []
    match job.state:
        case JobState.QUEUED:
            return [PAUSE, *stop_or_edit, CANCEL if begun else REMOVE]
        case JobState.RUNNING if job.signal:
            return [] if job.signal is JobSignal.CANCEL else [CANCEL]
        case JobState.RUNNING:
            return [PAUSE, STOP, CANCEL]
        case JobState.PAUSED:
            return [RESUME, *stop_or_edit, CANCEL]
    first = {JobState.FAILED: [RETRY], JobState.CANCELLED: [RETRY], JobState.STOPPED: [RESUME]}.get(job.state, [])
    longer = [LONGER] if video and has_video(job) and not small and job.state is JobState.DONE else []
    return [*first, *longer, *([REUSE] if video else []), UNFAVORITE if job.favorite else FAVORITE]


def _others(job: Job) -> list[Button]:
    video, found = job.kind is JobKind.GENERATE, []
    if job.state.ended and video and has_video(job):
        latents = Button("Download latents", file="final.safetensors", download=f"latents-{job.id[:8]}.safetensors")
        found += [LONGER, DECODE, latents]
    if video:
        found += [RESEED] if job.state.ended else [REUSE, RESEED]
    if job.kind in (*VIDEO_KINDS, JobKind.COMPRESS):
        found.append(DUPLICATE)
    return found + [LOG] * (job.started is not None) + [DELETE] * job.state.ended
