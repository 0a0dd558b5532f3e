"""From a prompt, an image or a video to a video of any length: text encoder, transformer, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from odvae.inference.memory import AUTO, MemoryOptions
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import UserError
from odvae.utils.finite import check_finite

from ..condition import Condition, check_text_encoder, conditioner, embedded_condition
from ..defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, HISTORY_GROUPS, HISTORY_NOISE
from ..model.transformer import LVDMTransformer3DModel
from ..text import TextEncoder, TransformersEncoder, WordHashEncoder
from .base import DECODED_AT_ONCE, VideoPipeline
from .inputs import RolloutInputs, SamplingInputs, check_size, latent_lengths, output_size
from .lora import LVDMLoraLoaderMixin
from .offload import Requirements, requirements
from .outputs import LVDMPipelineOutput, SamplingEvent
from .params import check_supported
from .prompts import Prompt, PromptSchedule, prompt_at
from .rollout import Rollout, group_layout
from .rollout_params import RolloutParams
from .schedulers import check_scheduler, make_scheduler


class LVDMPipeline(VideoPipeline, LVDMLoraLoaderMixin):
    """Text or class to video, image to video, and continuation of a video, all by the same rollout.

    What is continued is encoded once, for all prompts, and yielded by `stream` as the first chunks. A group follows the
    prompt that holds at its first frame. Memory and time per chunk do not depend on the length.

    Args:
        vae: `odvae.AutoencoderKLODVAE`.
        transformer: `LVDMTransformer3DModel`, trained on that VAE's normalized latents.
        text_encoder: the one the transformer was trained with, a `WordHashEncoder` or a transformers encoder; None for
            a transformer without text. Prompts are then names of its classes, or "" if it has none.
        tokenizer: that of a transformers encoder, else None. `build` takes the two as one.
        scheduler: a flow-matching scheduler of diffusers, see `schedulers`; None: Euler.

    Raises:
        UserError: the components do not match.
    """

    _optional_components = ["text_encoder", "tokenizer", "scheduler"]  # noqa: RUF012
    inputs_type = RolloutInputs

    def __init__(self, vae: AutoencoderKLODVAE, transformer: LVDMTransformer3DModel,
                 text_encoder: WordHashEncoder | PreTrainedModel | None = None,
                 tokenizer: PreTrainedTokenizerBase | None = None,
                 scheduler: Any = None) -> None:
        super().__init__(vae=vae, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer,
                         scheduler=scheduler or FlowMatchEulerDiscreteScheduler())
        if text_encoder is None or next(text_encoder.parameters(), None) is None:
            self.model_cpu_offload_seq = "transformer->vae"  # accelerate's hook asks for a parameter

    @classmethod
    def build(cls, vae: AutoencoderKLODVAE, transformer: LVDMTransformer3DModel,
              text_encoder: WordHashEncoder | TransformersEncoder | None, scheduler: Any = None) -> LVDMPipeline:
        """Build a pipeline with what `lvdm.text.load_text_encoder` returns."""
        if isinstance(text_encoder, TransformersEncoder):
            return cls(vae, transformer, text_encoder.model, text_encoder.tokenizer, scheduler)
        return cls(vae, transformer, text_encoder, scheduler=scheduler)

    def _check_components(self) -> None:
        """Raise UserError where the components that are there do not match; any may have been assigned since."""
        if self.transformer is not None and self.vae is not None:
            channels, expected = self.vae.latent_channels, self.transformer.config.in_channels
            if channels != expected:
                raise UserError(f"the VAE's latents have {channels} channels, the transformer was made for {expected}: "
                                f"load the components that it was trained with")
        if self.transformer is not None and self.text_encoder is not None:
            check_text_encoder(self.transformer, self.caption_encoder)
        check_scheduler(self.scheduler, self.transformer is not None and self.transformer.config.flow_map)

    def _check_text(self, inputs: SamplingInputs) -> None:
        if self.transformer.config.text_dim:
            super()._check_text(inputs)

    @property
    def caption_encoder(self) -> TextEncoder | None:
        """The text encoder, with its tokenizer where it has one."""
        if self.tokenizer is None or self.text_encoder is None:
            return self.text_encoder
        return TransformersEncoder(self.text_encoder, self.tokenizer)

    @torch.no_grad()
    def __call__(
        self, prompt: Prompt | Sequence[Prompt] | None = None, negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None, width: int | None = None, num_frames: int = 17,
        num_inference_steps: int | None = None, sigmas: Sequence[float] | None = None,
        guidance_scale: float = GUIDANCE_SCALE, num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None, latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None, prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "np", return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_kwargs: dict[str, Any] | None = None, max_sequence_length: int | None = None, image: Any = None,
        video: Any = None, video_latents: Tensor | None = None, seed: int | Sequence[int] | None = None,
        frame_rate: float | None = None, scheduler: Any = None, shift: float | None = None,
        guidance_rescale: float = GUIDANCE_RESCALE, history_groups: int = HISTORY_GROUPS,
        history_noise: float = HISTORY_NOISE, history_follow: float = 0.0, sink_period: int = 0,
        memory: MemoryOptions = AUTO,
    ) -> LVDMPipelineOutput | tuple[Any]:
        """Generate whole videos. `RolloutInputs` says what each argument is.

        Args:
            output_type: "np" (float32 in [0, 1]), "pt", "pil", "uint8", or "latent": not decoded; see `to_output_type`.
            return_dict: False: return the tuple (frames,).

        Raises:
            UserError, NonFiniteError: as `stream`.
        """
        return self._generate(output_type, return_dict, locals())

    def _check_inputs(self, inputs: RolloutInputs) -> tuple[int, int, int]:
        self._check_call(inputs)
        check_scheduler(self.get_scheduler(inputs.scheduler), self.transformer.config.flow_map)
        context, count = inputs.context(), len(inputs.schedules())
        negative = "".join(inputs.negative_prompts(count)) if inputs.negative_prompt_embeds is None else "embeddings"
        check_supported(self.kind, {"guidance_rescale": inputs.guidance_rescale, "negative_prompt": negative},
                        able=self.capabilities)
        latent_lengths(self.vae, inputs.num_frames, context, inputs.video_latents)
        return *output_size(self.vae, self.transformer, inputs.height, inputs.width, context,
                            inputs.video_latents), count

    def _sample(self, inputs: RolloutInputs) -> tuple[Iterable[SamplingEvent], Tensor | None]:
        """Encode the prompts and what is continued; return the rollout, and the latents that it continues."""
        self.upcast_weights()
        schedules, context = inputs.schedules(), inputs.context()
        count, ratio = len(schedules), self.vae.spatial_compression_ratio
        height, width = output_size(self.vae, self.transformer, inputs.height, inputs.width, context,
                                    inputs.video_latents)
        total, given = latent_lengths(self.vae, inputs.num_frames, context, inputs.video_latents)
        condition, null = self._conditions(inputs, schedules)
        initial = self._context_latents(context, inputs.video_latents, count)
        params = {name: getattr(inputs, name) for name in RolloutParams.__dataclass_fields__ if hasattr(inputs, name)}
        if inputs.num_inference_steps is None:
            params["num_inference_steps"] = self.capabilities.num_inference_steps
        rollout = Rollout(
            self.transformer, condition, null, RolloutParams(**params), latents=total - given, height=height // ratio,
            width=width // ratio, seeds=inputs.seeds(count), scheduler=self.get_scheduler(inputs.scheduler),
            initial=initial, device=self._execution_device, noise=inputs.latents,
            attention_kwargs=inputs.attention_kwargs)
        self._begin(inputs, rollout.num_evaluations)

        def on_step(step: int, sigma: float, x: Tensor) -> Tensor:
            before = rollout.condition, rollout.null
            x, *after = self._step_done(inputs, step, torch.tensor(1000 * sigma), x, *before)
            if any(new is not old for new, old in zip(after, before, strict=True)):
                rollout.replace_condition(*after)
            rollout.guidance_scale, rollout.interrupted = self._guidance_scale, self._interrupt
            return x

        rollout.on_step = on_step
        return rollout, initial

    @torch.no_grad()
    def _conditions(self, inputs: RolloutInputs, schedules: Sequence[PromptSchedule],
                    ) -> tuple[Callable[[int], Condition], Condition]:
        """The condition of all samples by a group's first latent frame, and the condition to guide away from."""
        transformer, negative = self.transformer, inputs.negative_prompts(len(schedules))
        texts = list(dict.fromkeys(text for schedule in schedules for _, text in schedule))
        encoder = self.caption_encoder
        if encoder is None and not transformer.config.class_names and any([*texts, *negative]):
            raise UserError("this model takes no prompts, as it was trained without captions and classes; give \"\"")
        encode = conditioner(transformer, None if encoder is None else partial(self._encode_texts,
                                                                               limit=inputs.max_sequence_length))
        single = self.capabilities.passes(inputs.guidance_scale) == 1
        null = Condition() if single else embedded_condition(
            inputs.negative_prompt_embeds, inputs.negative_prompt_embeds_mask, len(schedules)) or encode(negative)
        embedded = embedded_condition(inputs.prompt_embeds, inputs.prompt_embeds_mask, len(schedules))
        encoded = embedded or encode(texts)
        device = self._execution_device
        encoded, null = encoded.to(device), null.to(device)
        for condition in encoded, null:
            if condition.text is not None:
                check_finite(condition.text, "the text encoder", self.text_encoder)
        if embedded is not None:
            return lambda latent: encoded, null
        rows, ratio = {text: i for i, text in enumerate(texts)}, self.vae.temporal_compression_ratio
        rate = inputs.frame_rate or transformer.config.frame_rate

        def condition_at(latent: int) -> Condition:
            second = max(0, 1 + ratio * (latent - 1)) / rate
            return encoded.select([rows[prompt_at(schedule, second)] for schedule in schedules])

        return condition_at, null

    def _context_latents(self, context: np.ndarray | None, initial: Tensor | None, batch: int) -> Tensor | None:
        """The normalized latents to continue, of every sample (B, c, t, h, w); None: there are none."""
        latents = initial if context is None else self.encode_video(context)
        if latents is None:
            return None
        return latents.to(self._execution_device, torch.float32).expand(batch, -1, -1, -1, -1)

    def get_scheduler(self, scheduler: Any = None) -> Any:
        """Return a scheduler, given also by its name (see `schedulers`); None: the pipeline's."""
        return make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler or self.scheduler

    def group_layout(self, latents: int, given: int = 0) -> tuple[int, ...]:
        """Latent frames of each group, see `rollout.group_layout`."""
        return group_layout(latents, given, self.transformer.config.group_size)

    def requirements(self, height: int | None = None, width: int | None = None, batch: int = 1) -> Requirements:
        """Estimate the memory for `batch` videos of this many pixels (None: the transformer's own size)."""
        config = self.transformer.config
        height = config.sample_height if height is None else height
        width = config.sample_width if width is None else width
        check_size(self.vae, self.transformer, height, width)
        frames = DECODED_AT_ONCE * self.vae.temporal_compression_ratio
        return requirements(self.components, height, width, batch, frames)
