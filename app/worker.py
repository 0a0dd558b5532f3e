"""The one background thread that makes the videos, and the door of its queue.

No work is done inside a web request: a request puts a job into the store and wakes the thread. So closing the browser,
refreshing the page or opening a second one changes nothing in what is being made.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from app.engine import Engine, explain
from app.jobs import Job, Progress, State
from app.library import Library
from app.media import GrowingVideo, write_poster
from app.params import Params, read_request
from odvae.runtime.errors import UserError
from odvae.runtime.files import atomic_path

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

RETRY = 5.0  # seconds


class Worker:
    """Takes queued jobs in order. `start` it once; `stop` ends the running job as interrupted; what it made stays."""

    def __init__(self, library: Library, engine: Engine, max_seconds: float = 60.0, max_queued: int = 100):
        self.library = library
        self.store = library.store
        self.engine = engine
        self.max_seconds = max_seconds
        self._max_queued = max_queued
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lvdm-worker", daemon=True)

    # ---- the door: called from any thread, returns at once ----

    def submit(self, raw: Mapping[str, Any]) -> Job:
        """Check the settings and queue a job. Raises UserError that says what is wrong with them."""
        params = read_request(raw).settle(self.engine.grid, self.max_seconds)
        if self.store.queued() >= self._max_queued:
            raise UserError(f"The queue is full: {self._max_queued} videos wait. Come back when some are made.")
        return self._enqueue(params)

    def again(self, job_id: str) -> Job:
        """Queue a new job with exactly the settings of an old one, its seed included."""
        return self._enqueue(self.library.find(job_id).params)

    def cancel(self, job_id: str) -> Job:
        """Ask for the end of a job; what is finished of it stays. Harmless for one that has ended."""
        self.store.request_cancel(self.library.find(job_id).id)
        return self.library.find(job_id)

    def _enqueue(self, params: Params) -> Job:
        try:
            job = self.store.submit(params)
        except sqlite3.Error as error:
            raise UserError(f"The queue cannot be written ({error}). Free some space on the server's disk.") from error
        self._wake.set()
        return job

    # ---- the thread ----

    def start(self) -> None:
        """Mark what died with an earlier server as interrupted, then begin; queued jobs go on."""
        interrupted = self.store.interrupt_running()
        if interrupted:
            logger.warning("%d video(s) were interrupted when the server stopped", interrupted)
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """End the thread at its next event and wait for it. Harmless where it was never started."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        self._warm_up()
        while not self._stopping.is_set():
            self._wake.clear()  # before looking: a job that comes after the look sets it again
            try:
                job = self.store.claim()
            except sqlite3.Error:  # a full disk, say: it may pass, and this thread must not end
                logger.exception("the queue cannot be read; trying again in %g s", RETRY)
                self._stopping.wait(RETRY)
                continue
            if job is None:
                self._wake.wait()
            else:
                self._work(job)

    def _warm_up(self) -> None:
        """Load the model before anybody waits for it. A failure is told again, readable, by the first job."""
        try:
            self.engine.load()
        except Exception as error:
            logger.error("the model cannot be loaded: %s", " ".join(explain(error)))

    def _work(self, job: Job) -> None:
        """Make one video. Whatever goes wrong ends this job only."""
        logger.info("video %s begins: %r", job.id, job.params.prompt)
        try:
            state = self._make(job)
            self.store.finish(job.id, state)
            logger.info("video %s is %s", job.id, state)
        except Exception as error:
            logger.exception("video %s failed", job.id)
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        message, advice = explain(error)
        try:
            self.store.finish(job.id, State.FAILED, message, advice)
        except Exception:  # a full disk takes no note either; the next start marks the job as interrupted
            logger.exception("the failure of %s could not be noted", job.id)
        error.__traceback__ = None  # it holds the tensors of the failed run
        self.engine.free_memory()

    def _make(self, job: Job) -> State:
        progress = Progress(phase="loading")
        self.store.set_progress(job.id, progress)
        from lvdm.pipeline import VideoPiece  # takes seconds, the first time

        self.engine.load()
        params = job.params.on(self.engine.grid)
        if params != job.params:
            self.store.set_params(job.id, params)
            job = replace(job, params=params)
        self.library.folder(job).mkdir(parents=True, exist_ok=True)
        settings = {**params.model_dump(), "made_by": "lvdm-app"}

        begin = time.monotonic()
        with (
            closing(GrowingVideo(self.library.video(job), params.frame_rate, settings)) as video,
            closing(self.engine.stream(params)) as events,
        ):
            for event in events:
                if isinstance(event, VideoPiece):
                    progress = self._publish(job, video, event, progress)
                else:
                    progress = replace(
                        progress,
                        phase="decoding" if event.step == event.steps else "sampling",
                        group=event.group - 1,  # events count from 1, `Progress` counts what is finished
                        groups=event.groups,
                        step=event.step,
                        steps=event.steps,
                    )
                progress = replace(progress, seconds_left=_seconds_left(progress, time.monotonic() - begin))
                cancelled = self.store.set_progress(job.id, progress)
                if video.frames < params.frames and cancelled:
                    return State.CANCELLED
                if video.frames < params.frames and self._stopping.is_set():
                    return State.INTERRUPTED
        return State.DONE

    def _publish(self, job: Job, video: GrowingVideo, piece: Any, progress: Progress) -> Progress:
        """Put a finished group into the video and its latents beside it."""
        frames = piece.frames[0]
        _save_latents(self.library.latents(job, piece.group), piece.latents[0], job)
        total = video.append(frames)
        write_poster(self.library.poster(job), frames[len(frames) // 2])
        self.store.publish(job.id)
        return replace(progress, phase="sampling", group=piece.group, groups=piece.groups, step=0, frames=total)


def _seconds_left(progress: Progress, elapsed: float) -> float | None:
    """Groups cost the same, so the time left is proportional to the steps left."""
    return elapsed * (1 - progress.fraction) / progress.fraction if progress.fraction > 0 else None


def _save_latents(path: Any, latents: torch.Tensor, job: Job) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        metadata = {"settings": job.params.model_dump_json(), "normalised": "true", "dimensions": "c t h w"}
        save_file({"latents": latents.cpu().contiguous()}, temporary, metadata=metadata)
