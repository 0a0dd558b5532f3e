"""Estimate the memory of encoding and decoding beforehand, and plan for what is free."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.autoencoder import AutoencoderKLODVAE
from ..model.conv import consume_state
from ..model.resample import Upsample
from ..model.tiling import Tiling, tile_spans
from ..utils.errors import UserError
from ..utils.format import format_bytes
from ..utils.malloc import eager_malloc_trim

logger = logging.getLogger(__name__)

Direction = Literal["encode", "decode"]
TILES = (768, 512, 384, 256, 192, 128, 96, 64)  # pixels a side that `auto_plan` tries, when whole frames do not fit
SPARE = 0.8  # share of the free memory that a plan may take: a process was measured to take up to 1.06 of the estimate
LEAN = 0.4 * SPARE  # the share above which freed memory is given back at once; kept, it was measured to be up to 2.2


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside the block make, while they live. `peak` is the most at one
    time. What a kernel takes for itself while it runs (workspaces) is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _gone(self, size: int) -> None:
        self.live -= size


class _WithScratch(LiveMemory):
    """Also what oneDNN takes for a conv: the weight twice, channels last and in a layout of its own (measured)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "conv" in str(func):
            self.peak = max(self.peak, self.live + 2 * args[1].untyped_storage().nbytes())
        return out


def memory_estimate(vae: AutoencoderKLODVAE, part: Direction, height: int, width: int, *, frames: int | None = None,
                    batch: int = 1, tiling: Tiling | None = None) -> int:
    """Bytes at the peak of a stream of any length, the chunk and its result included, the weights not: tensors alive,
    and a conv's scratch. A process grows by that where freed memory is given back (`utils.malloc`, as
    `StreamPlan.applied` does where it matters), to 15 % from 64 MiB upwards on a CPU.

    Nothing is computed: the stream runs, about a second and once for each size, on tensors that have no values.

    Args:
        height, width: of the video in pixels, multiples of 8.
        frames: video frames at once, a multiple of 4; None: `vae.chunk_frames`.
        tiling: spatial tiles; None: those of the VAE where its tiling is enabled.

    Raises:
        UserError: sizes or tiles that do not fit the VAE; a model that is not causal, which cannot be streamed.
    """
    vae.check_size(height, width)
    _check_batch(batch)
    vae._check_stream(())
    tiling = tiling or (vae.tiling if vae.use_tiling else None)
    tile = (height, width)
    if tiling is not None:
        tiling.check(vae.spatial_compression_ratio)
        tile = min(height, tiling.height), min(width, tiling.width)
    frames = vae.chunk_frames(*tile) if frames is None else frames
    check_frames(vae, frames)
    fused = any(isinstance(module, Upsample) and module.fused for module in vae.modules())
    config = json.dumps({key: value for key, value in vae.config.items() if not key.startswith("_")}, sort_keys=True)
    peak, state = _one_tile(config, vae.dtype, fused, part, batch, *tile, frames)
    if tiling is None or tile == (height, width):
        return peak
    # Beside the tile at work lie the states of the others, the whole chunk and the whole result.
    tiles = prod(len(tile_spans(side, one, tiling.overlap)) for side, one in ((height, tile[0]), (width, tile[1])))
    latents = vae.latent_channels * (2 if part == "encode" else 1) * frames // vae.temporal_compression_ratio
    values = frames * vae.config.in_channels + latents / vae.spatial_compression_ratio**2
    return peak + (tiles - 1) * state + int(batch * height * width * values) * vae.dtype.itemsize


@lru_cache(maxsize=256)
@torch.no_grad()
def _one_tile(config: str, dtype: torch.dtype, fused: bool, part: Direction, batch: int, height: int, width: int,
              frames: int) -> tuple[int, int]:
    """Bytes at the peak of a stream without tiles, and of its state."""
    with FakeTensorMode(), _default_dtype(dtype):
        vae = AutoencoderKLODVAE.from_config(json.loads(config)).eval()
        if fused:
            vae.fuse()
        ratio = vae.temporal_compression_ratio
        step = vae.encode_chunk if part == "encode" else vae.decode_chunk
        scale = 1 if part == "encode" else vae.spatial_compression_ratio
        channels = vae.config.in_channels if part == "encode" else vae.latent_channels
        lengths = (1, frames, frames) if part == "encode" else (frames // ratio,) * 3
        with _WithScratch() as memory:
            state: Any = ()
            for length in lengths:
                x = torch.empty(batch, channels, length, height // scale, width // scale, dtype=dtype)
                state = consume_state(state)
                made, state = step(x, state)
                del made, x
        return memory.peak, memory.live


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _bound(vae: AutoencoderKLODVAE, height: int, width: int, frames: int, batch: int) -> int:
    """Bytes that no stream exceeds, at once: by what a layer holds and leaves for the next chunk, were all of them
    as large as the largest."""
    widths, layers = vae.config.block_out_channels, vae.config.layers_per_block
    pixels = height * width // vae.config.patch_size**2
    widest = max(max(widths[level:level + 2]) * pixels // 4**level for level in range(len(widths)))
    scratch = 2 * max(p.nbytes for p in vae.parameters())
    return 12 * layers * batch * (frames + 2) * widest * vae.dtype.itemsize + scratch


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise UserError(f"batch={batch} videos at once must be at least 1")


def check_frames(vae: AutoencoderKLODVAE, frames: int) -> None:
    """Raise UserError unless so many video frames at once are whole latents, naming the nearest that are."""
    ratio = vae.temporal_compression_ratio
    if frames < ratio or frames % ratio:
        raise UserError(f"frames={frames} at once must be a multiple of {ratio}; the nearest is "
                        f"{max(ratio, ratio * round(frames / ratio))}")


@dataclass(frozen=True)
class StreamPlan:
    """How a stream is cut: `frames` at once, and in space by `tiling` where frames do not fit whole (None: as the VAE
    is). `lean`: it takes so much of what is free that freed memory is to be given back at once."""

    frames: int
    tiling: Tiling | None
    lean: bool = field(default=False, compare=False)

    @contextmanager
    def applied(self, vae: AutoencoderKLODVAE) -> Iterator[None]:
        """Inside the block, `vae` works in the plan's tiles, as by `enable_tiling`; `frames` is for the streams."""
        before = vae.use_tiling, vae.tiling
        with ExitStack() as stack:
            if self.lean and vae.device.type == "cpu":
                stack.enter_context(eager_malloc_trim())
            if self.tiling is not None:
                vae.enable_tiling(self.tiling.height, self.tiling.width, self.tiling.overlap)
            try:
                yield
            finally:
                vae.use_tiling, vae.tiling = before


def auto_plan(vae: AutoencoderKLODVAE, part: Direction, height: int, width: int, *, batch: int = 1,
              free: int | None = None, frames: int | None = None, tiles: bool = True,
              tiling: Tiling | None = None) -> StreamPlan:
    """The largest plan that fits `free` bytes (None: what the VAE's device has free): whole frames, many at once, then
    few, which changes no value; then tiles, large ones first, which are not exact, and logged.

    Args:
        frames: at most so many at once, a multiple of 4; None: `vae.chunk_frames`.
        tiles: whether tiles may be taken.
        tiling: these are, in any case.

    Raises:
        UserError: nothing fits.
    """
    vae.check_size(height, width)
    _check_batch(batch)
    free = free_memory(vae.device) if free is None else free
    ratio, unit = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    most, at_once = vae.chunk_frames(height, width) if frames is None else frames, []
    check_frames(vae, most)
    if tiling is None and not vae.use_tiling and _bound(vae, height, width, most, batch) <= LEAN * free:
        return StreamPlan(most, None)
    while most >= ratio:
        at_once.append(most // ratio * ratio)
        most //= 2
    plans = [StreamPlan(count, tiling) for count in at_once]
    if tiles and tiling is None:
        plans += [
            StreamPlan(ratio, Tiling(min(tile, height), min(tile, width), min(tile, height, width) // 4 // unit * unit))
            for tile in TILES
            if tile < max(height, width) and tile % unit == 0
        ]
    need = least = 0
    for plan in plans:
        need = memory_estimate(vae, part, height, width, frames=plan.frames, batch=batch, tiling=plan.tiling)
        if need <= SPARE * free:
            if plan.tiling is not None and tiling is None:
                logger.warning("%dx%d does not fit %s of memory whole: to %s it in tiles of %dx%d, blended where "
                               "they overlap, which is not exact", height, width, format_bytes(free), part,
                               plan.tiling.height, plan.tiling.width)
            return StreamPlan(plan.frames, plan.tiling, lean=need > LEAN * free)
        least = min(least or need, need)
    raise UserError(f"to {part} {batch} x {height}x{width} takes at least {format_bytes(least / SPARE)} free, and "
                    f"there are {format_bytes(free)}; take a smaller size or batch, "
                    f"{'' if tiles else 'allow tiles, '}or free some memory")


@dataclass(frozen=True)
class MemoryOptions:
    """What a user wants of memory; by default the largest plan that fits what is free."""

    free: int | None = None  # bytes to plan for; None: what is free
    frames: int | None = None  # at most so many at once
    tile: tuple[int, int] | None = None  # pixels, (height, width): these tiles and no others
    tiles: bool = True  # whether tiles may be taken

    def plan(self, vae: AutoencoderKLODVAE, part: Direction, height: int, width: int, batch: int = 1) -> StreamPlan:
        """Raises UserError as `auto_plan`, and for tiles that do not fit the VAE."""
        if self.tile is None:
            return auto_plan(vae, part, height, width, batch=batch, free=self.free, frames=self.frames,
                             tiles=self.tiles)
        unit = vae.spatial_compression_ratio
        tiling = Tiling(*self.tile, overlap=min(self.tile) // 4 // unit * unit)
        tiling.check(unit)
        # Where nothing is asked, not as many as fit the memory: they would take what tiles save.
        frames = vae.chunk_frames(height, width) if self.frames is None else self.frames
        check_frames(vae, frames)
        return StreamPlan(frames, tiling)

    def again(self, kept: StreamPlan, vae: AutoencoderKLODVAE, part: Direction, height: int, width: int) -> StreamPlan:
        """The plan to go on by with what the plan `kept` began: its tiles, at most as many frames at once.

        Raises:
            UserError: other tiles are asked for, or these do not fit the memory; the message says so.
        """
        made = "whole frames" if kept.tiling is None else f"tiles of {kept.tiling.height}x{kept.tiling.width}"
        if self.tile is not None:
            plan = self.plan(vae, part, height, width)
            if plan.tiling != kept.tiling:
                raise UserError(f"it was made in {made}, and tiles of {self.tile[0]}x{self.tile[1]} are asked for")
            return replace(plan, frames=min(plan.frames, kept.frames))
        if kept.tiling is not None and not self.tiles:
            raise UserError(f"it was made in {made}, and whole frames are asked for")
        frames = min(kept.frames, self.frames or kept.frames)
        try:
            return auto_plan(vae, part, height, width, free=self.free, frames=frames, tiles=False, tiling=kept.tiling)
        except UserError as error:
            raise UserError(f"it was made in {made}, which do not fit the memory any more") from error


AUTO = MemoryOptions()


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now; within a container, at most what it may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free, group = int(psutil.virtual_memory().available), Path("/sys/fs/cgroup")
    try:
        most, taken = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return free if most == "max" else min(free, int(most) - int(taken) + int(cached["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no such limits here
        return free
