"""Ulysses attention (2309.14509) by groups: each process has its share of every frame's tokens, and for the attention
all tokens of its share of the heads.

diffusers' hooks split and gather the tokens (`LVDMTransformer3DModel._cp_plan`). Its own attention for that takes as
many queries as keys in the backward pass; here a group's queries see the keys of earlier groups too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

from odvae.utils.errors import UserError


class UlyssesExchange:
    """Exchanges tokens for heads between processes, and back.

    Args:
        config: diffusers' `ContextParallelConfig`, set up.
    """

    def __init__(self, config: Any) -> None:
        if config.ring_degree > 1 or config.ulysses_anything:
            raise UserError("this transformer is parallelized by ContextParallelConfig(ulysses_degree=...); leave out "
                            "ring_degree, ring_anything and ulysses_anything")
        self.group, self.processes = config._ulysses_mesh.get_group(), int(config.ulysses_degree)

    def share(self, parts: Sequence[int]) -> tuple[int, ...]:
        """Return this process's tokens of each group of tokens."""
        return tuple(tokens // self.processes for tokens in parts)

    def to_heads(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """(B, n, H, d), this process's tokens of each part -> (B, W n, H / W, d), all tokens, still part by part."""
        if x.shape[2] % self.processes:
            raise UserError(f"{x.shape[2]} attention heads cannot be divided over {self.processes} processes; choose "
                            f"another ulysses_degree")
        x = self._exchange(x.unflatten(2, (self.processes, -1)).permute(2, 0, 1, 3, 4))  # (W, B, n, H / W, d)
        return torch.cat([part.transpose(0, 1).flatten(1, 2) for part in x.split(list(parts), dim=2)], dim=1)

    def to_tokens(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """The inverse: (B, W n, H / W, d) -> (B, n, H, d)."""
        whole = x.split([self.processes * tokens for tokens in parts], dim=1)
        x = torch.cat([part.unflatten(1, (self.processes, -1)).transpose(0, 1) for part in whole], dim=2)
        return self._exchange(x).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _exchange(self, x: Tensor) -> Tensor:
        """Send x[i] to process i; return what came from each."""
        x = x.contiguous()
        received: Tensor = all_to_all_single(torch.empty_like(x), x, group=self.group)
        return received
