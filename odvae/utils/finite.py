"""Check for NaN and infinity, which would otherwise silently become black frames."""

from __future__ import annotations

from collections.abc import Callable

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


class FiniteChecks:
    """Check values that come one after another: each at once on the CPU, all together at `settle` on an accelerator,
    which would otherwise have to be waited for each time."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor, Callable[[float], NonFiniteError]]] = []

    def add(self, x: Tensor, error: Callable[[float], NonFiniteError], source: Tensor | None = None) -> None:
        """Check `x`; `error` makes the error from the largest magnitude in `source`, what `x` was computed from."""
        source = x if source is None else source
        if x.device.type == "cpu":
            if not is_finite(x):
                raise error(float(source.abs().max()))
        elif x.numel():
            self._pending.append((torch.isfinite(torch.stack(torch.aminmax(x))).all(), source.abs().max(), error))

    def settle(self) -> None:
        """Raise the first error of what was added since the last time."""
        pending, self._pending = self._pending, []
        if not pending or all(torch.stack([finite for finite, _, _ in pending]).tolist()):
            return
        raise next(error(float(largest)) for finite, largest, error in pending if not finite)
