"""The transformer block and its parts.

Shapes: B batch, T latent frames, S tokens a frame, N = T*S tokens, M text tokens, P tokens of history, H heads,
d = D/H width of a head, D hidden width. Tokens stay (B, T, S, D), so that a frame's modulation (B, T, 1, D) broadcasts
over its tokens and is never written out a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rope import Rope, apply_rope

KeyValue = tuple[Tensor, Tensor]  # keys (roped) and values of earlier tokens, each (B, H, P, d)


class SelfAttention(nn.Module):
    """Attention over the video's tokens, with RMS-normed, rotated queries and keys (2302.05442, 2104.09864)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """(B, T, S, D) -> the same shape, and the keys and values of `past` followed by those of `x`.

        `mask` is (N, P + N), True where a token may look; None lets every token see everything.
        """
        b, t, s, dim = x.shape
        qk, v = self.qkv(x).view(b, t * s, 3, self.heads, -1).split([2, 1], dim=2)
        weight = torch.stack([self.norm_q.weight, self.norm_k.weight]).unsqueeze(1)  # (2, 1, d)
        qk = F.rms_norm(qk, qk.shape[-1:], eps=self.norm_q.eps) * weight
        q, k = apply_rope(qk, rope).to(v.dtype).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        v = v.squeeze(2).transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).reshape(b, t, s, dim)), (k, v)


class CrossAttention(nn.Module):
    """Attention from the video's tokens to the text's; `mask` (B, 1, 1, M) is False at padding."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, S, D), text (B, M, D) -> (B, T, S, D)."""
        b, t, s, dim = x.shape
        q = self.norm_q(self.q(x).view(b, t * s, self.heads, -1)).transpose(1, 2)
        k, v = self.kv(text).view(b, -1, 2, self.heads, dim // self.heads).unbind(2)
        k, v = self.norm_k(k).transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.out(out.transpose(1, 2).reshape(b, t, s, dim))


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Self-attention, cross-attention, MLP. Shift, scale and gate of the first and the last come from the frame's
    timestep: one projection shared by all blocks plus this block's own table (adaLN-single, PixArt-alpha,
    2310.00426)."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(6 * dim))
        self.attention = SelfAttention(dim, heads)
        self.norm_cross = nn.RMSNorm(dim, eps=1e-6)
        self.cross = CrossAttention(dim, heads)
        self.mlp = MLP(dim, mlp_hidden)

    def forward(self, x: Tensor, modulation: Tensor, rope: Rope, mask: Tensor | None, text: Tensor,
                text_mask: Tensor | None, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """x (B, T, S, D), modulation (B, T, 6D), text (B, M, D) -> x and the keys and values seen so far."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.modulation).unsqueeze(2).chunk(6, dim=-1)
        h, seen = self.attention(modulate(x, shift1, scale1), rope, mask, past)
        x = torch.addcmul(x, gate1, h)
        x = x + self.cross(self.norm_cross(x), text, text_mask)
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift2, scale2))), seen


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift with x (B, T, S, D) and shift, scale (B, T, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)
