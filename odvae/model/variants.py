"""Where the network is 2D and where it is causal 3D (OD-VAE, section 3.2), in one table.

`outer` levels are the half of the levels nearest to the pixels: conv_in, the residual blocks of those levels and the
downsamplers between them. The downsampler that leaves the outer half is always 3D, as it also halves time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    encoder_outer_2d: bool
    decoder_outer_2d: bool


VARIANTS = {
    1: Variant(encoder_outer_2d=False, decoder_outer_2d=False),  # every conv inflated
    3: Variant(encoder_outer_2d=True, decoder_outer_2d=True),
    4: Variant(encoder_outer_2d=True, decoder_outer_2d=False),  # the paper's choice: training an LVDM runs the encoder
}


def time_kernels(levels: int, outer_2d: bool) -> list[int]:
    """Temporal kernel size of each level's residual blocks, level 0 (pixels) first."""
    return [1 if outer_2d and level < levels // 2 else 3 for level in range(levels)]
