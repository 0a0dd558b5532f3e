"""Sample, store, decode and write videos group by group; a stopped video is resumed from its stored groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odvae.inference.memory import AUTO, MemoryOptions

from ..sampling.loading import AnyPipeline
from ..sampling.outputs import DecodeProgress, RolloutGroup, RolloutStep, VideoChunk
from ..sampling.params import VideoFileParams, check_supported
from .drift import Drift
from .latent_store import LatentChunks, LatentMetadata

RenderEvent = RolloutStep | RolloutGroup | DecodeProgress | VideoChunk


@dataclass(frozen=True)
class VideoOutput:
    """Where the output of one video goes while it is rendered."""

    metadata: LatentMetadata
    write: Callable[[np.ndarray], object]  # takes the frames of each group, uint8 (t, H, W, 3)
    chunks: LatentChunks | None = None     # takes the latents of each group
    complete: Tensor | None = None         # instead: all latents (c, t, h, w), only to be decoded
    drift: Drift | None = None

    @property
    def latents(self) -> Tensor | None:
        """The stored latents (c, t, h, w)."""
        return self.complete if self.chunks is None else self.chunks.latents

    @property
    def length(self) -> int:
        """Number of stored latent frames."""
        if self.chunks is not None:
            return self.chunks.length
        return 0 if self.complete is None else self.complete.shape[1]

    def add_latents(self, latents: Tensor) -> None:
        """Store the latents (c, t, h, w) of the next group."""
        if self.chunks is not None:
            self.chunks.add(latents)

    def add_frames(self, frames: np.ndarray, join: bool) -> None:
        """Write the frames of the next group; `join`: it follows another that was generated."""
        self.write(frames)
        if self.drift is not None:
            self.drift.add(frames, join=join)


def render(pipeline: AnyPipeline, videos: Sequence[VideoOutput],
           memory: MemoryOptions = AUTO) -> Iterator[RenderEvent]:
    """Render videos with the same `batch_key` together and yield the pipeline's events: a `RolloutStep` after every
    sampling step, a `RolloutGroup` after every denoised group, a `DecodeProgress` after every decoded part, a
    `VideoChunk` after every decoded group.

    When a `RolloutGroup` is yielded, its latents are stored; when a `VideoChunk` is, its frames are written. Stored
    groups are decoded first; groups that are not stored for all of the videos are sampled again.

    Args:
        memory: what decoding may take.

    Raises:
        UserError, NonFiniteError: as `LVDMPipeline.stream`.
    """
    given, length, decoded = videos[0].metadata.given, min(video.length for video in videos), 0
    for video in videos:
        if video.chunks is not None:
            video.chunks.truncate(length)
    initial = torch.stack([latents[:, :length] for video in videos if (latents := video.latents) is not None]) \
        if length else None
    for event in _events(pipeline, videos, initial, memory):
        if isinstance(event, RolloutGroup):
            for video, latents in zip(videos, event.latents, strict=True):
                video.add_latents(latents)
        elif isinstance(event, VideoChunk):
            for video, frames in zip(videos, event.frames, strict=True):
                video.add_frames(frames, join=decoded >= given)
            decoded += event.latents.shape[2]
        yield event


def _events(pipeline: AnyPipeline, videos: Sequence[VideoOutput], initial: Tensor | None,
            memory: MemoryOptions) -> Iterator[RenderEvent]:
    metadata = [video.metadata for video in videos]
    if initial is not None and (videos[0].chunks is None or initial.shape[2] >= metadata[0].latents):
        yield from _decode(pipeline, initial, metadata[0].given, memory)
        return
    continued: dict[str, Any] = {} if initial is None else {"video_latents": initial}  # not every pipeline takes them
    yield from pipeline.stream(
        [video.settings.prompts for video in metadata], seed=[video.settings.seed for video in metadata],
        negative_prompt=[video.settings.negative_prompt for video in metadata], memory=memory, **continued,
        **_stream_arguments(pipeline, metadata[0].settings))


def _stream_arguments(pipeline: AnyPipeline, settings: VideoFileParams) -> dict[str, Any]:
    """Return the settings that the pipeline takes. Raises UserError unless the others have their defaults."""
    arguments, able = settings.stream_arguments, pipeline.capabilities
    check_supported(pipeline.kind, arguments, able=able)
    return {name: value for name, value in arguments.items() if name not in able.unsupported}


def _decode(pipeline: AnyPipeline, latents: Tensor, given: int, memory: MemoryOptions) -> Iterator[VideoChunk]:
    """Decode latents (B, c, t, h, w), of which the first `given` are context, group by group."""
    groups = latents.split(pipeline.group_layout(latents.shape[2], min(given, latents.shape[2])), dim=2)
    height, width = (pipeline.grid.spatial_compression * side for side in latents.shape[3:])
    plan: Any = pipeline.decode_plan(memory, height, width, len(latents))
    for group, frames in zip(groups, pipeline.decode_latents(groups, plan), strict=True):
        yield VideoChunk(0, 0, frames, group)
