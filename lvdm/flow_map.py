"""Flow maps: a single evaluation goes from noise level t to any lower level r (MeanFlow, 2505.13447).

The average velocity u(x_t, t, r), which is the integral of v(x_s, s) over s from r to t divided by t - r, gives
x_r = x_t - (t - r) u without an error of discretisation. Differentiated along the path, that is an identity without the
integral (eq. 6), which a network is trained on with its own derivative in place of the true one:

    u(x_t, t, r) = v(x_t, t) - (t - r) du/dt,  where du/dt = v du/dx + du/dt for a fixed r.

At r = t this is flow matching.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flow import per_frame

Derivative = Literal["central", "jvp"]


def draw_interval(rng: torch.Generator, t: Tensor, noised: Tensor, *, equal: float, zero: float,
                  from_noise: float) -> tuple[Tensor, Tensor]:
    """Draw where the frames of a sample go from their levels t (T,): return t and r (T,).

    The first group that is `noised` (T,) moves while the others stay, as in a rollout, and with it all groups of its
    level: in the regime "clip" the whole clip. With probability `equal` none moves; with `zero` it goes to 0, else to a
    uniform level below its own; with `from_noise` it starts at 1. Draws the same numbers from `rng` in every case.
    """
    kind, start, fraction = torch.rand(3, generator=rng).tolist()
    if kind < equal or not bool(noised.any()):
        return t, t.clone()
    level = t[noised][0]
    moving = noised & (t == level)
    t = torch.where(moving, torch.ones_like(t) if start < from_noise else t, t)
    return t, torch.where(moving, 0.0 if kind < equal + zero else fraction * t, t)


def total_derivative(u: Callable[[Tensor], Tensor], t: Tensor, r: Tensor, method: Derivative, delta: float) -> Tensor:
    """du/dt along the path at a fixed r, of every frame that moves (r < t), while the others stay.

    Args:
        u: gives u (B, c, T, h, w) at the points that lie (B, T) levels further up on the path.
        t, r: (B, T).
        delta: half of the central difference's interval, which is moved or cut to lie between r and 1.
    """
    moving = t > r
    if method == "jvp":  # of torch's attention kernels only the plain one has a forward derivative
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(u, (torch.zeros_like(t),), (moving.to(t.dtype),))[1]
    above = (1 - t).clamp(max=delta) * moving
    below = torch.maximum(above - 2 * delta, r - t) * moving
    span = torch.where(moving, above - below, torch.ones_like(t))
    return (u(above) - u(below)) / per_frame(span, span)
