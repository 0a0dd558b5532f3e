"""Generation requests: where a video goes, with which parameters, and what it continues."""

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

from ..sampling.loading import AnyPipeline
from ..sampling.params import VideoFileParams, check_supported
from .fingerprints import fingerprints
from .latent_store import read_latents


@dataclass(frozen=True)
class GenerationRequest:
    """A video to generate: `target` is NAME.mp4; its latents are stored beside it as NAME.safetensors."""

    target: Path
    settings: VideoFileParams
    context_latents: Tensor | None = None  # (1, c, t, h, w) normalized latents that it continues
    generated_latents: int = 0  # how many of these, at their end, were generated before

    @property
    def latents(self) -> Path:
        return self.target.with_suffix(SUFFIX)

    @property
    def context_length(self) -> int:
        """Latent frames that it continues."""
        return 0 if self.context_latents is None else self.context_latents.shape[2]


def load_context_frames(pipeline: AnyPipeline, path: Path, settings: VideoFileParams | None = None) -> np.ndarray:
    """Read a photo, or the end of a video, to continue: uint8 (T, H, W, 3).

    Frames have the settings' frame rate and size (None: the pipeline's own). There are at most as many, 1 + 4k, as a
    group of latents attends to (the first latent and `history_groups` groups); no others are decoded into memory.
    """
    settings = with_model_defaults(settings or VideoFileParams(), pipeline)
    check_supported(pipeline.kind, {}, "image" if is_image(path) and not is_animated(path) else "video")
    assert settings.height and settings.width and settings.frame_rate
    resize = partial(resize_crop, height=settings.height, width=settings.width)
    if is_image(path) and not is_animated(path):
        return resize(read_image(path))
    ratio, rate = pipeline.grid.temporal_compression, settings.frame_rate
    with VideoReader(path) as video:
        total = count_frames(video.info.duration, rate)
        count = 1 + ratio * min((total - 1) // ratio, settings.history_groups * pipeline.grid.group)
        return video.clip((total - count) / rate, count, rate, resize)


def with_model_defaults(settings: VideoFileParams, pipeline: AnyPipeline) -> VideoFileParams:
    """Fill in the pipeline's own values where none is given: length, size, frame rate, steps and guidance.

    Raises:
        UserError: the pipeline does not take a parameter that is set.
    """
    grid, able = pipeline.grid, pipeline.capabilities
    check_supported(pipeline.kind, settings.model_dump(), able=able)
    own = {"num_frames": grid.default_frames, "height": grid.height, "width": grid.width, "frame_rate": grid.frame_rate,
           "num_inference_steps": able.num_inference_steps, "guidance_scale": able.guidance_scale}
    return settings.model_copy(update={name: value for name, value in own.items() if getattr(settings, name) is None})


def build_requests(out: Path, settings: Sequence[VideoFileParams],
                   context_latents: Tensor | None = None) -> list[GenerationRequest]:
    """Build a request per settings, for the file `out`/{number}-{prompt}.mp4."""
    return [GenerationRequest(out / f"{i:02d}-{slug(video.prompt)}.mp4", video, context_latents)
            for i, video in enumerate(settings)]


def continuation(pipeline: AnyPipeline, file: Path, changes: dict[str, Any], out: Path | None = None,
                 parts: Mapping[str, str] | None = None) -> GenerationRequest:
    """Build the request of a longer video, NAME-FRAMES.mp4, that continues stored latents exactly as if it had had this
    length from the start.

    Args:
        file: NAME.mp4 or NAME.safetensors.
        changes: `frames`, of the whole video, and the parameters that change from there on.
        out: a folder; None: that of `file`.
        parts: the pipeline's `fingerprints`, if known.

    Raises:
        UserError: no latents are stored, they are another pipeline's, or the video is not longer.
    """
    check_supported(pipeline.kind, {}, "video")
    metadata, latents = read_latents(file)
    named_scheduler = metadata.settings.scheduler is not None or "scheduler" in changes
    names = ["vae", "transformer", "text encoder", "scheduler"][:4 - named_scheduler]
    different = metadata.different_parts(parts or fingerprints(pipeline), names)
    if different:
        raise UserError(f"{file} was generated with {', '.join(different)}; give the pipeline that generated it with "
                        "--pipeline, and its precision with --dtype")
    ratio, length = pipeline.grid.temporal_compression, latents.shape[1]
    last = pipeline.group_layout(length, metadata.given)[-1]
    if length > max(1, metadata.given) and last < pipeline.grid.group:
        length -= last  # a truncated group is generated again, whole
    settings = override(metadata.settings, {k: v for k, v in changes.items() if k not in ("prompt", "sections")},
                        "the parameters to continue with")
    frames = 1 + ratio * (latents.shape[1] - 1)
    if settings.length <= frames:
        raise UserError(
            f"{file} has {frames} frames already; --num-frames {settings.num_frames} is the length of the whole "
            f"video and must be more, the next is {frames + ratio}"
        )
    if set(changes) - {"num_frames", "prompt"}:
        settings = settings.model_copy(update={"source": describe_file(file) if file.is_file() else file.name})
    if "prompt" in changes:
        second = (1 + ratio * (length - 1)) / with_model_defaults(settings, pipeline).frame_rate  # type: ignore[operator]
        before = tuple(section for section in settings.sections if section[0] < second)
        settings = settings.model_copy(update={"sections": (*before, (second, changes["prompt"]))})
    return GenerationRequest(
        (out or file.parent) / f"{file.stem}-{settings.num_frames}.mp4", settings, latents[None, :, :length],
        generated_latents=length - metadata.given)


def describe_file(path: Path) -> str:
    """Return the value of `VideoFileParams.source` for a file: name and SHA-256."""
    return f"{path.name} {hash_file(path)}"


def slug(prompt: str) -> str:
    """Return a file name for a prompt: its words, of letters and digits, joined by -."""
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    return "-".join(words)[:60] or "empty"
