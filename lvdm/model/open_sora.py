"""The transformer of Open-Sora-Plan v1.2, the system that the OD-VAE was made for: full 3D attention, 2.7 B weights.

Shapes: B batch, T latent frames, N = T*h*w/4 tokens, L text tokens, H heads, d width of a head, D = H*d.
Source: Open-Sora-Plan (2412.00131), tag v1.2.0; the block is PixArt-alpha's (2310.00426).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.utils.peft_utils import apply_lora_scale
from einops import rearrange
from torch import Tensor, nn

from odvae.utils.errors import UserError

from .compilation import CompiledBlocksMixin
from .norm import LayerNorm
from .projections import FusableAttention
from .rope import RopeCache

MASKED = -10000.0  # added to the score of a padding token; a row of padding alone attends to all of it alike
ROPE_BASE = 10000.0

Rope = tuple[Tensor, Tensor]  # cosines and sines, each (N, 1, 3, d / 6)


class OpenSoraAttnProcessor:
    """Scaled dot-product attention by the kernel that `set_attention_backend` chose for this model. Diffusers' choice
    for the whole process does not count: what a model computes follows from its own state (`module_state`)."""

    _attention_backend: AttentionBackendName | None = None  # None: torch's scaled_dot_product_attention
    _parallel_config = None

    def __call__(self, attn: OpenSoraAttention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, rope: Rope | None = None) -> Tensor:
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in attn.project(
            hidden_states, encoder_hidden_states))
        if rope is not None:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        backend = self._attention_backend if attention_mask is None else None  # the default takes masks
        if backend is AttentionBackendName.FLEX:  # all tokens see all: nothing to skip, and uncompiled it writes out
            backend = None  # all scores
        out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask,
                                    backend=backend or AttentionBackendName.NATIVE,
                                    parallel_config=self._parallel_config if rope is not None else None)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).to(hidden_states.dtype)))


class OpenSoraAttention(FusableAttention):
    """Self-attention, or attention to the text."""

    _default_processor_cls = OpenSoraAttnProcessor
    _available_processors = [OpenSoraAttnProcessor]  # noqa: RUF012  (diffusers reads these names)

    processor: OpenSoraAttnProcessor

    def __init__(self, dim: int, heads: int, *, bias: bool, cross: bool) -> None:
        super().__init__()
        self.heads, self.is_cross_attention = heads, cross
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.processor = OpenSoraAttnProcessor()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                attention_mask: Tensor | None = None, rope: Rope | None = None) -> Tensor:
        """(B, N, D), text (B, L, D) -> (B, N, D)."""
        out: Tensor = self.processor(self, hidden_states, encoder_hidden_states, attention_mask, rope)
        return out


class OpenSoraBlock(nn.Module):
    """Self-attention, cross-attention, MLP; the timestep modulates the first and the last (adaLN-single)."""

    def __init__(self, dim: int, heads: int, *, bias: bool, eps: float) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.norm1 = LayerNorm(dim, eps)
        self.attn1 = OpenSoraAttention(dim, heads, bias=bias, cross=False)
        self.attn2 = OpenSoraAttention(dim, heads, bias=bias, cross=True)
        self.norm2 = LayerNorm(dim, eps)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,
                encoder_attention_mask: Tensor | None, rope: Rope) -> Tensor:
        """(B, N, D), modulation (B, 6, D), text (B, L, D), mask (B, 1, 1, L) -> (B, N, D)."""
        x = hidden_states  # under autocast its dtype is not that of the weights
        modulation = (self.scale_shift_table + timestep).to(x.dtype).unsqueeze(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1, rope=rope)
        x = x + self.attn2(x, encoder_hidden_states, encoder_attention_mask)
        return x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)


TransformerBlockRegistry.register(OpenSoraBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class OpenSoraT2VTransformer3DModel(CompiledBlocksMixin, ModelMixin, ConfigMixin, AttentionMixin, CacheMixin,
                                    PeftAdapterMixin):
    """Predicts the noise (epsilon) of a latent video, or of an image as a video of one frame, conditioned on text.

    The arguments are those of the public `config.json`, as far as they vary.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["OpenSoraBlock"]  # noqa: RUF012  (diffusers reads these names)
    _repeated_blocks = ["OpenSoraBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 24,
        attention_head_dim: int = 96,           # a multiple of 6: three axes, each half cosines, half sines
        in_channels: int = 4,
        out_channels: int | None = None,        # None: in_channels
        num_layers: int = 32,
        caption_channels: int = 4096,           # width of the text encoder's states
        attention_bias: bool = True,
        norm_eps: float = 1e-6,
        patch_size: int = 2,                    # latent pixels a token's side
        sample_size: tuple[int, int] = (60, 80),  # latent height and width of the videos that it was trained on
        sample_size_t: int = 24,                # latent frames
        interpolation_scale_t: float = 1.0,     # positions are divided by it, an axis
        interpolation_scale_h: float = 1.0,
        interpolation_scale_w: float = 1.0,
    ) -> None:
        super().__init__()
        if attention_head_dim % 6:
            raise UserError(f"attention_head_dim {attention_head_dim} must be a multiple of 6 (rotary embedding over "
                            "three axes)")
        dim = num_attention_heads * attention_head_dim
        self.pos_embed = PatchEmbedding(in_channels, dim, patch_size)
        self.adaln_single = AdaLayerNormSingle(dim)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            OpenSoraBlock(dim, num_attention_heads, bias=attention_bias, eps=norm_eps) for _ in range(num_layers))
        self.norm_out = LayerNorm(dim, norm_eps)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size**2 * (out_channels or in_channels))
        self.gradient_checkpointing = False
        self._rope_cache = RopeCache()

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,          # (B, c, T, h, w) scaled latents
        timestep: Tensor,               # (B,) or (), in [0, 1000)
        encoder_hidden_states: Tensor,  # (B, L, caption_channels)
        encoder_attention_mask: Tensor | None = None,  # (B, L), 0 or False at padding
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,  # "scale": of the LoRA adapters, in place of their own
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the predicted noise, (B, c', T, h, w).

        Raises:
            UserError: latents of another number of channels, or whose sides are no multiples of the patch size.
        """
        batch, channels, frames, height, width = hidden_states.shape
        p = self.config.patch_size
        if channels != self.config.in_channels or height % p or width % p:
            raise UserError(f"latents must be (B, {self.config.in_channels}, T, h, w) with sides in steps of {p}, got "
                            f"{tuple(hidden_states.shape)}")
        x = self.pos_embed(hidden_states)
        modulation, embedded = self.adaln_single(timestep.expand(batch), batch_size=batch, hidden_dtype=x.dtype)
        modulation = modulation.view(batch, 6, -1)
        text = self.caption_projection(encoder_hidden_states)
        mask = None
        if encoder_attention_mask is not None:
            mask = (1 - encoder_attention_mask[:, None, None].to(x.dtype)) * MASKED
        rope = self._rope(frames, height // p, width // p, x.device)

        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, modulation, text, mask, rope)
            else:
                x = block(x, modulation, text, mask, rope)

        shift, scale = (self.scale_shift_table + embedded[:, None]).to(x.dtype).unsqueeze(2).unbind(1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        sample = rearrange(x, "b (t h w) (p q c) -> b c t (h p) (w q)", t=frames, h=height // p, p=p, q=p)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def flops(self, batch: int, frames: int, height: int, width: int, text_tokens: int) -> int:
        """Count the multiplications and additions in matrix products of one forward pass over `batch` latents of
        frames x height x width; a training step takes three times as many."""
        config = self.config
        dim, patch = config.num_attention_heads * config.attention_head_dim, config.patch_size**2
        tokens = frames * height * width // patch
        block = dim * (dim * (14 * tokens + 2 * text_tokens) + 2 * tokens * (tokens + text_tokens))
        outside = tokens * patch * dim * (config.in_channels + (config.out_channels or config.in_channels))
        outside += dim * (text_tokens * (config.caption_channels + dim) + 256 + 7 * dim)
        return 2 * batch * (config.num_layers * block + outside)

    def _rope(self, frames: int, height: int, width: int, device: torch.device) -> Rope:
        """Rotary tables of all tokens, one third of a head's width an axis."""
        if torch.compiler.is_compiling():
            return self._make_rope(frames, height, width, device)
        return self._rope_cache.get((frames, height, width, device),
                                    lambda: self._make_rope(frames, height, width, device))

    def _make_rope(self, frames: int, height: int, width: int, device: torch.device) -> Rope:
        config = self.config
        part = config.attention_head_dim // 3
        frequencies = ROPE_BASE ** (-torch.arange(0, part, 2, device=device, dtype=torch.float32) / part)
        axes = [torch.arange(n, device=device, dtype=torch.float32) / scale for n, scale in (
            (frames, config.interpolation_scale_t), (height, config.interpolation_scale_h),
            (width, config.interpolation_scale_w))]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # (N, 3)
        angles = (positions[:, :, None] * frequencies).unsqueeze(1)
        return angles.cos(), angles.sin()


class PatchEmbedding(nn.Module):
    """Patches of every frame as tokens: (B, c, T, h p, w p) -> (B, T h w, D)."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.proj(rearrange(latents, "b c t h w -> (b t) c h w"))
        return rearrange(tokens, "(b t) d h w -> b (t h w) d", b=len(latents))


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate queries or keys (B, N, H, d): the two halves of each axis's third of d by its angle (2104.09864)."""
    cos, sin = rope
    first, second = x.unflatten(-1, (3, 2, -1)).float().unbind(-2)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return rotated.flatten(-3).to(x.dtype)
