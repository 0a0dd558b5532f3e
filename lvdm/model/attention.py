"""Self-attention over the video's tokens, and cross-attention to the text's. Shapes: see `blocks`."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .compilation import RECOMPILE_LIMIT
from .context_parallel import UlyssesExchange
from .groups import block_mask
from .norm import RMSNorm, rms_norm
from .projections import FusableAttention, is_plain
from .rope import Rope, apply_rope

KeyValue = tuple[Tensor, Tensor]  # keys (roped) and values of earlier tokens, each (B, P, H, d)


class SelfAttnProcessor:
    """Self-attention by the kernel that `LVDMTransformer3DModel.set_attention_backend` sets."""

    _attention_backend: AttentionBackendName | None = None  # None: torch's scaled_dot_product_attention
    _parallel_config: Any = None  # set by `LVDMTransformer3DModel.enable_parallelism`

    def __call__(self, attn: SelfAttention, x: Tensor, rope: Rope, groups: tuple[int, ...],
                 past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """(B, N, D) -> the same shape, and the keys and values of `past` followed by those of `x`."""
        q, k, v = _fused_heads(attn, x, rope) or _heads(attn, x, rope)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        if self._parallel_config is None:
            out = self._attend_by_group(q, k, v, groups)
        else:
            out = self._attend_in_parallel(q, k, v, groups)
        return attn.to_out[0](out.reshape(x.shape)), (k, v)

    def _attend_in_parallel(self, q: Tensor, k: Tensor, v: Tensor, groups: tuple[int, ...]) -> Tensor:
        """The same where this process has a share of every group's tokens."""
        exchange = UlyssesExchange(self._parallel_config.context_parallel_config)
        parts = exchange.share(groups)
        keys = (k.shape[1] - q.shape[1], *parts)
        out = self._attend_by_group(exchange.to_heads(q, parts), exchange.to_heads(k, keys), exchange.to_heads(v, keys),
                                    groups)
        return exchange.to_tokens(out, parts)

    def _attend_by_group(self, q: Tensor, k: Tensor, v: Tensor, groups: tuple[int, ...]) -> Tensor:
        """(B, N, H, d), (B, P + N, H, d) twice -> (B, N, H, d).

        FlexAttention skips what a group does not see by a mask. All other kernels are called group by group, each on
        the keys up to its end: without a mask, so that any kernel works and no product is computed in vain. So is a
        group alone, as in a rollout, whose many lengths FlexAttention would be compiled for.
        """
        past = k.shape[1] - q.shape[1]
        if self._attention_backend is AttentionBackendName.FLEX and len(groups) > 1:
            return _flex(q, k, v, block_mask(groups, past, q.device))
        ends = accumulate(groups, initial=past)
        next(ends)
        outputs = [self._attend(group, k[:, :end], v[:, :end])
                   for group, end in zip(q.split(groups, dim=1), ends, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._attention_backend not in (None, AttentionBackendName.FLEX):
            return dispatch_attention_fn(q, k, v, backend=self._attention_backend)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)


def _heads(attn: SelfAttention, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, D) -> normed, rotated queries and keys, and values, each (B, N, H, d)."""
    q, k, v = (y.view(*y.shape[:2], attn.heads, -1) for y in attn.project(x))
    q, k = (apply_rope(y, rope).to(v.dtype) for y in (attn.norm_q(q), attn.norm_k(k)))
    return q, k, v


def _fused_heads(attn: SelfAttention, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same values in fewer calls, if projections are fused and norms are plain; else None."""
    heads, norms = attn.heads, (attn.norm_q, attn.norm_k)
    projected = attn.project_fused(x) if all(is_plain(norm, RMSNorm) for norm in norms) else None
    if projected is None:
        return None
    qk, v = projected.view(*x.shape[:2], 3 * heads, -1).split([2 * heads, heads], dim=2)
    weight = torch.cat([norm.weight.expand(heads, -1) for norm in norms])
    q, k = apply_rope(rms_norm(qk, weight, float(attn.norm_q.eps or 0)), rope).to(v.dtype).split(heads, dim=2)
    return q, k, v


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention, compiled where there is a kernel for it; uncompiled it materializes every score. So it is compiled
    also where nothing else is, as in a training's evaluation, and for any number of lengths."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda and not torch.compiler.is_compiling():
        with torch.compiler.set_stance("default"):
            out: Tensor = _compiled_flex()(q, k, v, block_mask=mask)
    else:
        out = flex_attention(q, k, v, block_mask=mask)
    return out.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)  # beyond it nothing is compiled
    return torch.compile(flex_attention, dynamic=False)


class CrossAttnProcessor:
    """Attention to the text, by torch's scaled_dot_product_attention: not every kernel takes a mask."""

    def __call__(self, attn: CrossAttention, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), text (B, M, D) -> (B, N, D)."""
        q, k, v = (y.view(*y.shape[:2], attn.heads, -1).transpose(1, 2) for y in attn.project(x, text))
        q, k = attn.norm_q(q).to(v.dtype), attn.norm_k(k).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        projected: Tensor = attn.to_out[0](out.reshape(x.shape))
        return projected


class _Attention(FusableAttention):
    """Projections without bias, and RMS norms of every head's queries and keys (2302.05442)."""

    _default_processor_cls: Any

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.norm_q = RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = RMSNorm(dim // heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list, as in diffusers, where a dropout follows
        self.processor: Any = self._default_processor_cls()


class SelfAttention(_Attention):
    """Attention over the video's tokens, with rotated queries and keys (2104.09864)."""

    _default_processor_cls = SelfAttnProcessor
    _available_processors = [SelfAttnProcessor]  # noqa: RUF012  (diffusers reads these names)

    def forward(self, x: Tensor, rope: Rope, groups: tuple[int, ...],
                past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """(B, T, S, D) -> the same shape, and the keys and values of `past` followed by those of `x`.

        `groups` has the tokens of each group: a token sees the past, its own group and earlier ones.
        """
        cos, sin = (table.flatten(0, -3) for table in rope)  # of frames and tokens, or of all tokens
        out, key_value = self.processor(self, x.flatten(1, 2), (cos, sin), groups, past)
        return out.view(x.shape), key_value


class CrossAttention(_Attention):
    """Attention from the video's tokens to the text's; `mask` (B, 1, 1, M) is False at padding."""

    _default_processor_cls = CrossAttnProcessor
    _available_processors = [CrossAttnProcessor]  # noqa: RUF012
    is_cross_attention = True

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, S, D), text (B, M, D) -> (B, T, S, D)."""
        out: Tensor = self.processor(self, x.flatten(1, 2), text, mask)
        return out.view(x.shape)
