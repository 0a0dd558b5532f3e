"""Rotary position embedding over (time, height, width), computed for the size at hand, so that no table limits it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

Rope = tuple[Tensor, Tensor]  # cos, sin: (N, 1, head_dim / 2) float32

MAX_TABLES = 16  # kept per model: a rollout uses at most two for each of its first groups, a training one per bucket


class RopeCache:
    """The tables that a model used last, on their devices. Freed with the model.

    Tables are made outside of inference mode: a training may use them later.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[Hashable, Rope] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Rope]) -> Rope:
        """Return the tables of `key`, which names everything they depend on; `make` them if they are not kept."""
        tables = self._tables.pop(key, None)
        if tables is None:
            with torch.inference_mode(False), torch.no_grad():
                tables = make()
        self._tables[key] = tables
        if len(self._tables) > MAX_TABLES:
            self._tables.popitem(last=False)
        return tables

    def __deepcopy__(self, memo: object) -> RopeCache:
        return RopeCache()


class RotaryEmbedding(nn.Module):
    """The tables of `rope_tables`, by frame: (T, S, 1, head_dim / 2). A module without weights, so that diffusers'
    hooks can take a part of its output."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self._cache = RopeCache()

    def forward(self, times: Sequence[float], height: int, width: int, device: torch.device) -> Rope:
        def make() -> Rope:
            cos, sin = rope_tables(times, height, width, self.head_dim, theta=self.theta, device=device)
            shape = (len(times), height * width, *cos.shape[1:])
            return cos.view(shape), sin.view(shape)

        if torch.compiler.is_compiling():  # a whole model, whose graph then makes them
            return make()
        return self._cache.get((tuple(times), height, width, device), make)


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's `head_dim` / 2 pairs rotate with time, height and width; time takes the remainder."""
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim must be even and at least 6 for three axes, got {head_dim}")
    space = head_dim // 2 // 3
    return head_dim // 2 - 2 * space, space, space


def rope_tables(times: Sequence[float], height: int, width: int, head_dim: int, *, theta: float = 100.0,
                device: torch.device | str | None = None) -> Rope:
    """cos and sin of the angle of every token, tokens ordered (time, height, width). `times`: the frames' positions.

    Pair i of an axis with n pairs rotates by theta^(-i/n) radians per position (RoFormer, 2104.09864, eq. 15). Angles
    are float64 until the cosine is taken, so that far positions stay exact.
    """
    frames, angles = len(times), []
    for axis, (positions, pairs) in enumerate(
            zip((times, range(height), range(width)), axis_pairs(head_dim), strict=True)):
        frequencies = theta ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
        angle = torch.outer(torch.tensor(positions, dtype=torch.float64, device="cpu"), frequencies)  # (size, pairs)
        shape = [1, 1, 1, pairs]
        shape[axis] = len(positions)
        angles.append(angle.view(shape).expand(frames, height, width, pairs))
    table = torch.cat(angles, -1).view(frames * height * width, 1, head_dim // 2)
    return _to_device(table.cos().float(), device), _to_device(table.sin().float(), device)


def _to_device(table: Tensor, device: torch.device | str | None) -> Tensor:
    """Copy without waiting for what the device is computing."""
    return table.to(device, non_blocking=device is not None and torch.device(device).type == "cuda")


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair (x_i, x_{i + d/2}) of (B, N, H, d) by its token's angle; float32 inside, `x`'s dtype out."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    rotated = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)
    return torch.cat(rotated, dim=-1).to(x.dtype)
