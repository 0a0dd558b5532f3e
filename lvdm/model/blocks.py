"""The transformer block and its parts.

Shapes: B batch, T latent frames, S tokens per frame, N = T*S tokens, M text tokens, P tokens of history, H heads,
d = D/H width of a head, D hidden width. Tokens stay (B, T, S, D), so that a frame's modulation (B, T, 1, D) broadcasts
over its tokens and is never expanded in memory.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .groups import block_mask
from .norm import RMSNorm, rms_norm
from .rope import Rope, apply_rope

KeyValue = tuple[Tensor, Tensor]  # keys (roped) and values of earlier tokens, each (B, P, H, d)


class AttentionBackend:
    """Which of diffusers' kernels computes self-attention; `LVDMTransformer3DModel.set_attention_backend` sets it."""

    _attention_backend: AttentionBackendName | None = None  # None: torch's scaled_dot_product_attention
    _parallel_config = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, groups: tuple[int, ...]) -> Tensor:
        """(B, N, H, d), (B, P + N, H, d) twice -> (B, N, H, d).

        FlexAttention skips what a group does not see by a mask. All other kernels are called group by group, each on
        the keys up to its end: without a mask, so that any kernel works and no product is computed in vain.
        """
        past = k.shape[1] - q.shape[1]
        if self._attention_backend is AttentionBackendName.FLEX:
            return _flex(q, k, v, block_mask(groups, past, q.device))
        ends = accumulate(groups, initial=past)
        next(ends)
        outputs = [self._attend(group, k[:, :end], v[:, :end])
                   for group, end in zip(q.split(groups, dim=1), ends, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._attention_backend is not None:
            return dispatch_attention_fn(q, k, v, backend=self._attention_backend)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention, compiled where there is a kernel for it; uncompiled it materializes every score."""
    attention = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    out: Tensor = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
    return out.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Attention over the video's tokens, with RMS-normed, rotated queries and keys (2302.05442, 2104.09864)."""

    processor: AttentionBackend  # diffusers' name for it

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim)
        self.processor = AttentionBackend()

    def forward(self, x: Tensor, rope: Rope, groups: tuple[int, ...],
                past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """(B, T, S, D) -> the same shape, and the keys and values of `past` followed by those of `x`.

        `groups` has the tokens of each group: a token sees the past, its own group and earlier ones.
        """
        b, t, s, dim = x.shape
        qk, v = self.qkv(x).view(b, t * s, 3, self.heads, -1).split([2, 1], dim=2)
        weight = torch.stack([self.norm_q.weight, self.norm_k.weight]).unsqueeze(1)  # (2, 1, d)
        qk = rms_norm(qk, weight, self.norm_q.eps or 0)
        q, k = apply_rope(qk, rope).to(v.dtype).unbind(2)
        v = v.squeeze(2)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        return self.out(self.processor(q, k, v, groups).reshape(b, t, s, dim)), (k, v)


class CrossAttention(nn.Module):
    """Attention from the video's tokens to the text's; `mask` (B, 1, 1, M) is False at padding."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.norm_q = RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = RMSNorm(dim // heads, eps=1e-6)
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
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.modulation).unsqueeze(2).chunk(6, dim=-1)
        h, key_value = self.attention(modulate(x, shift1, scale1), rope, groups, past)
        x = torch.addcmul(x, gate1, h)
        if self.cross is not None and self.norm_cross is not None and text is not None:
            x = x + self.cross(self.norm_cross(x), text, text_mask)
        return torch.addcmul(x, gate2, self.mlp(modulate(x, shift2, scale2))), key_value


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift with x (B, T, S, D) and shift, scale (B, T, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)
