"""Convert between uint8 and [-1, 1], and resize and crop frames. Nothing else does either."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..utils.errors import UserError

RESIZE = "short side, bilinear, antialiased; centre crop"  # goes into every cache's header


def to_tensor(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (..., T, H, W, C) -> float32 (..., C, T, H, W) in [-1, 1], channels last.

    They go to the device as bytes, a quarter of the traffic, from pinned memory, and become float there.
    """
    if frames.dtype != np.uint8 or frames.ndim < 4:
        raise UserError(f"expected frames uint8 (..., T, H, W, C), got {frames.dtype} {frames.shape}")
    pixels = _pinned(torch.from_numpy(np.ascontiguousarray(frames)), torch.device(device))
    video = rearrange(pixels.to(device, non_blocking=True), "... t h w c -> ... c t h w")
    return to_float(video)


def _pinned(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` in memory from which a GPU copies by itself; torch keeps it until the copy is done."""
    if device.type != "cuda":
        return x
    try:
        return x.pin_memory()
    except RuntimeError:  # the system has no more of it: an ordinary copy is as right
        return x


def to_uint8(video: Tensor) -> np.ndarray:
    """float (..., C, T, H, W), about [-1, 1] -> uint8 (..., T, H, W, C), rounded to nearest and clamped."""
    return np.ascontiguousarray(to_pixels(video).cpu().numpy())


def to_pixels(video: Tensor) -> Tensor:
    """`to_uint8` on the video's own device, before a copy of a quarter of the bytes: uint8 (..., T, H, W, C)."""
    if video.ndim < 4:
        raise UserError(f"expected a video (..., C, T, H, W), got shape {tuple(video.shape)}")
    pixels = video.detach().float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return rearrange(pixels, "... c t h w -> ... t h w c").contiguous()


def to_planes(frames: np.ndarray) -> Tensor:
    """uint8 (..., T, H, W, C) -> uint8 (..., C, T, H, W)."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "... t h w c -> ... c t h w")


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], on the same device."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def covering(source: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Return (height, width) of a picture of size `source` after scaling it to cover height x width, aspect kept."""
    if height < 1 or width < 1:
        raise UserError(f"cannot resize to {height}x{width}: both sides must be at least 1")
    h, w = source
    scale = max(height / h, width / w)
    return max(height, round(h * scale)), max(width, round(w * scale))


def cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 (T, H, W, C) until it just covers height x width, aspect kept."""
    h, w = frames.shape[1:3]
    size = covering((h, w), height, width)
    if size == (h, w):
        return frames
    pixels = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "t h w c -> t c h w")
    pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)  # uint8 stays uint8
    return rearrange(pixels, "t c h w -> t h w c").numpy()


def crop(frames: np.ndarray, height: int, width: int, position: tuple[float, float] = (.5, .5)) -> np.ndarray:
    """Crop (T, H, W, C) to height x width, at a position from (0, 0), the top left, to (1, 1), the bottom right."""
    top, left = (int((size - side) * share) for size, side, share in
                 zip(frames.shape[1:3], (height, width), position, strict=True))
    return np.ascontiguousarray(frames[:, top:top + height, left:left + width])


def resize_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 (T, H, W, C) until it just covers height x width, aspect kept, then crop the centre."""
    return crop(cover(frames, height, width), height, width)
