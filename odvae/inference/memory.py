"""Estimate the memory of encoding and decoding in advance, and plan for what is free."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..model.autoencoder import AutoencoderKLODVAE
from ..model.conv import consume_state
from ..model.resample import Upsample
from ..model.tiling import Tiling, tile_spans
from ..utils.devices import free_accelerator_memory
from ..utils.errors import UserError
from ..utils.format import format_bytes
from ..utils.live_memory import LiveMemory
from ..utils.malloc import eager_malloc_trim

logger = logging.getLogger(__name__)

Direction = Literal["encode", "decode"]
TILES = (768, 512, 384, 256, 192, 128, 96, 64)  # sides in pixels that `auto_plan` tries if whole frames do not fit
SPARE = 0.8  # share of the free memory that a plan may use: a process was measured to use up to 1.06 of the estimate
# The share above which freed memory is returned at once; if kept, a process was measured to use up to 2.2 times it.
TRIM_SHARE = 0.4 * SPARE


class _LiveMemoryWithScratch(LiveMemory):
    """Also count what oneDNN allocates for a conv: the weight twice, channels last and in its own layout (measured)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "conv" in str(func):
            self.peak = max(self.peak, self.live + 2 * args[1].untyped_storage().nbytes())
        return out


def memory_estimate(vae: AutoencoderKLODVAE, direction: Direction, height: int, width: int, *,
                    frames: int | None = None, batch: int = 1, tiling: Tiling | None = None) -> int:
    """Estimate the peak memory in bytes of a stream of any length: live tensors, including the chunk and its result but
    not the weights, and a conv's scratch. A process grows by this, within 15 % from 64 MiB upwards on a CPU, if freed
    memory is returned at once (`utils.malloc`, as `StreamPlan.applied` does where it matters). With a VAE that is not
    causal, of a group of the paper's temporal tiling: `frames` and one more.

    Nothing is computed: the stream runs on fake tensors, about a second and once for each size.

    Args:
        height, width: of the video in pixels, multiples of 8.
        frames: video frames per chunk, a multiple of 4; None: `vae.chunk_frames`.
        tiling: spatial tiles; None: those of the VAE if its tiling is enabled.

    Raises:
        UserError: sizes or tiles that do not fit the VAE.
    """
    vae.check_size(height, width)
    _check_batch(batch)
    tiling = tiling or (vae.tiling if vae.use_tiling else None)
    tile = (height, width)
    if tiling is not None:
        tiling.check(vae.spatial_compression_ratio)
        tile = min(height, tiling.height), min(width, tiling.width)
    frames = vae.chunk_frames(*tile) if frames is None else frames
    vae.check_chunk_frames(frames)
    fused = any(isinstance(module, Upsample) and module.fused for module in vae.modules())
    config = json.dumps({key: value for key, value in vae.config.items() if not key.startswith("_")}, sort_keys=True)
    cls: Any = type(vae)
    peak, state = _one_tile(cls, config, vae.dtype, fused, direction, batch, *tile, frames)
    if tiling is None or tile == (height, width):
        return peak
    # Beside the current tile memory holds the states of the others, the whole chunk and the whole result.
    tiles = prod(len(tile_spans(side, length, tiling.overlap))
                 for side, length in zip((height, width), tile, strict=True))
    latents = vae.latent_channels * (2 if direction == "encode" else 1) * frames // vae.temporal_compression_ratio
    values = frames * vae.config.in_channels + latents / vae.spatial_compression_ratio**2
    return peak + (tiles - 1) * state + int(batch * height * width * values) * vae.dtype.itemsize


@lru_cache(maxsize=256)
@torch.no_grad()
def _one_tile(cls: Any, config: str, dtype: torch.dtype, fused: bool, direction: Direction, batch: int, height: int,
              width: int, frames: int) -> tuple[int, int]:
    """Return the bytes of a stream without tiles at its peak, and of its state."""
    with FakeTensorMode(), _default_dtype(dtype):
        vae = cls.from_config(json.loads(config)).eval()
        if fused:
            vae.fuse()
        ratio = vae.temporal_compression_ratio
        step = vae.encode_chunk if direction == "encode" else vae.decode_chunk
        scale = 1 if direction == "encode" else vae.spatial_compression_ratio
        channels = vae.config.in_channels if direction == "encode" else vae.latent_channels
        if not vae.causal:
            lengths: tuple[int, ...] = (1 + (frames if direction == "encode" else frames // ratio),)
        else:
            lengths = (1, frames, frames) if direction == "encode" else (frames // ratio,) * 3
        with _LiveMemoryWithScratch() as memory:
            state: Any = () if vae.causal else None
            for length in lengths:
                x = torch.empty(batch, channels, length, height // scale, width // scale, dtype=dtype)
                state = consume_state(state)
                output, state = step(x, state)
                del output, x
        return memory.peak, memory.live


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _upper_bound(vae: AutoencoderKLODVAE, height: int, width: int, frames: int, batch: int) -> int:
    """Return bytes that no stream exceeds, without a trial: what a layer holds and keeps for the next chunk, as if all
    layers were as large as the largest."""
    if not isinstance(vae, AutoencoderKLODVAE):  # Wan's
        return sys.maxsize
    widths, layers = vae.config.block_out_channels, vae.config.layers_per_block
    pixels = height * width // vae.config.patch_size**2
    widest = max(max(widths[level:level + 2]) * pixels // 4**level for level in range(len(widths)))
    scratch = 2 * max(p.nbytes for p in vae.parameters())
    return 12 * layers * batch * (frames + 2) * widest * vae.dtype.itemsize + scratch


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise UserError(f"a batch of {batch} videos is too small; the least is 1")


@dataclass(frozen=True)
class StreamPlan:
    """How a stream is split: into chunks of `frames`, and in space by `tiling` if whole frames do not fit (None: as the
    VAE is set). `trim_heap`: it needs so much of the free memory that freed memory is returned at once."""

    frames: int
    tiling: Tiling | None
    trim_heap: bool = field(default=False, compare=False)

    @contextmanager
    def applied(self, vae: AutoencoderKLODVAE) -> Iterator[None]:
        """Make `vae` use the plan's tiles inside the block, as `enable_tiling` does; pass `frames` to the streams."""
        before = vae.use_tiling, vae.tiling
        with ExitStack() as stack:
            if self.trim_heap and vae.device.type == "cpu":
                stack.enter_context(eager_malloc_trim())
            if self.tiling is not None:
                vae.enable_tiling(self.tiling.height, self.tiling.width, overlap=self.tiling.overlap)
            try:
                yield
            finally:
                vae.use_tiling, vae.tiling = before


def auto_plan(vae: AutoencoderKLODVAE, direction: Direction, height: int, width: int, *, batch: int = 1,
              free: int | None = None, frames: int | None = None, tiles: bool = True,
              tiling: Tiling | None = None) -> StreamPlan:
    """Return the largest plan that fits `free` bytes (None: what is free on the VAE's device): whole frames in large,
    then small chunks, which are exact (with a VAE that is not causal they are not, and stay as large as they are); then
    tiles, large ones first, which are not, and are logged.

    Args:
        frames: maximum per chunk, a multiple of 4; None: `vae.chunk_frames`.
        tiles: whether tiles may be used.
        tiling: use these tiles in any case.

    Raises:
        UserError: nothing fits.
    """
    vae.check_size(height, width)
    _check_batch(batch)
    free = free_memory(vae.device) if free is None else free
    ratio, unit = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    count = vae.chunk_frames(height, width) if frames is None else frames
    vae.check_chunk_frames(count)
    if tiling is None and not vae.use_tiling and _upper_bound(vae, height, width, count, batch) <= TRIM_SHARE * free:
        return StreamPlan(count, None)
    plans = []
    while count >= ratio:
        plans.append(StreamPlan(count // ratio * ratio, tiling))
        count = count // 2 if vae.causal else 0
    if tiles and tiling is None:
        plans += [
            StreamPlan(ratio if vae.causal else plans[0].frames,
                       Tiling(min(tile, height), min(tile, width), min(tile, height, width) // 4 // unit * unit))
            for tile in TILES
            if tile < max(height, width) and tile % unit == 0
        ]
    need = least = 0
    for plan in plans:
        need = memory_estimate(vae, direction, height, width, frames=plan.frames, batch=batch, tiling=plan.tiling)
        if need <= SPARE * free:
            if plan.tiling is not None and tiling is None:
                logger.warning("whole frames of %dx%d do not fit %s of memory; to %s, blended tiles of %dx%d are used, "
                               "which is not exact", height, width, format_bytes(free), direction,
                               plan.tiling.height, plan.tiling.width)
            return StreamPlan(plan.frames, plan.tiling, trim_heap=need > TRIM_SHARE * free)
        least = min(least or need, need)
    raise UserError(f"to {direction} {batch} x {height}x{width}, at least {format_bytes(least / SPARE)} of memory must "
                    f"be free, and {format_bytes(free)} are; use a smaller size or batch, "
                    f"{'' if tiles else 'allow tiles, '}or free some memory")


@dataclass(frozen=True)
class MemoryOptions:
    """How a user limits memory; by default the largest plan that fits what is free."""

    free: int | None = None  # bytes to plan for; None: what is free
    frames: int | None = None  # maximum per chunk
    tile: tuple[int, int] | None = None  # (height, width) in pixels: use these tiles and no others
    tiles: bool = True  # whether tiles may be used

    def plan(self, vae: AutoencoderKLODVAE, direction: Direction, height: int, width: int,
             batch: int = 1) -> StreamPlan:
        """Return the plan for these options. UserError as `auto_plan`, and for tiles that do not fit the VAE."""
        if self.tile is None:
            return auto_plan(vae, direction, height, width, batch=batch, free=self.free, frames=self.frames,
                             tiles=self.tiles)
        unit = vae.spatial_compression_ratio
        tiling = Tiling(*self.tile, overlap=min(self.tile) // 4 // unit * unit)
        tiling.check(unit)
        # By default not the largest chunk that fits: it would use up what tiles save.
        frames = vae.chunk_frames(height, width) if self.frames is None else self.frames
        vae.check_chunk_frames(frames)
        return StreamPlan(frames, tiling)

    def resume(self, kept: StreamPlan, vae: AutoencoderKLODVAE, direction: Direction, height: int,
               width: int) -> StreamPlan:
        """Return the plan to resume what was started with the plan `kept`: its tiles, and chunks that are not larger.

        Raises:
            UserError: other tiles are requested, or its tiles do not fit the memory; the message says so.
        """
        before = "whole frames" if kept.tiling is None else f"tiles of {kept.tiling.height}x{kept.tiling.width}"
        if self.tile is not None:
            plan = self.plan(vae, direction, height, width)
            if plan.tiling != kept.tiling:
                raise UserError(f"it was encoded in {before}, not in tiles of {self.tile[0]}x{self.tile[1]}")
            return replace(plan, frames=min(plan.frames, kept.frames))
        if kept.tiling is not None and not self.tiles:
            raise UserError(f"it was encoded in {before}, not in whole frames")
        frames = min(kept.frames, self.frames or kept.frames)
        try:
            return auto_plan(vae, direction, height, width, free=self.free, frames=frames, tiles=False,
                             tiling=kept.tiling)
        except UserError as error:
            raise UserError(f"it was encoded in {before}, which no longer fit the memory") from error


AUTO = MemoryOptions()


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device now; in a container, at most what its limit leaves."""
    free, group = int(psutil.virtual_memory().available), Path("/sys/fs/cgroup")
    if device.type != "cpu":
        return free_accelerator_memory(device, free)
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return free if limit == "max" else min(free, int(limit) - int(used) + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no cgroup limits
        return free
