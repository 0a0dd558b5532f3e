"""What happens when something is pressed: thin functions between the page and the worker, which does the work."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from app.ui import render
from app.worker import Worker
from lvdm.defaults import GUIDANCE_SCALE, STEPS
from odvae.runtime.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

SHOWN = 60  # entries of the history on the page


def told(function: Callable[P, R]) -> Callable[P, R]:
    """A user's mistake becomes an error with its text for an API client."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return inner


class Handlers:
    """The page's events. The outputs of `look` are: player, status, history, seen."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.store = worker.store

    def look(self, followed: str | None, seen: dict[str, Any]) -> tuple[Any, ...]:
        """The page as it is now; what has not changed since `seen` is not sent again."""
        job = self.store.get(followed) if followed else None
        ahead = self.store.ahead(job.id) if job and job.state.active else 0
        now = {
            "player": render.player(job),
            "status": render.status(job, ahead),
            "history": render.history(self.store.newest(SHOWN), job.id if job else None),
        }
        changed = [now[name] if now[name] != seen.get(name) else gr.skip() for name in now]
        return *changed, now

    def hint(self, seconds: float | None) -> str:
        return render.length_hint(seconds or 0, self.worker.engine.grid, self.worker.max_seconds)

    def generate(self, *form: Any) -> tuple[Any, str]:
        """Queue a video; returns its id, which the page then follows, and a notice where the form is wrong."""
        prompt, negative_prompt, seed, seconds, steps, guidance = form
        try:
            return self._queue(prompt, negative_prompt, seed, seconds, steps, guidance), ""
        except UserError as error:
            return gr.skip(), render.notice(str(error))

    def act(self, followed: str | None, event: gr.EventData) -> tuple[Any, ...]:
        """A button of a job was pressed. Returns the job to follow, a notice, and the form's six fields."""
        try:
            return self._act(followed, event.action, event.job)
        except UserError as error:
            return gr.skip(), render.notice(str(error)), *(gr.skip(),) * 6

    def _act(self, followed: str | None, action: str, job_id: str) -> tuple[Any, ...]:
        job = self.worker.library.find(job_id)
        form: tuple[Any, ...] = (gr.skip(),) * 6
        match action:
            case "open":
                followed = job.id
            case "again":
                followed = self.worker.again(job.id).id
            case "cancel":
                self.worker.cancel(job.id)
            case "delete":
                self.worker.library.delete(job.id)
                followed = None if followed == job.id else followed
            case "reuse":
                p = job.params
                seconds = min(p.seconds, self.worker.max_seconds)  # the grid may have gone a little beyond
                form = (p.prompt, p.negative_prompt, str(p.seed), seconds, p.steps, p.guidance)
        return followed, "", *form

    def _queue(self, *values: Any) -> str:
        names = ("prompt", "negative_prompt", "seed", "seconds", "steps", "guidance")
        return self.worker.submit(dict(zip(names, values, strict=True))).id

    # ---- the API: named endpoints for gradio_client ----

    @told
    def submit(
        self,
        prompt: str,
        negative_prompt: str = "",
        seed: int | None = -1,
        seconds: float = 4.0,
        steps: int = STEPS,
        guidance: float = GUIDANCE_SCALE,
    ) -> str:
        """Queue a video and return its job id at once. A seed of -1 draws one; /status tells which."""
        return self._queue(prompt, negative_prompt, seed, seconds, steps, guidance)

    @told
    def status(self, job_id: str) -> dict[str, Any]:
        """State, used settings, progress, and what went wrong."""
        return self.worker.library.find(job_id).summary()

    @told
    def cancel(self, job_id: str) -> dict[str, Any]:
        """End a job; what is finished of its video is kept."""
        return self.worker.cancel(job_id).summary()

    @told
    def result(self, job_id: str) -> dict[str, Any]:
        """The MP4 of a job that has ended (downloaded by gradio_client)."""
        return gr.FileData(path=str(self.worker.library.finished_video(job_id)), mime_type="video/mp4").model_dump()
