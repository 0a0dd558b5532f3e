"""Group norm, with SiLU where it is asked for, of (B, C, T, H, W) in Triton: two reads and one write of the values.

Sums are in float32, whatever the values are, and of a frame in an order that depends on its size alone: so streamed and
whole clips round alike. The layout is free, each of input and output: channels last is not left, and contiguous is read
as it is. Imported by `fused_norm` where there is Triton; TRITON_INTERPRET=1 runs it on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values of a program's tile
MAX_BLOCK = 128  # channels of a tile
MAX_SPLITS = 64  # programs that share a frame's statistics


@triton.jit
def channel_moments(x, means, squares, frames, width, pixels, channels, rows, splits,
                    stride_b, stride_c, stride_t, stride_h, stride_w, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Means, and sums of squared deviations, of each channel over `rows` pixels of a frame: (B T, splits, C) each.

    Deviations are from the first pixel, which keeps the digits of values far from zero.
    """
    split, frame = tl.program_id(0), tl.program_id(1)
    c = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    known = c < channels
    base = x + (frame // frames).to(tl.int64) * stride_b + (frame % frames).to(tl.int64) * stride_t + c * stride_c
    first = split * rows
    last = tl.minimum(first + rows, pixels)
    origin = (first // width).to(tl.int64) * stride_h + (first % width).to(tl.int64) * stride_w
    pivot = tl.load(base + origin, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < last)[:, None] & known[None, :]
        offset = (p // width).to(tl.int64) * stride_h + (p % width).to(tl.int64) * stride_w
        value = tl.load(base[None, :] + offset[:, None], mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, value - pivot[None, :], 0.0)
        total += deviation
        square += deviation * deviation
    deviations = tl.sum(total, 0)
    mean = deviations / (last - first)
    target = (frame * splits + split).to(tl.int64) * channels + c
    tl.store(means + target, pivot + mean, mask=known)
    tl.store(squares + target, tl.sum(square, 0) - deviations * mean, mask=known)


@triton.jit
def group_statistics(means, squares, group_means, group_scales, partials, pixels, channels, group_width, rows, splits,
                     values, eps, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr):
    """Means and 1 / deviation of each group: (items, groups) each, of `partials` rows of `channel_moments` an item."""
    item, group = tl.program_id(0), tl.program_id(1)
    within = tl.arange(0, BLOCK_G)
    base = item.to(tl.int64) * partials * channels + group * group_width + within
    total = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, partials, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < partials)[:, None] & (within < group_width)[None, :]
        count = tl.minimum(rows, pixels - s % splits * rows).to(tl.float32)
        mean = tl.load(means + base[None, :] + s[:, None] * channels, mask=mask, other=0.0)
        total += mean * count[:, None]
    group_mean = tl.sum(tl.sum(total, 1), 0) / values
    total = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    for start in range(0, partials, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < partials)[:, None] & (within < group_width)[None, :]
        count = tl.minimum(rows, pixels - s % splits * rows).to(tl.float32)
        mean = tl.load(means + base[None, :] + s[:, None] * channels, mask=mask, other=0.0)
        square = tl.load(squares + base[None, :] + s[:, None] * channels, mask=mask, other=0.0)
        total += tl.where(mask, square + count[:, None] * (mean - group_mean) * (mean - group_mean), 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / values
    target = item * tl.num_programs(1) + group
    tl.store(group_means + target, group_mean)
    tl.store(group_scales + target, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def normalize(x, out, group_means, group_scales, weight, bias, frames, frames_an_item, width, pixels, channels,
              group_width, groups, stride_b, stride_c, stride_t, stride_h, stride_w,
              out_b, out_c, out_t, out_h, out_w, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(x - mean) * scale * weight + bias, and its SiLU: one tile of pixels and channels of a frame."""
    frame = tl.program_id(1)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < channels
    mask = (p < pixels)[:, None] & known[None, :]
    statistic = frame // frames_an_item * groups + c // group_width
    mean = tl.load(group_means + statistic, mask=known, other=0.0)
    scale = tl.load(group_scales + statistic, mask=known, other=0.0)
    scale *= tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    b, t = (frame // frames).to(tl.int64), (frame % frames).to(tl.int64)
    row, column = (p // width).to(tl.int64)[:, None], (p % width).to(tl.int64)[:, None]
    channel = c.to(tl.int64)[None, :]
    source = x + b * stride_b + t * stride_t + row * stride_h + column * stride_w + channel * stride_c
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        value *= 1.0 / (1.0 + tl.exp(-value))
    target = out + b * out_b + t * out_t + row * out_h + column * out_w + channel * out_c
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)


def group_norm(x: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, per_frame: bool,
               silu: bool) -> None:
    """Write the group norm of `x`, or its SiLU, to `out`, both (B, C, T, H, W); statistics are of each frame, or of
    each clip."""
    batch, channels, frames, height, width = x.shape
    pixels, group_width = height * width, channels // groups
    block_c = min(MAX_BLOCK, triton.next_power_of_2(channels))
    block_p = TILE // block_c
    rows = max(4, triton.cdiv(triton.cdiv(pixels, MAX_SPLITS), block_p)) * block_p
    splits, blocks = triton.cdiv(pixels, rows), triton.cdiv(channels, block_c)
    items, partials = (batch * frames, splits) if per_frame else (batch, frames * splits)
    means, squares = torch.empty(2, batch * frames, splits, channels, dtype=torch.float32, device=x.device)
    group_means, group_scales = torch.empty(2, items, groups, dtype=torch.float32, device=x.device)
    channel_moments[(splits, batch * frames, blocks)](
        x, means, squares, frames, width, pixels, channels, rows, splits, *x.stride(), BLOCK_P=block_p, BLOCK_C=block_c)
    block_g = triton.next_power_of_2(group_width)
    group_statistics[(items, groups)](
        means, squares, group_means, group_scales, partials, pixels, channels, group_width, rows, splits,
        float(pixels) * group_width * (partials // splits), eps,
        BLOCK_S=max(1, min(triton.next_power_of_2(partials), 1024 // block_g)), BLOCK_G=block_g)
    normalize[(triton.cdiv(pixels, block_p), batch * frames, blocks)](
        x, out, group_means, group_scales, weight, bias, frames, 1 if per_frame else frames, width, pixels, channels,
        group_width, groups, *x.stride(), *out.stride(), SILU=silu, BLOCK_P=block_p, BLOCK_C=block_c)
