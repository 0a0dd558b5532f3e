"""The model behind the queue: loaded once, when it is first needed, and used by one thread."""

from __future__ import annotations

import errno
import gc
import logging
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from app.params import Grid, Params
from odvae.runtime.errors import UserError

if TYPE_CHECKING:  # torch and diffusers take seconds to import: only the worker's thread pays for them
    from lvdm.pipeline import LVDMPipeline, VideoPiece
    from lvdm.rollout import RolloutStep

logger = logging.getLogger(__name__)


def load_pipeline(path: str | None = None) -> LVDMPipeline:
    """The LVDMPipeline saved in the folder `path`; None: the one that ships.

    Raises UserError where the folder holds no pipeline.
    """
    from lvdm.generate import load_pipeline as load

    return load(path)


class Engine:
    """Loads a pipeline lazily with `load` and turns settings into its events."""

    def __init__(self, load: Callable[[], Any]):
        self._load = load
        self._pipeline: Any = None
        self._loading = threading.Lock()

    @property
    def loaded(self) -> bool:
        return self._pipeline is not None

    @property
    def grid(self) -> Grid:
        """The lengths that the model makes; the usual ones as long as it is not loaded."""
        if self._pipeline is None:
            return Grid()
        return Grid(
            frame_rate=float(self._pipeline.transformer.config.frame_rate),
            stride=int(self._pipeline.vae.temporal_compression_ratio),
        )

    def load(self) -> Any:
        """The pipeline, loaded at the first call. Whatever goes wrong is raised, and tried again at the next call."""
        with self._loading:
            if self._pipeline is None:
                self._pipeline = self._load()
                logger.info("the model is loaded")
            return self._pipeline

    def stream(self, params: Params) -> Generator[RolloutStep | VideoPiece, None, None]:
        """The events of making one video: a RolloutStep after every step, a VideoPiece after every group."""
        yield from self.load().stream(
            params.prompt,
            negative_prompt=params.negative_prompt,
            frames=params.frames,
            steps=params.steps,
            guidance_scale=params.guidance,
            seed=params.seed,
        )

    def free_memory(self) -> None:
        """After a failure: give back what it left behind, so that the next job starts clean."""
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def explain(error: Exception) -> tuple[str, str]:
    """What went wrong and what to do about it, for the one who asked for the video."""
    text = str(error).strip()
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if out_of_memory or "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return "The machine ran out of memory.", "Ask for fewer seconds, or close other programs."
    if isinstance(error, UserError):
        return text, ""
    # safetensors wraps the system's error into a type of its own: only the text tells
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return "The disk is full.", "Delete videos from the history or free space elsewhere, then queue this one again."
    if isinstance(error, ImportError):
        return f"A part of the program is missing: {text}", "Install the project again, then restart the app."
    return f"{type(error).__name__}: {text}".removesuffix(": "), "Try again; the server's log has the details."
