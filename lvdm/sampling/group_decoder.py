"""From latents to frames, group by group, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from odvae.data.transforms import to_uint8
from odvae.inference.memory import StreamPlan
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.model.conv import StreamState, consume_state
from odvae.utils.finite import is_finite, non_finite

from .offload import onload
from .outputs import DecodeProgress, VideoChunk

Pixels = Callable[[Tensor], np.ndarray]  # (B, 3, T, H, W), about [-1, 1] -> (B, T, H, W, 3)


class GroupDecoder:
    """Decodes one video, given as consecutive groups of normalized latents, and keeps the VAE's streaming state.

    Args:
        device: where the VAE computes.
        plan: how many frames, and which tiles, the decoder takes at once.
        pixels: the form of the frames.
    """

    def __init__(self, vae: AutoencoderKLODVAE, device: torch.device, plan: StreamPlan,
                 pixels: Pixels = to_uint8) -> None:
        self.vae, self.device, self.plan, self.pixels = vae, device, plan, pixels
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

    def _decode_part(self, latents: Tensor) -> np.ndarray:
        state, self._state = consume_state(self._state), ()
        with self.plan.applied(self.vae):
            video, self._state = self.vae.decode_chunk(latents, state)
        if not is_finite(video):
            raise non_finite("the VAE's decoder", self.vae, f"for latents of up to {float(latents.abs().max()):.3g}")
        return self.pixels(video)


class ClipDecoder(GroupDecoder):
    """Decodes a video with a VAE that is not causal, by the paper's temporal tiling (2409.01199): each group
    at once, together with the latent frame before it, whose single frame is dropped."""

    def __init__(self, vae: AutoencoderKLODVAE, device: torch.device, plan: StreamPlan,
                 pixels: Pixels = to_uint8) -> None:
        super().__init__(vae, device, plan, pixels)
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
