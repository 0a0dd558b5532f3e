"""What the pipeline yields and returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent", "uint8")
FLOAT_TYPES = ("np", "pt")  # whose values are not rounded to 8 bits


@dataclass(frozen=True)
class RolloutStep:
    """One evaluation of the model is done: a step of the scheduler, or half a step of a second-order one. Counts are
    from 1. `estimate`: the current prediction of the group's clean, normalized latents (B, c, t, h, w)."""

    group: int
    groups: int
    step: int
    steps: int
    estimate: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class RolloutGroup:
    """Group `group` of `groups` (from 1) is denoised: its clean, normalized latents (B, c, t, h, w) float32."""

    group: int
    groups: int
    latents: Tensor


SamplingEvent = RolloutStep | RolloutGroup


@dataclass(frozen=True)
class VideoChunk:
    """The frames of group `group` of `groups` (from 1), uint8 (B, t, H, W, 3), and their normalized latents
    (B, c, t', h, w). Chunks of group 0 are the context, as the VAE decodes it."""

    group: int
    groups: int
    frames: np.ndarray
    latents: Tensor


@dataclass(frozen=True)
class DecodeProgress:
    """Part `part` of `parts` of a group's latents is decoded. Counts are from 1; group 0 is the context."""

    group: int
    groups: int
    part: int
    parts: int


@dataclass
class LVDMPipelineOutput(BaseOutput):
    """`frames`: as `output_type` says, see `to_output_type`. `latents`: normalized, (B, c, 1 + (T-1)/4, H/8, W/8)."""

    frames: Any
    latents: Tensor


def to_output_type(frames: np.ndarray, output_type: str) -> Any:
    """Convert frames (B, T, H, W, 3), float32 in [0, 1] for `FLOAT_TYPES`, else uint8.

    "np": the same shape. "pt": (B, T, 3, H, W). "pil": for each video a list of images. "uint8": as they are.
    """
    if output_type == "pt":
        return torch.from_numpy(frames).movedim(-1, 2)
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in video] for video in frames]
    return frames
