"""Exact streaming: encode and decode videos of any length in constant memory, with the values of the whole.

The model is causal, so a later chunk needs only the last inputs of each causal conv from the earlier ones. This state
is what `encode_chunk` and `decode_chunk` take and return.

A model that is not causal (as in the public code) has no such state. For these there is the paper's temporal tiling
(section 3.4): groups that share one frame are processed separately, at a loss of quality, which
`benchmarks/temporal_tiling.py` measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.compilation import even_parts
from ..model.conv import CausalConv3d, consume_state
from ..utils.errors import NonFiniteError, UserError
from ..utils.finite import check_finite, is_finite

if TYPE_CHECKING:
    from ..model import AutoencoderKLODVAE


def rechunk(chunks: Iterable[Tensor], first: int, step: int) -> Iterator[Tensor]:
    """Split a stream of chunks (B, C, t, H, W) into `first` frames, then `step` at a time; the last may be shorter."""
    pending: list[Tensor] = []
    count, size = 0, first
    for chunk in chunks:
        while chunk.shape[2]:
            take = min(size - count, chunk.shape[2])
            pending.append(chunk[:, :, :take])
            chunk, count = chunk[:, :, take:], count + take
            if count == size:
                yield torch.cat(pending, dim=2) if len(pending) > 1 else pending[0]
                pending, count, size = [], 0, step
    if count:
        yield torch.cat(pending, dim=2)


@torch.no_grad()  # not inference mode, whose tensors cannot be trained on
def encode_stream(vae: AutoencoderKLODVAE, chunks: Iterable[Tensor], *, moments: bool = False,
                  frames: int | None = None) -> Iterator[Tensor]:
    """Encode a video that comes in chunks.

    Args:
        chunks: video chunks (B, 3, t, H, W) in [-1, 1], split anywhere; 1 + 4k frames in all.
        moments: yield (B, 2c, t', H/8, W/8), mean and log-variance, instead of the mean (B, c, t', H/8, W/8).
        frames: frames per call of the model, a multiple of 4, which bounds the memory. None: `vae.chunk_frames`.

    Yields:
        latent chunks as soon as their frames have arrived; concatenated they equal `vae.encode` of the whole video.

    Raises:
        UserError: a chunk of another shape; at the end, if the number of frames is not 1 + 4k; the latents yielded
            before are valid.
    """
    ratio = vae.temporal_compression_ratio
    if frames is not None:
        vae.check_chunk_frames(frames)
    state, seen = (), 0
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        return
    vae.check_pixels(first)
    at_once = frames or vae.chunk_frames(*first.shape[3:])
    for chunk in rechunk(chain([first], chunks), 1, at_once):
        vae.check_pixels(chunk)
        seen += chunk.shape[2]
        whole = chunk.shape[2] if seen == 1 else chunk.shape[2] // ratio * ratio  # only a last chunk can fall short
        for part in even_parts(vae, chunk[:, :, :whole], at_once, ratio) if whole else ():
            state = consume_state(state)
            out, state = vae.encode_chunk(part, state)
            yield out if moments else out[:, : vae.latent_channels]
    if seen:
        vae.latent_frames(seen)


@torch.no_grad()
def decode_stream(vae: AutoencoderKLODVAE, chunks: Iterable[Tensor], *,
                  frames: int | None = None) -> Iterator[Tensor]:
    """Decode raw latents that come in chunks.

    Args:
        chunks: latent chunks (B, c, t, h, w), split anywhere, for example from a sampler that is still running.
        frames: latent frames per call of the model, which bounds the memory. None: `vae.chunk_latents`.

    Yields:
        the frames (B, 3, t', 8h, 8w) of each chunk without delay, at most `frames` latents at a time; concatenated
        they equal `vae.decode` of the whole.

    Raises:
        UserError: a chunk of another shape.
        NonFiniteError: latents or frames that are not finite.
    """
    if frames is not None and frames < 1:
        raise UserError(f"a chunk of {frames} latent frames is too small; the least is 1")
    state: object = ()
    for chunk in chunks:
        if chunk.ndim == 5 and not chunk.shape[2]:
            continue
        vae.check_latents(chunk)
        if not is_finite(chunk):
            raise NonFiniteError("the latents to decode contain NaN or infinity; encode the video again")
        at_once = frames or vae.chunk_latents(*chunk.shape[3:])
        for part in chain.from_iterable(even_parts(vae, part, at_once, 1) for part in chunk.split(at_once, dim=2)):
            state = consume_state(state)
            out, state = vae.decode_chunk(part, state)
            check_finite(out, "the VAE's decoder", vae)
            yield out


def encoder_reach(vae: AutoencoderKLODVAE) -> int:
    """Return how many earlier frames a latent depends on at most: the taps of all convs, each at the stride of the
    latents. A stream that starts this many frames earlier, anywhere in a video, has the same state from there on."""
    taps = sum(module.time_padding for module in vae.encoder.modules() if isinstance(module, CausalConv3d))
    return int(taps * vae.temporal_compression_ratio)


def temporal_groups(length: int, group: int) -> list[tuple[int, int]]:
    """Return (start, stop) of groups of `group` frames; neighbours share one, the last takes the rest.
    (9, 5) -> [(0, 5), (4, 9)]. Groups of 1 + m latents align with groups of 1 + 4m frames."""
    if group < 2:
        raise UserError(f"a group of {group} has no frame beside the shared one; the least is 2")
    return [(start, min(start + group, length)) for start in range(0, max(1, length - 1), group - 1)]


@torch.no_grad()
def encode_groups(vae: AutoencoderKLODVAE, video: Tensor, *, group: int = 33, moments: bool = False) -> Tensor:
    """Encode (B, 3, 1+4k, H, W) by the paper's temporal tiling: groups of `group` = 1 + 4m frames; the first latent of
    every later group is dropped. Returns the mean (B, c, 1+k, H/8, W/8), or mean and log-variance."""
    vae.check_video(video)
    vae.latent_frames(group)
    parts = [vae.encode_chunk(video[:, :, start:stop])[0][:, :, (1 if start else 0):]
             for start, stop in temporal_groups(video.shape[2], group)]
    out = torch.cat(parts, dim=2)
    return out if moments else out[:, : vae.latent_channels]


@torch.no_grad()
def decode_groups(vae: AutoencoderKLODVAE, latents: Tensor, *, group: int = 33) -> Tensor:
    """Decode (B, c, 1+k, h, w) by the paper's temporal tiling, in the groups of `encode_groups`.

    Each is decoded together with the preceding latent, whose single frame is dropped."""
    parts = [vae.decode_chunk(latents[:, :, start:stop])[0][:, :, (1 if start else 0):]
             for start, stop in temporal_groups(latents.shape[2], vae.latent_frames(group))]
    return torch.cat(parts, dim=2)
