"""The buttons of a job: which there are in each state, and how they are called."""

from __future__ import annotations

from html import escape

from app.storage.jobs import Job, JobKind, JobSignal, JobState

TILES = (64, 128, 256, 512)  # pixels a side, to decode again in


def media(job: Job, name: str) -> str:
    """Where the browser gets a file of the job's."""
    return f"media/{job.id}/{name}?v={job.revision}"


def has_video(job: Job) -> bool:
    return bool(job.result.get("final")) and job.kind in (JobKind.GENERATE, JobKind.DECODE)


def actions(job: Job, small: bool = False) -> str:
    """The buttons of a job: the usual ones, the others behind "More". Who presses one is told by data-action and
    data-job (actions.js)."""
    usual, others = [_button(job, *one) for one in _usual(job, small)], _others(job)
    if has_video(job):
        link = _link(job, "final.mp4", "Download", f"video-{job.id[:8]}.mp4")
        usual.insert(0 if job.state is JobState.DONE else 1, link)
    more = (f'<details class="lv-more"><summary>More</summary><div class="lv-actions">{"".join(others)}</div></details>'
            if others else "")  # fmt: skip
    return f'<div class="lv-actions">{"".join(usual)}{more}</div>'


Action = tuple[str, str, str]  # name, label, title

PAUSE: Action = ("pause", "Pause", "Let others go first; it goes on later from where it is")
STOP: Action = ("stop", "Stop", "End it now; what is finished is kept as a video")
CANCEL: Action = ("cancel", "Cancel", "End it now and throw away what was made")
REMOVE: Action = ("cancel", "Remove", "Take it out of the queue")
RESUME: Action = ("resume", "Go on", "Put it back into the queue; what is made is not made again")
RETRY: Action = ("resume", "Retry", "Try again; what is kept of it is not made again")
EDIT: Action = ("edit", "Edit", "Load it into the form, to change it while it waits")
LONGER: Action = ("longer", "Make longer", "Go on from its end")
REUSE: Action = ("reuse", "Reuse settings", "Copy prompt, settings and seed into the form")
RESEED: Action = ("reseed", "Reuse without the seed", "Copy prompt and settings into the form; the seed is drawn")
AGAIN: Action = ("duplicate", "Make once more exactly", "Queue it again with the same seed and settings")
FAVORITE: Action = ("favorite", "Favorite", "Keep it when room is made for others")
UNFAVORITE: Action = ("unfavorite", "Unfavorite", "It may be deleted to make room")
DELETE: Action = ("delete", "Delete", "Remove it with its files")


def _usual(job: Job, small: bool) -> list[Action]:
    video, begun = job.kind is JobKind.GENERATE, job.revision > 0
    match job.state:
        case JobState.QUEUED:
            return [PAUSE, *([STOP] if begun else [EDIT] if video else []), CANCEL if begun else REMOVE]
        case JobState.RUNNING if job.signal:
            return [] if job.signal is JobSignal.CANCEL else [CANCEL]
        case JobState.RUNNING:
            return [PAUSE, STOP, CANCEL]
        case JobState.PAUSED:
            return [RESUME, *([STOP] if begun else [EDIT] if video else []), CANCEL]
    first = {JobState.FAILED: [RETRY], JobState.CANCELLED: [RETRY], JobState.STOPPED: [RESUME]}.get(job.state, [])
    longer = [LONGER] if video and has_video(job) and not small and job.state is JobState.DONE else []
    return [*first, *longer, *([REUSE] if video else []), UNFAVORITE if job.favorite else FAVORITE]


def _others(job: Job) -> list[str]:
    video, found = job.kind is JobKind.GENERATE, []
    if job.state.ended and video and has_video(job):
        found.append(_button(job, *LONGER))
        tiles = "".join(f'<option value="{tile}">in tiles of {tile}</option>' for tile in TILES)
        found.append(f'<span class="lv-pair">{_button(job, "decode", "Decode again", "From its latents, not sampled")}'
                     f'<select aria-label="how to decode"><option value="">as fits the memory</option>{tiles}</select>'
                     f"</span>")  # fmt: skip
        found.append(_link(job, "final.safetensors", "Download latents", f"latents-{job.id[:8]}.safetensors"))
    if not job.state.ended and video:
        found.append(_button(job, *REUSE))
    if video:
        found.append(_button(job, *RESEED))
    if job.kind in (JobKind.GENERATE, JobKind.DECODE, JobKind.COMPRESS):
        found.append(_button(job, *AGAIN))
    if job.started:
        found.append(f'<a class="lv-button" href="{media(job, "log.txt")}" target="_blank" rel="noopener">Log</a>')
    if job.state.ended:
        found.append(_button(job, *DELETE))
    return found


def _button(job: Job, action: str, label: str, title: str) -> str:
    return (f'<button type="button" data-action="{action}" data-job="{job.id}" data-title="{escape(job.title[:80])}" '
            f'title="{title}">{label}</button>')  # fmt: skip


def _link(job: Job, file: str, label: str, name: str) -> str:
    return f'<a class="lv-button" href="{media(job, file)}" download="{name}">{label}</a>'
