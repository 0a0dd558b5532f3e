"""Exact streaming: a video of any length through the VAE in constant memory, with the values of the whole.

The model is causal, so all that a later piece needs of the earlier ones is the last inputs of each causal conv. That
state is what `encode_piece` and `decode_piece` take and give back.

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


def rechunk(pieces: Iterable[Tensor], first: int, step: int) -> Iterator[Tensor]:
    """Cut pieces (B, C, t, H, W) anew: `first` frames, then `step` at a time; the last may be shorter."""
    held: list[Tensor] = []
    count, wanted = 0, first
    for piece in pieces:
        while piece.shape[2]:
            take = min(wanted - count, piece.shape[2])
            held.append(piece[:, :, :take])
            piece, count = piece[:, :, take:], count + take
            if count == wanted:
                yield torch.cat(held, dim=2) if len(held) > 1 else held[0]
                held, count, wanted = [], 0, step
    if count:
        yield torch.cat(held, dim=2)


@torch.no_grad()  # and not inference mode, whose tensors cannot be trained on
def encode_stream(vae: AutoencoderKLODVAE, pieces: Iterable[Tensor], *, moments: bool = False,
                  frames: int | None = None) -> Iterator[Tensor]:
    """Encode a video that comes in pieces.

    Args:
        pieces: video pieces (B, 3, t, H, W) in [-1, 1], cut anywhere; 1 + 4k frames in all.
        moments: yield (B, 2c, t', H/8, W/8), mean and log-variance, instead of the mean (B, c, t', H/8, W/8).
        frames: how many frames go through the model at once, a multiple of 4: what bounds the memory. None: as
            `vae.piece_frames` says for the size.

    Yields:
        latent pieces as soon as their frames are there; joined they equal `vae.encode` of the whole.

    Raises:
        UserError: a piece of another shape; at the end, where the pieces did not come to 1 + 4k frames; the latents
            before are right.
    """
    ratio = vae.temporal_compression_ratio
    if frames is not None and (frames < ratio or frames % ratio):
        raise UserError(f"frames={frames} at once must be a multiple of {ratio}; the nearest is "
                        f"{max(ratio, ratio * round(frames / ratio))}")
    state, seen = (), 0
    pieces = iter(pieces)
    begin = next(pieces, None)
    if begin is None:
        return
    vae.check_pixels(begin)
    for piece in rechunk(chain([begin], pieces), 1, frames or vae.piece_frames(*begin.shape[3:])):
        vae.check_pixels(piece)
        seen += piece.shape[2]
        whole = piece.shape[2] if seen == 1 else piece.shape[2] // ratio * ratio  # only a last piece can fall short
        if whole:
            state = consume_state(state)
            out, state = vae.encode_piece(piece[:, :, :whole], state)
            yield out if moments else out[:, : vae.latent_channels]
    if seen:
        vae.latent_frames(seen)


@torch.no_grad()
def decode_stream(vae: AutoencoderKLODVAE, pieces: Iterable[Tensor], *,
                  frames: int | None = None) -> Iterator[Tensor]:
    """Decode raw latents that come in pieces.

    Args:
        pieces: latent pieces (B, c, t, h, w), cut anywhere. The iterable may be a sampler that is still at work.
        frames: how many latent frames go through the model at once: what bounds the memory. None: as
            `vae.piece_latents` says for the size.

    Yields:
        for each piece its frames (B, 3, t', 8h, 8w), in parts of at most `frames` latents, at once; joined they equal
        `vae.decode` of the whole.

    Raises:
        UserError: a piece of another shape.
        NonFiniteError: latents or frames that are not finite.
    """
    if frames is not None and frames < 1:
        raise UserError(f"frames={frames} latent frames at once must be at least 1")
    state: object = ()
    for piece in pieces:
        if piece.ndim == 5 and not piece.shape[2]:
            continue
        vae.check_latents(piece)
        if not is_finite(piece):
            raise NonFiniteError("the latents that are to be decoded hold NaN or infinity; encode the video again")
        for part in piece.split(frames or vae.piece_latents(*piece.shape[3:]), dim=2):
            state = consume_state(state)
            out, state = vae.decode_piece(part, state)
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
    parts = [vae.encode_piece(video[:, :, start:stop])[0][:, :, (1 if start else 0):]
             for start, stop in temporal_groups(video.shape[2], group)]
    out = torch.cat(parts, dim=2)
    return out if moments else out[:, : vae.latent_channels]


@torch.no_grad()
def decode_groups(vae: AutoencoderKLODVAE, latents: Tensor, *, group: int = 33) -> Tensor:
    """Decode (B, c, 1+k, h, w) by the paper's temporal tiling, in groups that line up with those of `encode_groups`.

    Each is decoded together with the latent before it, whose one frame is dropped."""
    parts = [vae.decode_piece(latents[:, :, start:stop])[0][:, :, (1 if start else 0):]
             for start, stop in temporal_groups(latents.shape[2], vae.latent_frames(group))]
    return torch.cat(parts, dim=2)
