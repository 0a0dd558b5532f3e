"""From latents to frames, group by group, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odvae.data.transforms import to_pixels, to_uint8
from odvae.inference.memory import StreamPlan, auto_plan, free_memory
from odvae.inference.side_stream import PendingTensor, SideStream
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.model.conv import StreamState, consume_state
from odvae.model.distilled_decoder import DistilledDecoder
from odvae.utils.errors import UserError
from odvae.utils.finite import is_finite, non_finite

from .offload import is_offloaded, onload
from .outputs import DecodeProgress, RolloutGroup, SamplingEvent, VideoChunk

Pixels = Callable[[Tensor], np.ndarray]  # (B, 3, T, H, W), about [-1, 1] -> (B, T, H, W, 3)


class GroupDecoder:
    """Decodes one video, given as consecutive groups of normalized latents, and keeps the VAE's streaming state.

    Args:
        device: where the VAE computes.
        plan: how many frames, and which tiles, the decoder takes at once.
        pixels: the form of the frames.
        distilled: decodes in place of the VAE's decoder, in whole frames.
    """

    def __init__(self, vae: AutoencoderKLODVAE, device: torch.device, plan: StreamPlan,
                 pixels: Pixels = to_uint8, distilled: DistilledDecoder | None = None) -> None:
        self.vae, self.device, self.plan, self.pixels = vae, device, plan, pixels
        self.distilled = None if distilled is None else nn.Module.to(distilled, device, vae.dtype)
        self._state: StreamState = ()

    def decode(self, latents: Tensor, group: int = 0, groups: int = 0) -> Iterator[DecodeProgress | VideoChunk]:
        """Decode the next group (B, c, t, h, w), number `group` of `groups`; yield after every part, and at last its
        `VideoChunk`.

        Raises:
            NonFiniteError: the decoder gave NaN or infinity.
        """
        onload(self.vae)
        at_once = self.plan.frames // self.vae.temporal_compression_ratio
        parts = self.vae.denormalize(latents.to(self.device)).to(self.vae.dtype).split(at_once, dim=2)
        frames: list[np.ndarray] = []
        for part in parts:
            frames.append(self._decode_part(part))
            yield DecodeProgress(group, groups, len(frames), len(parts))
        yield VideoChunk(group, groups, np.concatenate(frames, axis=1), latents)

    def poll(self) -> Iterable[DecodeProgress | VideoChunk]:
        """Return what an earlier `decode` left to the device and is done now."""
        return ()

    def finish(self) -> Iterable[DecodeProgress | VideoChunk]:
        """Return the rest of what `decode` left to the device, when it is done."""
        return ()

    def _decode_part(self, latents: Tensor) -> np.ndarray:
        video = self._decode_chunk(latents)
        if not is_finite(video):
            raise non_finite("the VAE's decoder", self.vae, f"for latents of up to {float(latents.abs().max()):.3g}")
        return self.pixels(video)

    def _decode_chunk(self, latents: Tensor) -> Tensor:
        state, self._state = consume_state(self._state), ()
        if self.distilled is not None:
            video, self._state = self.distilled.decode_chunk(latents, state)
            return video
        with self.plan.applied(self.vae):
            video, self._state = self.vae.decode_chunk(latents, state)
        return video


class OverlappedDecoder(GroupDecoder):
    """Decodes a group to uint8 on a second CUDA stream while the next one is sampled: `decode` only begins, and `poll`
    and `finish` yield. One group at a time is on its way, so that little memory is taken; where there is too little, it
    decodes as `GroupDecoder` does."""

    def __init__(self, vae: AutoencoderKLODVAE, device: torch.device, plan: StreamPlan,
                 distilled: DistilledDecoder | None = None) -> None:
        super().__init__(vae, device, plan, distilled=distilled)
        self._side = SideStream(device)
        self._parts: deque[tuple[PendingTensor, PendingTensor]] = deque()  # frames, and whether they are finite
        self._frames: list[np.ndarray] = []
        self._group: tuple[int, int, int, Tensor] | None = None  # number, groups, parts, latents
        self._fits: bool | None = None

    def decode(self, latents: Tensor, group: int = 0, groups: int = 0) -> Iterator[DecodeProgress | VideoChunk]:
        """Finish the group before, and begin this one."""
        yield from self.finish()
        if self._fits is None:
            self._fits = self._has_room(latents)
        if not self._fits:
            yield from super().decode(latents, group, groups)
            return
        at_once = self.plan.frames // self.vae.temporal_compression_ratio
        parts = latents.to(self.device).split(at_once, dim=2)
        self._group = group, groups, len(parts), latents
        for part in parts:
            finite: list[Tensor] = []
            frames = self._side.run(partial(self._begin, finite), part)
            self._parts.append((frames, self._side.run(finite.pop)))

    def _begin(self, finite: list[Tensor], latents: Tensor) -> Tensor:
        """Decode a part to pixels, without waiting for them; `finite` receives whether they are."""
        video = self._decode_chunk(self.vae.denormalize(latents).to(self.vae.dtype))
        finite.append(video.isfinite().all())
        return to_pixels(video)

    def _has_room(self, latents: Tensor) -> bool:
        """Whether the memory that sampling has left free is enough to decode beside it."""
        if self.device.type != "cuda":
            return True
        height, width = (self.vae.spatial_compression_ratio * side for side in latents.shape[3:])
        free = free_memory(self.device)
        try:
            plan = auto_plan(self.vae, "decode", height, width, batch=len(latents), free=free, frames=self.plan.frames,
                             tiles=False, tiling=self.plan.tiling)
        except UserError:
            return False
        return plan.frames == self.plan.frames

    def poll(self) -> Iterator[DecodeProgress | VideoChunk]:
        """See `GroupDecoder.poll`."""
        while self._parts and all(pending.ready() for pending in self._parts[0]):
            yield from self._next()

    def finish(self) -> Iterator[DecodeProgress | VideoChunk]:
        """See `GroupDecoder.finish`."""
        while self._parts:
            yield from self._next()

    def _next(self) -> Iterator[DecodeProgress | VideoChunk]:
        """Take the next part, and after the last one yield the group."""
        assert self._group is not None
        group, groups, parts, latents = self._group
        frames, finite = (pending.result() for pending in self._parts.popleft())
        if not finite:
            raise non_finite("the VAE's decoder", self.vae, f"for latents of up to {float(latents.abs().max()):.3g}")
        self._frames.append(frames.numpy())
        yield DecodeProgress(group, groups, len(self._frames), parts)
        if not self._parts:
            video, self._frames, self._group = np.concatenate(self._frames, axis=1), [], None
            yield VideoChunk(group, groups, video, latents)


class ClipDecoder(GroupDecoder):
    """Decodes a video with a VAE that is not causal, by the paper's temporal tiling (2409.01199): each group
    at once, together with the latent frame before it, whose single frame is dropped."""

    def __init__(self, vae: AutoencoderKLODVAE, device: torch.device, plan: StreamPlan,
                 pixels: Pixels = to_uint8, distilled: DistilledDecoder | None = None) -> None:
        super().__init__(vae, device, plan, pixels, distilled)
        self._state = None
        self._last: Tensor | None = None  # the latent frame before the group

    def decode(self, latents: Tensor, group: int = 0, groups: int = 0) -> Iterator[DecodeProgress | VideoChunk]:
        """See `GroupDecoder.decode`."""
        onload(self.vae)
        raw = self.vae.denormalize(latents.to(self.device)).to(self.vae.dtype)
        clip = raw if self._last is None else torch.cat([self._last, raw], dim=2)
        frames = self._decode_part(clip)[:, 0 if self._last is None else 1:]
        self._last, self._state = raw[:, :, -1:], None
        yield DecodeProgress(group, groups, 1, 1)
        yield VideoChunk(group, groups, frames, latents)


def can_overlap(vae: AutoencoderKLODVAE, transformer: Any, device: torch.device) -> bool:
    """Whether `OverlappedDecoder` can decode: beside a transformer on the same GPU, by a causal VAE, both there."""
    return (device.type == "cuda" and torch.backends.cuda.is_built() and vae.causal and transformer.device == device
            and not is_offloaded(vae) and not is_offloaded(transformer))


def decode_events(events: Iterable[SamplingEvent], decoder: GroupDecoder | None, context: Sequence[Tensor],
                  groups_of: Callable[[RolloutGroup], Sequence[Tensor]],
                  ) -> Iterator[SamplingEvent | DecodeProgress | VideoChunk]:
    """Yield events, and decode each group once it is denoised (without a decoder: none); `context`, the groups that are
    continued, with the first. `groups_of`: the groups that denoised latents are decoded in."""
    pending = [(0, part) for part in context]
    for event in events:
        yield event
        if decoder is None:
            continue
        yield from decoder.poll()
        if not isinstance(event, RolloutGroup):
            continue
        groups = groups_of(event)
        for group, latents in [*pending, *enumerate(groups, start=event.group)]:
            yield from decoder.decode(latents, group, event.groups + len(groups) - 1)
        pending.clear()
    if decoder is not None:
        yield from decoder.finish()
