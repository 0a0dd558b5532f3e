"""Check for NaN and infinity, which would otherwise silently become black frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import NonFiniteError


def is_finite(x: Tensor) -> bool:
    """Return whether no element of `x` is NaN or infinite; allocates little, and synchronizes with the device."""
    if not x.numel() or not x.is_floating_point():
        return True
    x = x.detach().float() if x.itemsize == 1 else x.detach()  # torch has no aminmax of eight-bit floats
    return bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def non_finite(part: str, module: nn.Module | None = None, where: str = "") -> NonFiniteError:
    """Return the error for values of `part` that are not finite.

    Args:
        part: what computed them, as the message names it: "the VAE's decoder".
        module: its weights are searched for the cause.
        where: when it happened, such as "for clip.mp4".
    """
    bad = [] if module is None else [name for name, weight in module.state_dict().items()
                                     if isinstance(weight, Tensor) and not weight.is_meta and not is_finite(weight)]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        advice = f"its weight {bad[0]}{more} is not finite: load undamaged weights"
    elif module is None:
        advice = "check its weights and its inputs"
    else:
        advice = "its activations or inputs grew too large: use float32, or milder settings"
    return NonFiniteError(f"{part} gave NaN or infinity{where and ' '}{where}; {advice}")


def check_finite(x: Tensor, part: str, module: nn.Module | None = None, where: str = "") -> None:
    """Raise NonFiniteError, see `non_finite`, unless every element of `x` is finite."""
    if not is_finite(x):
        raise non_finite(part, module, where)
