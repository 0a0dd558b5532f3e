"""Spatial tiling with blended overlaps; each tile has its own streaming state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.errors import UserError
from .conv import StreamState


@dataclass(frozen=True)
class Tiling:
    """Tiles of `height` x `width` pixels; neighbours share at least `overlap` pixels."""

    height: int
    width: int
    overlap: int

    def check(self, unit: int) -> None:
        """Raise UserError unless tiles and overlap are multiples of `unit` pixels and the overlap is at most half a
        tile (so that tiles always advance); it names the nearest that are."""
        height, width = (max(unit, unit * round(side / unit)) for side in (self.height, self.width))
        most = min(height, width) // 2 // unit * unit
        fit = Tiling(height, width, min(most, max(0, unit * round(self.overlap / unit))))
        if fit != self:
            raise UserError(f"tiles of {self.height}x{self.width} pixels that overlap by {self.overlap} do not fit the "
                            f"VAE: each must be a multiple of {unit}, and the overlap at most half a tile; the nearest "
                            f"is {fit.height}x{fit.width} with an overlap of {fit.overlap}")


def tile_spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return (start, stop) of the tiles that cover a side of length `size`. All have the length `tile` (or `size` if
    that is less); the last is moved back to end at `size`, so it may overlap by more than `overlap`."""
    if size <= tile:
        return [(0, size)]
    step = tile - overlap
    starts = [*range(0, size - tile, step), size - tile]
    return [(start, start + tile) for start in starts]


def blend_weights(spans: list[tuple[int, int]], like: Tensor) -> list[Tensor]:
    """Return the weight of each tile along a side, (stop - start,); at every position the weights sum to 1. In an
    overlap one tile fades linearly into the next."""
    size = spans[-1][1]
    ramps = []
    for i, (start, stop) in enumerate(spans):
        position = torch.arange(start, stop, device=like.device, dtype=torch.float32) + 0.5
        ramp = torch.ones_like(position)
        if i:
            ramp = torch.minimum(ramp, (position - start) / max(spans[i - 1][1] - start, 1e-6))
        if i + 1 < len(spans):
            ramp = torch.minimum(ramp, (stop - position) / max(stop - spans[i + 1][0], 1e-6))
        ramps.append(ramp)
    total = torch.zeros(size, device=like.device)
    for (start, stop), ramp in zip(spans, ramps, strict=True):
        total[start:stop] += ramp
    return [(ramp / total[start:stop]).to(like.dtype) for (start, stop), ramp in zip(spans, ramps, strict=True)]


def tiled(step: Callable[[Tensor, StreamState], tuple[Tensor, StreamState]], x: Tensor, state: StreamState,
          tiling: Tiling, pixels: int, scale: float) -> tuple[Tensor, StreamState]:
    """Run `step` on tiles of (B, C, T, H, W) and blend the outputs.

    Args:
        state: None, (), or what this function returned for the previous chunk: one state per tile.
        pixels: pixels per element of `x` and side (1 for a video, 8 for a latent).
        scale: output size / input size (1/8 for encoding, 8 for decoding).
    """
    rows = tile_spans(x.shape[3], tiling.height // pixels, tiling.overlap // pixels)
    columns = tile_spans(x.shape[4], tiling.width // pixels, tiling.overlap // pixels)
    if len(rows) == len(columns) == 1:
        return step(x, state)
    out_rows, out_columns = ([(round(a * scale), round(b * scale)) for a, b in side] for side in (rows, columns))
    row_weights, column_weights = blend_weights(out_rows, x), blend_weights(out_columns, x)
    states = state or (state,) * (len(rows) * len(columns))
    out: Tensor | None = None
    new_states: list[StreamState] = []
    for r, (top, bottom) in enumerate(rows):
        for c, (left, right) in enumerate(columns):
            tile, new_state = step(x[:, :, :, top:bottom, left:right], states[len(new_states)])
            new_states.append(new_state)
            if out is None:
                out = tile.new_zeros(*tile.shape[:3], out_rows[-1][1], out_columns[-1][1])
            weight = row_weights[r][:, None] * column_weights[c]
            out[:, :, :, slice(*out_rows[r]), slice(*out_columns[c])] += tile * weight
    assert out is not None
    return out, (None if state is None else tuple(new_states))
