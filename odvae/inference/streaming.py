"""Exact streaming: a video of any length through the VAE in constant memory, with the values of the whole.

The model is causal, so all that a later chunk needs of the earlier ones is the last inputs of each causal conv. That
state is what `encode_chunk` and `decode_chunk` take and give back.

A model that is not causal (the public code's) has no such state. For it there is the paper's temporal tiling (section
3.4): groups that share one frame, each by itself, at a loss of quality; `benchmarks/temporal_tiling.py` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.conv import CausalConv3d, consume_state
from ..utils.errors import NonFiniteError, UserError
from ..utils.finite import check_finite, is_finite

if TYPE_CHECKING:
    from ..model import AutoencoderKLODVAE


def rechunk(chunks: Iterable[Tensor], first: int, step: int) -> Iterator[Tensor]:
    """Cut chunks (B, C, t, H, W) anew: `first` frames, then `step` at a time; the last may be shorter."""
    held: list[Tensor] = []
    count, wanted = 0, first
    for chunk in chunks:
        while chunk.shape[2]:
            take = min(wanted - count, chunk.shape[2])
            held.append(chunk[:, :, :take])
            chunk, count = chunk[:, :, take:], count + take
            if count == wanted:
                yield torch.cat(held, dim=2) if len(held) > 1 else held[0]
                held, count, wanted = [], 0, step
    if count:
        yield torch.cat(held, dim=2)


@torch.no_grad()  # and not inference mode, whose tensors cannot be trained on
def encode_stream(vae: AutoencoderKLODVAE, chunks: Iterable[Tensor], *, moments: bool = False,
                  frames: int | None = None) -> Iterator[Tensor]:
    """Encode a video that comes in chunks.

    Args:
        chunks: video chunks (B, 3, t, H, W) in [-1, 1], cut anywhere; 1 + 4k frames in all.
        moments: yield (B, 2c, t', H/8, W/8), mean and log-variance, instead of the mean (B, c, t', H/8, W/8).
        frames: how many frames go through the model at once, a multiple of 4: what bounds the memory. None: as
            `vae.chunk_frames` says for the size.

    Yields:
        latent chunks as soon as their frames are there; joined they equal `vae.encode` of the whole.

    Raises:
        UserError: a chunk of another shape; at the end, where the chunks did not come to 1 + 4k frames; the latents
            before are right.
    """
    ratio = vae.temporal_compression_ratio
    if frames is not None and (frames < ratio or frames % ratio):
        raise UserError(f"frames={frames} at once must be a multiple of {ratio}; the nearest is "
                        f"{max(ratio, ratio * round(frames / ratio))}")
    state, seen = (), 0
    chunks = iter(chunks)
    begin = next(chunks, None)
    if begin is None:
        return
    vae.check_pixels(begin)
    for chunk in rechunk(chain([begin], chunks), 1, frames or vae.chunk_frames(*begin.shape[3:])):
        vae.check_pixels(chunk)
        seen += chunk.shape[2]
        whole = chunk.shape[2] if seen == 1 else chunk.shape[2] // ratio * ratio  # only a last chunk can fall short
        if whole:
            state = consume_state(state)
            out, state = vae.encode_chunk(chunk[:, :, :whole], state)
            yield out if moments else out[:, : vae.latent_channels]
    if seen:
        vae.latent_frames(seen)


@torch.no_grad()
def decode_stream(vae: AutoencoderKLODVAE, chunks: Iterable[Tensor], *,
                  frames: int | None = None) -> Iterator[Tensor]:
    """Decode raw latents that come in chunks.

    Args:
        chunks: latent chunks (B, c, t, h, w), cut anywhere. The iterable may be a sampler that is still at work.
        frames: how many latent frames go through the model at once: what bounds the memory. None: as
            `vae.chunk_latents` says for the size.

    Yields:
        for each chunk its frames (B, 3, t', 8h, 8w), in parts of at most `frames` latents, at once; joined they equal
        `vae.decode` of the whole.

    Raises:
        UserError: a chunk of another shape.
        NonFiniteError: latents or frames that are not finite.
    """
    if frames is not None and frames < 1:
        raise UserError(f"frames={frames} latent frames at once must be at least 1")
    state: object = ()
    for chunk in chunks:
        if chunk.ndim == 5 and not chunk.shape[2]:
            continue
        vae.check_latents(chunk)
        if not is_finite(chunk):
            raise NonFiniteError("the latents that are to be decoded hold NaN or infinity; encode the video again")
        for part in chunk.split(frames or vae.chunk_latents(*chunk.shape[3:]), dim=2):
            state = consume_state(state)
            out, state = vae.decode_chunk(part, state)
            check_finite(out, "the VAE's decoder", vae)
            yield out


def encoder_reach(vae: AutoencoderKLODVAE) -> int:
    """How many frames before its own a latent depends on, at most: the taps of all convs, each at the stride of the
    latents. A stream that begins so many frames earlier, anywhere in a video, has the same state from there on."""
    taps = sum(module.time_padding for module in vae.encoder.modules() if isinstance(module, CausalConv3d))
    return int(taps * vae.temporal_compression_ratio)


def temporal_groups(length: int, group: int) -> list[tuple[int, int]]:
    """(start, stop) of groups of `group` frames, neighbours sharing one, the last as long as what is left.
    (9, 5) -> [(0, 5), (4, 9)]. In latents, groups of 1 + m line up with groups of 1 + 4m frames."""
    if group < 2:
        raise UserError(f"a group of {group} has no frame beside the shared one; the least is 2")
    return [(start, min(start + group, length)) for start in range(0, max(1, length - 1), group - 1)]


@torch.no_grad()
def encode_groups(vae: AutoencoderKLODVAE, video: Tensor, *, group: int = 33, moments: bool = False) -> Tensor:
    """Encode (B, 3, 1+4k, H, W) by the paper's temporal tiling: groups of `group` = 1 + 4m frames, of every group but
    the first the first latent is dropped. Returns the mean (B, c, 1+k, H/8, W/8), or mean and log-variance."""
    vae.check_video(video)
    vae.latent_frames(group)
    parts = [vae.encode_chunk(video[:, :, start:stop])[0][:, :, (1 if start else 0):]
             for start, stop in temporal_groups(video.shape[2], group)]
    out = torch.cat(parts, dim=2)
    return out if moments else out[:, : vae.latent_channels]


@torch.no_grad()
def decode_groups(vae: AutoencoderKLODVAE, latents: Tensor, *, group: int = 33) -> Tensor:
    """Decode (B, c, 1+k, h, w) by the paper's temporal tiling, in groups that line up with those of `encode_groups`.

    Each is decoded together with the latent before it, whose one frame is dropped."""
    parts = [vae.decode_chunk(latents[:, :, start:stop])[0][:, :, (1 if start else 0):]
             for start, stop in temporal_groups(latents.shape[2], vae.latent_frames(group))]
    return torch.cat(parts, dim=2)
