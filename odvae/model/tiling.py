"""Spatial tiling with blended overlaps: plans are pure functions, and tiles carry streaming state of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.errors import UserError
from .conv import StreamState


@dataclass(frozen=True)
class Tiling:
    """Tiles of `height` x `width` pixels, neighbours sharing at least `overlap` pixels a side."""

    height: int
    width: int
    overlap: int

    def check(self, unit: int) -> None:
        """Raise UserError unless tiles and overlap are multiples of `unit` pixels and the overlap is at most half a
        tile (so that a plan always gets on), naming the nearest that are."""
        height, width = (max(unit, unit * round(side / unit)) for side in (self.height, self.width))
        most = min(height, width) // 2 // unit * unit
        fit = Tiling(height, width, min(most, max(0, unit * round(self.overlap / unit))))
        if fit != self:
            raise UserError(f"tiles of {self.height}x{self.width} pixels that share {self.overlap} do not fit the VAE: "
                            f"each must be a multiple of {unit}, and the overlap at most half a tile; the nearest is "
                            f"{fit.height}x{fit.width} sharing {fit.overlap}")


def cut(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, stop) of the tiles along one side of `size`, which they cover from end to end. All have the length `tile`
    (or `size` where that is less) and the last is moved back to end at `size`, so it may share more than `overlap`."""
    if size <= tile:
        return [(0, size)]
    step = tile - overlap
    starts = [*range(0, size - tile, step), size - tile]
    return [(start, start + tile) for start in starts]


def blend_weights(chunks: list[tuple[int, int]], like: Tensor) -> list[Tensor]:
    """How much each tile along a side counts at each of its places: (stop - start,) each, adding up to 1 everywhere.
    Over the part that two neighbours share, one fades linearly into the other."""
    size = chunks[-1][1]
    ramps = []
    for i, (start, stop) in enumerate(chunks):
        place = torch.arange(start, stop, device=like.device, dtype=torch.float32) + 0.5
        ramp = torch.ones_like(place)
        if i:
            ramp = torch.minimum(ramp, (place - start) / max(chunks[i - 1][1] - start, 1e-6))
        if i + 1 < len(chunks):
            ramp = torch.minimum(ramp, (stop - place) / max(stop - chunks[i + 1][0], 1e-6))
        ramps.append(ramp)
    total = torch.zeros(size, device=like.device)
    for (start, stop), ramp in zip(chunks, ramps, strict=True):
        total[start:stop] += ramp
    return [(ramp / total[start:stop]).to(like.dtype) for (start, stop), ramp in zip(chunks, ramps, strict=True)]


def tiled(step: Callable[[Tensor, StreamState], tuple[Tensor, StreamState]], x: Tensor, state: StreamState,
          tiling: Tiling, pixel: int, scale: float) -> tuple[Tensor, StreamState]:
    """Run `step` on tiles of (B, C, T, H, W) and blend what comes out.

    Args:
        state: None, (), or what this function returned for the chunk before: one state a tile.
        pixel: pixels a place of `x` (1 for a video, 8 for a latent).
        scale: places out a place in (1/8 for encoding, 8 for decoding).
    """
    rows = cut(x.shape[3], tiling.height // pixel, tiling.overlap // pixel)
    columns = cut(x.shape[4], tiling.width // pixel, tiling.overlap // pixel)
    if len(rows) == len(columns) == 1:
        return step(x, state)
    out_rows, out_columns = ([(round(a * scale), round(b * scale)) for a, b in side] for side in (rows, columns))
    row_weights, column_weights = blend_weights(out_rows, x), blend_weights(out_columns, x)
    states = state or (state,) * (len(rows) * len(columns))
    out: Tensor | None = None
    kept: list[StreamState] = []
    for r, (top, bottom) in enumerate(rows):
        for c, (left, right) in enumerate(columns):
            made, new_state = step(x[:, :, :, top:bottom, left:right], states[len(kept)])
            kept.append(new_state)
            if out is None:
                out = made.new_zeros(*made.shape[:3], out_rows[-1][1], out_columns[-1][1])
            weight = row_weights[r][:, None] * column_weights[c]
            out[:, :, :, slice(*out_rows[r]), slice(*out_columns[c])] += made * weight
    assert out is not None
    return out, (None if state is None else tuple(kept))
