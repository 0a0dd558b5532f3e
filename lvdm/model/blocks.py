"""The transformer block and its parts.

Shapes: B batch, T latent frames, S tokens per frame, N = T*S tokens, M text tokens, P tokens of history, H heads,
d = D/H width of a head, D hidden width. Tokens stay (B, T, S, D), so that a frame's modulation (B, T, 1, D) broadcasts
over its tokens and is never expanded in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CrossAttention, KeyValue, SelfAttention
from .norm import RMSNorm, layer_norm
from .rope import Rope


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Self-attention, cross-attention (with text), MLP. Shift, scale and gate of the first and the last come from the
    frame's timestep: one projection shared by all blocks plus this block's own table (adaLN-single, PixArt-alpha,
    2310.00426)."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int, *, text: bool = True) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(6 * dim))
        self.attention = SelfAttention(dim, heads)
        self.norm_cross = RMSNorm(dim, eps=1e-6) if text else None
        self.cross = CrossAttention(dim, heads) if text else None
        self.mlp = MLP(dim, mlp_hidden)

    def forward(self, x: Tensor, modulation: Tensor, rope: Rope, groups: tuple[int, ...], text: Tensor | None,
                text_mask: Tensor | None, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """x (B, T, S, D), modulation (B, T, 6D), text (B, M, D) -> x and the keys and values so far."""
        # In the dtype of x, which under autocast is not that of the weights: a float32 gate would make x float32.
        modulation = (modulation + self.modulation).to(x.dtype).unsqueeze(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h, key_value = self.attention(modulate(x, shift1, scale1), rope, groups, past)
        x = torch.addcmul(x, gate1, h)
        if self.cross is not None and self.norm_cross is not None and text is not None:
            x = x + self.cross(self.norm_cross(x), text, text_mask)
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift2, scale2))), key_value


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift with x (B, T, S, D) and shift, scale (B, T, 1, D)."""
    return torch.addcmul(shift, layer_norm(x, 1e-6), 1 + scale)
