"""Which parts of the network are 2D and which causal 3D (OD-VAE, section 3.2), in one table.

The kind of a level applies to its residual blocks, to the conv at its open end (conv_in or conv_out at the pixels, mid
block and the latent's conv at the innermost level) and to its down- or upsampler, with two exceptions: what halves or
doubles time is always 3D, and after spatial upsampling alone the decoder has a (1, 3, 3) conv unless the kind is "all",
as in the public code. The outer levels are the half of the levels nearest to the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..utils.errors import UserError

Kind = Literal[
    "2d",    # every conv on each frame separately
    "half",  # in each residual block the first conv is causal 3D and the second 2D
    "3d",    # every conv causal 3D, except the one after upsampling in space alone
    "all",   # that one as well
]

VARIANTS: dict[int, tuple[tuple[Kind, Kind], tuple[Kind, Kind]]] = {
    #  encoder: outer, inner   decoder: outer, inner
    0: (("2d", "2d"),          ("2d", "2d")),      # the image VAE, which sees time only where time is compressed
    1: (("all", "all"),        ("all", "all")),    # every 2D conv of the image VAE inflated
    2: (("half", "half"),      ("half", "half")),  # the paper halves the 3D convs, and shows which only in a figure
    3: (("2d", "3d"),          ("2d", "3d")),
    4: (("2d", "3d"),          ("3d", "3d")),      # the paper's choice: training an LVDM runs the encoder alone
}


@dataclass(frozen=True)
class Variant:
    """The kind of each level, pixels first."""

    encoder: tuple[Kind, ...]
    decoder: tuple[Kind, ...]


def make_variant(variant: int | Mapping[str, Sequence[str]], levels: int) -> Variant:
    """Return a row of `VARIANTS` for a network of `levels` levels, or a custom variant {"encoder": [kind, ...],
    "decoder": [...]}, one kind per level, pixels first. Raises UserError for anything else."""
    if isinstance(variant, int):
        if variant not in VARIANTS:
            raise UserError(f"unknown variant {variant}; choose one of {sorted(VARIANTS)}")
        outer = levels // 2
        encoder, decoder = ((ends[0],) * outer + (ends[1],) * (levels - outer) for ends in VARIANTS[variant])
        return Variant(encoder, decoder)
    if sorted(variant) != ["decoder", "encoder"]:
        raise UserError(f"a custom variant has the keys encoder and decoder, got {sorted(variant)}")
    custom: dict[str, Any] = {}
    for part, kinds in variant.items():
        wrong = [kind for kind in kinds if kind not in get_args(Kind)]
        if wrong or len(kinds) != levels:
            raise UserError(f"variant.{part} {list(kinds)} must be one of {get_args(Kind)} for each of {levels} levels")
        custom[part] = tuple(kinds)
    return Variant(**custom)


def conv_taps(kind: Kind) -> tuple[int, int]:
    """Return the temporal kernel sizes of a residual block's two convs."""
    return {"2d": (1, 1), "half": (3, 1), "3d": (3, 3), "all": (3, 3)}[kind]
