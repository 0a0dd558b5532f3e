"""The diffusion transformer: bidirectional inside a group of latent frames, causal across groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale
from einops import rearrange
from torch import Tensor, nn

from odvae.utils.errors import UserError

from .attention import CrossAttention, KeyValue
from .blocks import Block, modulate
from .compilation import CompiledBlocksMixin, forward_by_group, mark_history
from .groups import attention_pairs, frame_positions, group_sizes
from .input_checks import check_inputs, nearest_multiple
from .norm import RMSNorm
from .presets import PRESETS
from .projections import FusableAttention
from .rope import Rope, RotaryEmbedding
from .time_embedding import FEATURES, ScalarEmbedding

History = tuple[KeyValue, ...]  # (keys, values) per layer of earlier tokens, which every new token sees


@dataclass
class LVDMTransformerOutput(Transformer2DModelOutput):
    """`sample`: velocity (B, c, T, h, w). `history`: keys and values of all tokens so far, if requested."""

    history: History | None = None


class LVDMTransformer3DModel(CompiledBlocksMixin, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """Predicts the velocity e - x_0 of a latent video in which every latent frame has its own noise level.

    Tokens of a group see each other, earlier groups and the text. With one group this is an ordinary DiT. Earlier
    groups can be passed as `history` in place of their latents: state is an argument and a return value.

    It is conditioned on text (`text_dim`), on a class (`class_names`), on both or on nothing. A flow map (`flow_map`)
    predicts the average velocity from `timestep` down to `target_timestep`, which is the velocity where they are equal.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (diffusers reads these names)
    _repeated_blocks = ["Block"]  # noqa: RUF012
    # `enable_parallelism` (Ulysses): each process has a part of every frame's tokens, so that it has its share of every
    # group and of every history. The number of heads and of a frame's tokens must be divisible by the processes.
    _cp_plan = {  # noqa: RUF012
        "patch_embed": {0: ContextParallelInput(split_dim=2, expected_dims=4, split_output=True)},
        "rope": {i: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True) for i in (0, 1)},
        "project_out": ContextParallelOutput(gather_dim=2, expected_dims=4),
    }
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        "patch_embed", "norm", "time_embed", "interval_embed", "guidance_embed", "adaln"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,          # latent channels of the VAE
        patch_size: int = 2,           # side of a token in latent pixels
        hidden_size: int = 192,
        num_layers: int = 8,
        num_attention_heads: int = 6,
        mlp_ratio: float = 4.0,        # MLP width / hidden_size
        text_dim: int = 256,           # width of the text encoder's states; 0: no text
        class_names: Sequence[str] = (),  # label i is the i-th; the label after the last means no class
        group_size: int = 2,           # latent frames that are generated together
        frame_rate: float = 8.0,       # frames per second at which one latent frame is one position in time
        rope_theta: float = 100.0,     # slowest rotation: 1/theta radians per position
        sample_height: int = 64,       # pixels of the training videos
        sample_width: int = 64,
        flow_map: bool = False,        # takes a target timestep, see `lvdm.flow_map`
        guidance_embeds: bool = False,  # takes the guidance scale: a single pass predicts the guided velocity
    ) -> None:
        super().__init__()
        if hidden_size % num_attention_heads:
            raise UserError(f"hidden_size {hidden_size} must be a multiple of num_attention_heads "
                            f"{num_attention_heads}; the nearest is "
                            f"{nearest_multiple(hidden_size, num_attention_heads)}")
        head_dim = hidden_size // num_attention_heads
        if head_dim % 2 or head_dim < 6:
            raise UserError(f"hidden_size / num_attention_heads = {head_dim} must be even and at least 6 "
                            "(rotary embedding over three axes)")
        patch = in_channels * patch_size**2
        self.patch_embed = nn.Linear(patch, hidden_size)
        self.first_embed = nn.Parameter(torch.zeros(hidden_size))  # marks a clip's first latent: one frame, not four
        self.rope = RotaryEmbedding(head_dim, rope_theta)
        self.time_embed = ScalarEmbedding(hidden_size, 1000)
        self.interval_embed = ScalarEmbedding(hidden_size, 100) if flow_map else None
        self.guidance_embed = ScalarEmbedding(hidden_size, 10) if guidance_embeds else None
        self.adaln = nn.Linear(hidden_size, 6 * hidden_size)
        self.text_norm = RMSNorm(text_dim, eps=1e-6) if text_dim else None
        self.text_embed = PixArtAlphaTextProjection(text_dim, hidden_size) if text_dim else None
        self.class_embed = nn.Embedding(len(class_names) + 1, hidden_size) if class_names else None
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_attention_heads, int(hidden_size * mlp_ratio), text=bool(text_dim))
            for _ in range(num_layers))
        self.final_adaln = nn.Linear(hidden_size, 2 * hidden_size)
        self.project_out = nn.Linear(hidden_size, patch)
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for every matrix, where projections of the same input count as one; zero for what makes a block the
        identity and the output zero (DiT, 2212.09748), and for what makes an interval and a guidance scale unseen."""
        gains: dict[nn.Module, float] = {}
        for module in self.modules():
            if isinstance(module, FusableAttention):
                layers = module.joint_layers()
                gains |= dict.fromkeys(layers, math.sqrt(2 / (1 + len(layers))))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gains.get(module, 1.0))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zero: list[Any] = [self.adaln, self.final_adaln, self.project_out]
        zero += [module.to_out[0] for module in self.modules() if isinstance(module, CrossAttention)]
        zero += [embed.linear_2 for embed in (self.interval_embed, self.guidance_embed) if embed is not None]
        for linear in zero:
            nn.init.zeros_(linear.weight)
        if self.class_embed is not None:
            nn.init.normal_(self.class_embed.weight, std=0.02)

    @classmethod
    def from_preset(cls, name: str, **config: Any) -> LVDMTransformer3DModel:
        """Create a model of a size of `PRESETS`; `config` has the constructor's arguments, which override the preset's.

        Raises:
            UserError: unknown preset.
        """
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | config)

    @property
    def no_class(self) -> int:
        """The label that means no class."""
        return len(self.config.class_names)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        latents: Tensor,                      # (B, c, T, h, w) normalised, each frame at its own noise level
        timestep: Tensor,                     # (B, T) in [0, 1], 1 = pure noise
        text: Tensor | None = None,           # (B, M, text_dim)
        text_mask: Tensor | None = None,      # (B, M) bool, False at padding, a True in every row; None: all True
        class_labels: Tensor | None = None,   # (B,) of `class_names`, or `no_class`
        *,
        target_timestep: Tensor | None = None,  # (B, T) r <= timestep, of a flow map; None: r = timestep
        guidance: Tensor | None = None,       # (B,) scale, with `guidance_embeds`; None: 1, no guidance
        groups: Sequence[int] | None = None,  # latent frames per group; None: `group_sizes` of the config
        positions: Sequence[int] | None = None,  # of the T latents in time, 0 = the clip's first; None: 0, 1, 2 ...
        frame_rate: float | None = None,      # of the videos; None: the config's
        history: History | None = None,       # keys and values of earlier groups
        return_history: bool = False,
        attention_kwargs: dict[str, Any] | None = None,  # "scale": of the LoRA adapters, in place of their own
        return_dict: bool = True,
    ) -> LVDMTransformerOutput | tuple[Any, ...]:
        """Velocity (B, c, T, h, w); with `return_history` also `history` followed by these latents' keys and values.

        Without `return_dict` the tuple (velocity,) or (velocity, history).

        Raises:
            UserError: channels or sides that do not match the config, groups that do not sum to T, not T positions, a
                missing condition, or an argument that the model does not take.
        """
        check_inputs(self, latents, timestep, target_timestep, guidance, text, class_labels)
        groups, positions = self._resolve_layout(latents.shape[2], groups, positions)
        if self.compiled and return_history and len(groups) > 1:
            condition = {"text": text, "text_mask": text_mask, "class_labels": class_labels, "guidance": guidance,
                         "frame_rate": frame_rate}
            sample, history = forward_by_group(self, latents, timestep, target_timestep, groups, positions, history,
                                               condition)
            return LVDMTransformerOutput(sample=sample, history=history) if return_dict else (sample, history)
        if self.compiled and history is not None:
            mark_history(history)
        h, w = (side // self.config.patch_size for side in latents.shape[3:])

        dtype = self.first_embed.dtype  # what weights compute in; quantizers and casting hooks leave this one alone
        x = self._embed_latents(latents.to(dtype), positions)
        time = self._embed_time(timestep, target_timestep, guidance, class_labels, dtype)
        context = self._embed_text(text, dtype)
        mask = None if text_mask is None else text_mask[:, None, None]
        rope = self._rope(positions, frame_rate, h, w, latents.device)
        tokens = tuple(frames * h * w for frames in groups)

        modulation, key_values = self.adaln(time), []
        for i, block in enumerate(self.blocks):
            args = (x, modulation, rope, tokens, context, mask, None if history is None else history[i])
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, key_value = self._gradient_checkpointing_func(block, *args)
            else:
                x, key_value = block(*args)
            if return_history:
                key_values.append(key_value)

        sample = self._unembed(x, time, h)
        if not return_dict:
            return (sample, tuple(key_values)) if return_history else (sample,)
        return LVDMTransformerOutput(sample=sample, history=tuple(key_values) if return_history else None)

    def _resolve_layout(self, frames: int, groups: Sequence[int] | None,
                        positions: Sequence[int] | None) -> tuple[Sequence[int], Sequence[int]]:
        """Groups and positions as given, or the config's; raises UserError if they do not fit the frames."""
        if positions is None:
            positions = frame_positions(frames, self.config.group_size)
        elif len(positions) != frames:
            raise UserError(f"{len(positions)} positions for {frames} latent frames; give one per frame")
        if groups is None:
            groups = group_sizes(frames, self.config.group_size, first_alone=positions[0] == 0)
        elif sum(groups) != frames or min(groups) < 1:
            raise UserError(f"groups {tuple(groups)} must be positive and sum to the {frames} latent frames")
        return groups, positions

    def _embed_latents(self, latents: Tensor, positions: Sequence[int]) -> Tensor:
        """Embed patches: (B, c, T, h p, w p) -> (B, T, h w, hidden_size)."""
        p = self.config.patch_size
        x: Tensor = self.patch_embed(rearrange(latents, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p))
        if positions[0] == 0:  # not in place: with context parallelism it is one of several views
            x = torch.cat([x[:, :1] + self.first_embed.to(x.dtype), x[:, 1:]], dim=1)
        return x

    def _embed_time(self, timestep: Tensor, target_timestep: Tensor | None, guidance: Tensor | None,
                    class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embed noise levels and where they lead, (B, T), the guidance and the class, (B,) -> (B, T, hidden_size)."""
        time: Tensor = self.time_embed(timestep, dtype)
        if self.interval_embed is not None:
            time = time + self.interval_embed(timestep - (timestep if target_timestep is None else target_timestep),
                                              dtype)
        if self.guidance_embed is not None:
            guidance = timestep.new_ones(len(timestep)) if guidance is None else guidance
            time = time + self.guidance_embed(guidance, dtype).unsqueeze(1)
        if self.class_embed is not None:
            time = time + self.class_embed(class_labels).unsqueeze(1)
        return nn.functional.silu(time)

    def _embed_text(self, text: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Embed text: (B, M, text_dim) -> (B, M, hidden_size)."""
        if self.text_embed is None or self.text_norm is None or text is None:
            return None
        embedded: Tensor = self.text_embed(self.text_norm(text.to(dtype)))
        return embedded

    def _rope(self, positions: Sequence[int], frame_rate: float | None, h: int, w: int,
              device: torch.device) -> Rope:
        """Rotary tables. A position is a duration: at twice the frame rate, latent frames are half as far apart."""
        spacing = self.config.frame_rate / (frame_rate or self.config.frame_rate)
        tables: Rope = self.rope([spacing * position for position in positions], h, w, device)
        return tables

    def _unembed(self, x: Tensor, time: Tensor, h: int) -> Tensor:
        """Project tokens back to latents: (B, T, h w, hidden_size) -> (B, c, T, h p, w p)."""
        shift, scale = self.final_adaln(time).unsqueeze(2).chunk(2, dim=-1)
        p = self.config.patch_size
        return rearrange(self.project_out(modulate(x, shift, scale)), "b t (h w) (c p q) -> b c t (h p) (w q)",
                         h=h, p=p, q=p)

    def flops(self, batch: int, frames: int, height: int, width: int, text_tokens: int = 0,
              groups: Sequence[int] | None = None) -> int:
        """Count the multiplications and additions in matrix products of one forward pass over `batch` latents of
        frames x height x width; a training step takes three times as many."""
        config = self.config
        dim, patch = config.hidden_size, config.in_channels * config.patch_size**2
        space = height * width // config.patch_size**2
        tokens = frames * space
        groups = group_sizes(frames, config.group_size) if groups is None else groups
        mlp = int(dim * config.mlp_ratio)
        pairs = attention_pairs([space * group for group in groups])
        block = tokens * (4 * dim * dim + 2 * dim * mlp) + 2 * dim * pairs
        outside = 2 * tokens * patch * dim + frames * (FEATURES + 9 * dim) * dim
        outside += (frames * config.flow_map + config.guidance_embeds) * (FEATURES + dim) * dim
        if config.text_dim:
            block += (2 * tokens + 2 * text_tokens) * dim * dim + 2 * dim * tokens * text_tokens
            outside += text_tokens * (config.text_dim + dim) * dim
        return 2 * batch * (config.num_layers * block + outside)
