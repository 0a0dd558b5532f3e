"""The videos that are to be made: where, with which settings, and from what beginning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from odvae.data.files import is_image
from odvae.data.transforms import resize_crop
from odvae.data.video.image import is_animated
from odvae.data.video.reader import VideoReader, count_frames, read_image
from odvae.inference.latent_file import SUFFIX
from odvae.utils.config import override
from odvae.utils.errors import UserError
from odvae.utils.files import hash_file

from ..sampling.params import VideoFileParams
from ..sampling.pipeline import LVDMPipeline
from .latent_store import fingerprints, read_latents


@dataclass(frozen=True)
class GenerationRequest:
    """A video to make: `target` is NAME.mp4; its latents lie beside it as NAME.safetensors."""

    target: Path
    settings: VideoFileParams
    context_latents: Tensor | None = None  # (1, c, t, h, w) normalised latents to go on from
    made: int = 0  # how many of these, at their end, were made by groups before

    @property
    def latents(self) -> Path:
        return self.target.with_suffix(SUFFIX)

    @property
    def length(self) -> int:
        """Latent frames that it goes on from."""
        return 0 if self.context_latents is None else self.context_latents.shape[2]


def load_context_frames(pipeline: LVDMPipeline, path: Path, settings: VideoFileParams | None = None) -> np.ndarray:
    """Read a photo, or the end of a video, to continue from: uint8 (T, H, W, 3).

    At the settings' frame rate and size (None: the pipeline's own), at most as many frames as a group of latents
    attends to (the first latent and `window` groups), 1 + 4k; no others are decoded into memory.
    """
    settings = with_model_defaults(settings or VideoFileParams(), pipeline)
    assert settings.height and settings.width and settings.frame_rate
    resize = partial(resize_crop, height=settings.height, width=settings.width)
    if is_image(path) and not is_animated(path):
        return resize(read_image(path))
    ratio, rate = pipeline.vae.temporal_compression_ratio, settings.frame_rate
    with VideoReader(path) as video:
        there = count_frames(video.info.duration, rate)
        count = 1 + ratio * min((there - 1) // ratio, settings.window * pipeline.transformer.config.group_size)
        return video.clip((there - count) / rate, count, rate, resize)


def with_model_defaults(settings: VideoFileParams, pipeline: LVDMPipeline) -> VideoFileParams:
    """With the pipeline's own size and frame rate where none is asked for."""
    config = pipeline.transformer.config
    return settings.model_copy(update={"height": settings.height or config.sample_height,
                                       "width": settings.width or config.sample_width,
                                       "frame_rate": settings.frame_rate or float(config.frame_rate)})


def build_requests(
    out: Path, settings: Sequence[VideoFileParams], given: Tensor | None = None
) -> list[GenerationRequest]:
    """`out`/{number}-{prompt}.mp4 for each."""
    return [GenerationRequest(out / f"{i:02d}-{slug(one.prompt)}.mp4", one, given) for i, one in enumerate(settings)]


def continuation(pipeline: LVDMPipeline, file: Path, changes: dict[str, Any], out: Path | None = None,
                 parts: Mapping[str, str] | None = None) -> GenerationRequest:
    """A longer video that goes on from kept latents, exactly as if it had been so long from the start: NAME-FRAMES.mp4.

    Args:
        file: NAME.mp4 or NAME.safetensors.
        changes: `frames`, of the whole, and what of its settings is to be another from there on.
        out: a folder; None: that of `file`.
        parts: the pipeline's `fingerprints`, where they are known.

    Raises:
        UserError: no latents were kept, they are of another pipeline, or they are so long already.
    """
    about, latents = read_latents(file)
    chosen = about.settings.scheduler is not None or "scheduler" in changes
    names = ["vae", "transformer", "text encoder", "scheduler"][:4 - chosen]
    other = about.other_parts(parts or fingerprints(pipeline), names)
    if other:
        raise UserError(f"{file} was made by {', '.join(other)}; give --pipeline the one that made it")
    sizes, ratio = (
        pipeline.group_layout(latents.shape[1], about.given),
        pipeline.vae.temporal_compression_ratio,
    )
    whole = latents.shape[1]
    if whole > max(1, about.given) and sizes[-1] < pipeline.transformer.config.group_size:
        whole -= sizes[-1]  # a group that was cut is made again, whole
    settings = override(about.settings, {k: v for k, v in changes.items() if k not in ("prompt", "sections")},
                        "the settings to go on with")
    frames = 1 + ratio * (latents.shape[1] - 1)
    if settings.frames <= frames:
        raise UserError(f"{file} has {frames} frames already; --frames {settings.frames} is the length of the whole "
                        f"and must be more, the next is {frames + ratio}")
    if set(changes) - {"frames", "prompt"}:
        settings = settings.model_copy(update={"source": describe_file(file) if file.is_file() else file.name})
    if "prompt" in changes:
        second = (1 + ratio * (whole - 1)) / with_model_defaults(settings, pipeline).frame_rate  # type: ignore[operator]
        before = tuple(one for one in settings.sections if one[0] < second)
        settings = settings.model_copy(update={"sections": (*before, (second, changes["prompt"]))})
    return GenerationRequest(
        (out or file.parent) / f"{file.stem}-{settings.frames}.mp4",
        settings,
        latents[None, :, :whole],
        made=whole - about.given,
    )


def describe_file(path: Path) -> str:
    """As `VideoFileParams.source` names it."""
    return f"{path.name} {hash_file(path)}"


def slug(prompt: str) -> str:
    """A name for files: its words, of letters and digits, joined by -."""
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    return "-".join(words)[:60] or "empty"
