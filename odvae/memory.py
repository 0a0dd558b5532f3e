"""How much memory encoding or decoding takes, told before it is done, and the plan that fits what is free."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .model.autoencoder import AutoencoderKLODVAE
from .model.conv import handed_over
from .model.sampling import Upsample
from .model.tiling import Tiling
from .runtime.errors import UserError

Part = Literal["encode", "decode"]
TILES = (768, 512, 384, 256, 192, 128, 96, 64)  # pixels a side that `auto_plan` tries, when whole frames do not fit
SPARE = 0.8  # share of the free memory that a plan may take: allocators and oneDNN's scratch are not counted


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside the block make, while they live. `peak` is the most at one
    time. What a kernel takes for itself while it runs (oneDNN's scratch, workspaces) is not seen."""

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


@torch.no_grad()
def memory_estimate(vae: AutoencoderKLODVAE, part: Part, height: int, width: int, *, frames: int | None = None,
                    batch: int = 1, tiling: Tiling | None = None) -> int:
    """Bytes of tensors alive at the peak of a stream of any length, the piece and its result included, the weights not.

    Nothing is computed: the stream runs on tensors that have a shape and no values.

    Args:
        height, width: of the video in pixels, multiples of 8.
        frames: video frames at once, a multiple of 4; None: `vae.piece_frames`.
        tiling: spatial tiles; None: those of the VAE where its tiling is enabled.

    Raises:
        UserError: sizes or tiles that do not fit the VAE; a model that is not causal, which cannot be streamed.
    """
    vae.check_size(height, width)
    ratio = vae.temporal_compression_ratio
    with FakeTensorMode(), _default_dtype(vae.dtype):
        shadow = AutoencoderKLODVAE.from_config(vae.config).eval()
        if any(isinstance(module, Upsample) and module.subpixel is not None for module in vae.modules()):
            shadow.fuse()
        tiling = tiling or (vae.tiling if vae.use_tiling else None)
        if tiling is not None:
            shadow.enable_tiling(tiling.height, tiling.width, tiling.overlap)
        frames = frames or shadow.piece_frames(height, width)
        if frames < ratio or frames % ratio:
            raise UserError(f"frames={frames} at once must be a multiple of {ratio}; the nearest is "
                            f"{max(ratio, ratio * round(frames / ratio))}")
        step = shadow.encode_piece if part == "encode" else shadow.decode_piece
        scale = 1 if part == "encode" else vae.spatial_compression_ratio
        channels = vae.config.in_channels if part == "encode" else vae.latent_channels
        lengths = (1, frames, frames) if part == "encode" else (frames // ratio,) * 3
        with LiveMemory() as memory:
            past: Any = ()
            for length in lengths:
                x = torch.empty(batch, channels, length, height // scale, width // scale, dtype=vae.dtype)
                past = handed_over(past)
                made, past = step(x, past)
                del made, x
        return memory.peak


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Plan:
    """How a stream is cut: `frames` at once, and in space by `tiling` where frames do not fit whole."""

    frames: int
    tiling: Tiling | None


def auto_plan(vae: AutoencoderKLODVAE, part: Part, height: int, width: int, *, batch: int = 1,
              free: int | None = None) -> Plan:
    """The largest plan that fits `free` bytes (None: what the VAE's device has free): whole frames, many at once, then
    few, then tiles, large ones first.

    Raises:
        UserError: not even the smallest tile fits.
    """
    free = free_memory(vae.device) if free is None else free
    ratio, unit = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    most, at_once = vae.piece_frames(height, width), []
    while most >= ratio:
        at_once.append(most // ratio * ratio)
        most //= 2
    plans = [Plan(frames, None) for frames in at_once]
    plans += [Plan(ratio, Tiling(min(tile, height), min(tile, width), min(tile, height, width) // 4 // unit * unit))
              for tile in TILES if tile < max(height, width) and tile % unit == 0]
    need = 0
    for plan in plans:
        need = memory_estimate(vae, part, height, width, frames=plan.frames, batch=batch, tiling=plan.tiling)
        if need <= SPARE * free:
            return plan
    raise UserError(f"to {part} {batch} x {height}x{width} takes at least {need / SPARE / 2**20:.0f} MiB free, and "
                    f"there are {free / 2**20:.0f}; take a smaller size or batch, or free some memory")


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
