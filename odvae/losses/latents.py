"""Terms that make latents easy to learn for a diffusion model, each with a weight of its own; all are off by default.

What a generator learns fast matters more than decibels: neighbouring latents that resemble each other, information that
is spread over them, latents that tell what comes next, and latents that scale with the picture.

Below, x is a video (B, 3, T, H, W) in [-1, 1], E(x) its mean latents and z a sample of them, both (B, c, t, h, w), and
D the decoder. rec(x, y) is the reconstruction error of the run, `pixel_error`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Generator, Tensor

from .terms import TermConfig

EPSILON = 1e-6

Encode = Callable[[Tensor], Tensor]  # x -> E(x)
Decode = Callable[[Tensor], Tensor]  # z -> D(z)
PixelError = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> rec(x, y)


class LocalCorrelationConfig(TermConfig):
    # The defaults are those of SSVAE's public config.
    window: tuple[int, int, int] = (2, 2, 2)  # latent frames, rows and columns
    target: float = Field(0.75, ge=-1, le=1)  # no more correlation is asked for


class LatentMaskingConfig(TermConfig):
    ratio: tuple[float, float] = (0.0, 0.5)  # share of a sample's positions that are masked, drawn uniformly


class FutureDroppingConfig(TermConfig):
    motion: float = Field(1.0, ge=0)  # weight of the differences between frames, relative to the frames


class EquivarianceConfig(TermConfig):
    smallest: float = Field(0.5, gt=0, le=1)  # scale of a side, drawn uniformly from here to 1


def local_correlation(latents: Tensor, window: tuple[int, int, int]) -> Tensor:
    """Return the mean Pearson correlation of two latent positions of one window, in [-1, 1], as vectors over channels
    (SSVAE, arXiv 2512.05394, local correlation regularization).

    The first latent frame, which alone stands for a single frame, has windows of its own. With unit vectors u, the mean
    over the pairs of a window of N positions is

        (|sum u|^2 - sum |u|^2) / (N (N - 1)).

    What is left over at the borders belongs to no window.
    """
    centred = latents.float() - latents.float().mean(dim=1, keepdim=True)
    unit = centred / (centred.norm(dim=1, keepdim=True) + EPSILON)
    correlations, frames = [], []
    for part, time in ((unit[:, :, :1], 1), (unit[:, :, 1:], min(window[0], unit.shape[2] - 1))):
        if part.shape[2] and (windows := _windows(part, (time, *window[1:]))) is not None:
            n = windows.shape[-1]
            pairs = windows.sum(-1).square().sum(1) - windows.square().sum((1, -1))
            correlations.append((pairs / (n * (n - 1))).mean())
            frames.append(part.shape[2])
    if not correlations:
        return latents.new_zeros((), dtype=torch.float32)
    return torch.stack([c * n for c, n in zip(correlations, frames, strict=True)]).sum() / sum(frames)


def _windows(x: Tensor, window: tuple[int, int, int]) -> Tensor | None:
    """(B, c, t, h, w) -> (B, c, windows, N); None if a window has no two positions or none fits."""
    sides = [min(size, side) for size, side in zip(window, x.shape[2:], strict=True)]
    if sides[0] * sides[1] * sides[2] < 2:
        return None
    t, h, w = (length // side * side for length, side in zip(x.shape[2:], sides, strict=True))
    return rearrange(x[:, :, :t, :h, :w], "b c (t i) (h j) (w k) -> b c (t h w) (i j k)", i=sides[0], j=sides[1],
                     k=sides[2])


def position_mask(latents: Tensor, ratio: tuple[float, float], draw: Generator) -> Tensor:
    """Draw which positions are kept (B, 1, t, h, w): all channels of a position together, each with the probability of
    its sample, 1 - r with r uniform in `ratio`."""
    b, _, t, h, w = latents.shape
    low, high = ratio
    share = low + (high - low) * torch.rand((b, 1, 1, 1, 1), generator=draw)
    return (torch.rand((b, 1, t, h, w), generator=draw) >= share).to(latents.device)


def past_mask(latents: Tensor, draw: Generator) -> Tensor:
    """Draw how many latent frames of each sample are kept, at least the first and not the last (B, 1, t, 1, 1)."""
    b, _, t, _, _ = latents.shape
    kept = torch.randint(1, t, (b, 1, 1, 1, 1), generator=draw)
    return (torch.arange(t).view(1, 1, t, 1, 1) < kept).to(latents.device)


def box_matrix(size: int, smaller: int) -> Tensor:
    """Return (smaller, size): the mean over `smaller` equal intervals of a side of `size` pixels. As a product, scaling
    has the same value on every device and a deterministic gradient."""
    edges = torch.arange(smaller + 1, dtype=torch.float64) * (size / smaller)
    pixels = torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (overlap.clamp_min(0) * (smaller / size)).float()


def scale(x: Tensor, height: int, width: int) -> Tensor:
    """Scale (..., H, W) down to height x width by the mean over each new pixel's area, in float32."""
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (box_matrix(*sides).to(x.device) for sides in ((x.shape[-2], height), (x.shape[-1], width)))
        return rows @ x.float() @ columns.T


def draw_size(latents: Tensor, smallest: float, draw: Generator) -> tuple[int, int]:
    """Draw a smaller size in latents; height and width are drawn by themselves, so that the shape changes too. Python's
    generator draws, with the seed of `draw`: a fake tensor, as in an estimate of the memory, has no value."""
    rng = Random(draw.initial_seed())
    sides = [(max(1, round(smallest * side)), max(1, side - 1)) for side in latents.shape[3:]]
    height, width = (rng.randint(min(low, high), high) for low, high in sides)
    return height, width


def latent_equivariance(video: Tensor, latents: Tensor, size: tuple[int, int], encode: Encode) -> Tensor:
    """Return |s E(x) - E(s x)|^2 / |s E(x) - mean|^2, for a scaling s to `size` in latents: 0 for an encoder whose
    latents scale with the picture.

    EQ-VAE (arXiv 2502.09509) calls |s E(x) - E(s x)|^2 its explicit form, which latents that shrink also lower. The
    division by their own variance, per channel, is ours: it makes the term independent of their scale.
    """
    ratio = video.shape[-1] // latents.shape[-1]
    scaled = scale(latents, *size)
    error = scaled - encode(scale(video, size[0] * ratio, size[1] * ratio)).float()
    return error.square().mean() / (scaled.var(dim=(0, 2, 3, 4), correction=0).mean() + EPSILON)


def decoder_equivariance(video: Tensor, latents: Tensor, size: tuple[int, int], decode: Decode,
                         error: PixelError) -> Tensor:
    """Return rec(s x, D(s z)) for a scaling s to `size` in latents: what scaled latents decode to is the scaled video
    (EQ-VAE, arXiv 2502.09509, its implicit form, there with rotations too)."""
    ratio = video.shape[-1] // latents.shape[-1]
    return error(scale(video, size[0] * ratio, size[1] * ratio), decode(scale(latents, *size)))


def future_error(video: Tensor, latents: Tensor, mask: Tensor, motion: float, decode: Decode,
                 error: PixelError) -> Tensor:
    """Return rec(x, y) + motion |dx - dy|, y = D(mask z) being decoded from the past alone and dx the differences of
    consecutive frames (PV-VAE, arXiv 2605.02134: frames are rebuilt and the ones to come predicted; the differences
    keep the decoder from repeating the last frame). In a causal VAE, E of the past is the past of E(x).

    Dropped latents are 0, the mean of the prior; what the paper pads with we could not look up.
    """
    decoded = decode(latents * mask)
    moved, shown = (x.float().diff(dim=2) for x in (video, decoded))
    return error(video, decoded) + motion * (moved - shown).abs().mean()


# The terms by name: of `LossConfig`, in a log, and of their draws.
LATENT_TERMS = ("local_correlation", "latent_masking", "future_dropping", "latent_equivariance", "decoder_equivariance")


def latent_losses(config: Mapping[str, TermConfig], video: Tensor, mean: Tensor, sample: Tensor, *, encode: Encode,
                  decode: Decode, error: PixelError, draw: Callable[[str], Generator]) -> dict[str, Tensor]:
    """Return the terms in `config`, by name and without their weight.

    Args:
        config: by name, those of `LATENT_TERMS` that are in use.
        mean, sample: E(x) and z (B, c, t, h, w).
        draw: the generator of a term, a function of seed, step and micro-batch.
    """
    losses: dict[str, Tensor] = {}
    for name, term in config.items():
        if isinstance(term, LocalCorrelationConfig):
            losses[name] = F.relu(term.target - local_correlation(mean, term.window))
        elif isinstance(term, LatentMaskingConfig):  # SSVAE, arXiv 2512.05394, latent masked reconstruction
            losses[name] = error(video, decode(sample * position_mask(sample, term.ratio, draw(name))))
        elif isinstance(term, FutureDroppingConfig):
            losses[name] = sample.new_zeros((), dtype=torch.float32) if sample.shape[2] == 1 else future_error(
                video, sample, past_mask(sample, draw(name)), term.motion, decode, error)
        elif isinstance(term, EquivarianceConfig) and name == "latent_equivariance":
            losses[name] = latent_equivariance(video, mean, draw_size(mean, term.smallest, draw(name)), encode)
        elif isinstance(term, EquivarianceConfig):
            losses[name] = decoder_equivariance(video, sample, draw_size(sample, term.smallest, draw(name)), decode,
                                                error)
    return losses
