"""What the pipeline yields and returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from diffusers.utils import BaseOutput
from torch import Tensor


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
    """`frames`: uint8 (B, T, H, W, 3). `latents`: normalized, (B, c, 1 + (T-1)/4, H/8, W/8)."""

    frames: np.ndarray
    latents: Tensor
