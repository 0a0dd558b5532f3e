"""Where the network is 2D and where it is causal 3D (OD-VAE, section 3.2), in one table.

A level's kind decides its residual blocks, the conv at its open end (conv_in or conv_out at the pixels, mid block and
the latent's conv at the innermost level) and its down- or upsampler, except that what halves or doubles time is always
3D, and that the decoder's doubling of space alone is followed by a (1, 3, 3) conv unless the kind is "all", as in the
public code. The outer levels are the half of the levels nearest to the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..utils.errors import UserError

Kind = Literal[
    "2d",    # every conv on each frame by itself
    "half",  # in each residual block the first conv is causal 3D and the second 2D
    "3d",    # every conv causal 3D, but not the one after a doubling of space alone
    "all",   # that one as well
]

VARIANTS: dict[int, tuple[tuple[Kind, Kind], tuple[Kind, Kind]]] = {
    #  encoder: outer, inner   decoder: outer, inner
    1: (("all", "all"),        ("all", "all")),    # every 2D conv of the image VAE inflated
    2: (("half", "half"),      ("half", "half")),  # the paper halves the 3D convs, and only draws which: our reading
    3: (("2d", "3d"),          ("2d", "3d")),
    4: (("2d", "3d"),          ("3d", "3d")),      # the paper's choice: training an LVDM runs the encoder alone
}


@dataclass(frozen=True)
class Variant:
    """The kind of each level, pixels first."""

    encoder: tuple[Kind, ...]
    decoder: tuple[Kind, ...]


def make_variant(variant: int | Mapping[str, Sequence[str]], levels: int) -> Variant:
    """A row of `VARIANTS` for a network of `levels` levels, or one's own: {"encoder": [kind, ...], "decoder": [...]},
    a kind a level, pixels first. Raises UserError for what is neither."""
    if isinstance(variant, int):
        if variant not in VARIANTS:
            raise UserError(f"variant {variant} is not known; choose one of {sorted(VARIANTS)}")
        outer = levels // 2
        encoder, decoder = ((ends[0],) * outer + (ends[1],) * (levels - outer) for ends in VARIANTS[variant])
        return Variant(encoder, decoder)
    if sorted(variant) != ["decoder", "encoder"]:
        raise UserError(f"a variant of one's own has the keys encoder and decoder, got {sorted(variant)}")
    own: dict[str, Any] = {}
    for part, kinds in variant.items():
        wrong = [kind for kind in kinds if kind not in get_args(Kind)]
        if wrong or len(kinds) != levels:
            raise UserError(f"variant.{part} {list(kinds)} must be one of {get_args(Kind)} for each of {levels} levels")
        own[part] = tuple(kinds)
    return Variant(**own)


def conv_taps(kind: Kind) -> tuple[int, int]:
    """Temporal kernel sizes of a residual block's two convs."""
    return {"2d": (1, 1), "half": (3, 1), "3d": (3, 3), "all": (3, 3)}[kind]
