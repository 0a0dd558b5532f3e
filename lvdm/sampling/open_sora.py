"""Open-Sora-Plan v1.2, text to video: the whole video is denoised at once, then decoded group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from odvae.inference.memory import AUTO, MemoryOptions, StreamPlan, free_memory, memory_estimate
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import UserError
from odvae.utils.finite import FiniteChecks, check_finite, non_finite
from odvae.utils.seeding import generator as make_generator

from ..capabilities import PIPELINES
from ..condition import Condition, embedded_condition
from ..model.open_sora import OpenSoraT2VTransformer3DModel
from ..text import TransformersEncoder
from .base import VideoPipeline
from .inputs import SamplingInputs, check_multiples
from .lora import LVDMLoraLoaderMixin
from .offload import Requirements, component_bytes
from .outputs import LVDMPipelineOutput, RolloutGroup, RolloutStep, SamplingEvent
from .schedulers import check_epsilon_scheduler, make_epsilon_scheduler, place_sigmas, step_arguments

DEFAULTS = PIPELINES["OpenSoraPipeline"]
GROUP_FRAMES = 28  # new frames of a group that is decoded: with the shared one the 29 of the paper's temporal tiling
MAX_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class OpenSoraInputs(SamplingInputs):
    """The arguments of `OpenSoraPipeline`."""

    num_frames: int | None = None       # type: ignore[assignment]  # 1 + 4k; None: the transformer's own length
    num_inference_steps: int = DEFAULTS.num_inference_steps
    guidance_scale: float = DEFAULTS.guidance_scale


class OpenSoraPipeline(VideoPipeline, LVDMLoraLoaderMixin):
    """Text to video with the public weights of Open-Sora-Plan v1.2 (2412.00131), as `lvdm import` writes them.

    Args:
        vae: the OD-VAE, imported by `odvae.convert.open_sora_plan`; its `normalize` is the public scale factor.
        transformer: `OpenSoraT2VTransformer3DModel`, which predicts epsilon, or v where the scheduler's config says so.
        text_encoder: mT5-XXL's encoder or another whose states have the transformer's `caption_channels`.
        tokenizer: its tokenizer.
        scheduler: one of diffusers' for epsilon, see `schedulers`; None: ancestral Euler.

    Raises:
        UserError: the components do not match.
    """

    _optional_components = ["scheduler"]  # noqa: RUF012  (diffusers reads this name)
    inputs_type = OpenSoraInputs

    def __init__(self, vae: AutoencoderKLODVAE, transformer: OpenSoraT2VTransformer3DModel,
                 text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scheduler: Any = None) -> None:
        super().__init__(vae=vae, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer,
                         scheduler=scheduler or EulerAncestralDiscreteScheduler())

    def _check_components(self) -> None:
        """Raise UserError where the components that are there do not match; any may have been assigned since."""
        transformer, encoder = self.transformer, self.caption_encoder
        for name, given, expected in (
                ("the VAE's latents", self.vae and self.vae.latent_channels, transformer and
                 transformer.config.in_channels),
                ("the text encoder's states", encoder and encoder.dim, transformer and
                 transformer.config.caption_channels)):
            if given and expected and given != expected:
                raise UserError(f"{name} have {given} channels, the transformer was made for {expected}: load the "
                                "components that it was trained with")
        check_epsilon_scheduler(self.scheduler)

    @property
    def caption_encoder(self) -> TransformersEncoder | None:
        """The text encoder with its tokenizer; the model was trained on prompts in lower case."""
        return self.text_encoder and TransformersEncoder(self.text_encoder, self.tokenizer, MAX_TOKENS, lower=True)

    @torch.no_grad()
    def __call__(
        self, prompt: str | Sequence[str] | None = None, negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None, width: int | None = None, num_frames: int | None = None,
        num_inference_steps: int = DEFAULTS.num_inference_steps, sigmas: Sequence[float] | None = None,
        guidance_scale: float = DEFAULTS.guidance_scale, num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None, latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None, prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "np", return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_kwargs: dict[str, Any] | None = None, max_sequence_length: int | None = None,
        seed: int | Sequence[int] | None = None, frame_rate: float | None = None, scheduler: Any = None,
        memory: MemoryOptions = AUTO,
    ) -> LVDMPipelineOutput | tuple[Any]:
        """Generate whole videos. `OpenSoraInputs` says what each argument is; output_type and return_dict are those of
        `LVDMPipeline`.

        Raises:
            UserError, NonFiniteError: as `stream`.
        """
        return self._generate(output_type, return_dict, locals())

    def _check_inputs(self, inputs: OpenSoraInputs) -> tuple[int, int, int]:
        self._check_call(inputs)
        check_epsilon_scheduler(self.get_scheduler(inputs.scheduler))
        schedules = inputs.schedules()
        if any(len(schedule) > 1 for schedule in schedules):
            raise UserError(f"sections: {DEFAULTS.unsupported['sections']}; give one prompt")
        if inputs.num_inference_steps < 1:
            raise UserError(f"num_inference_steps must be at least 1, got {inputs.num_inference_steps}")
        self.vae.latent_frames(self._num_frames(inputs))
        return *self._size(inputs.height, inputs.width), len(schedules)

    def _num_frames(self, inputs: OpenSoraInputs) -> int:
        own = 1 + self.vae.temporal_compression_ratio * (self.transformer.config.sample_size_t - 1)
        return inputs.num_frames or own

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Pixels of the result: those requested, or the transformer's own."""
        ratio = self.vae.spatial_compression_ratio
        own = [ratio * side for side in self.transformer.config.sample_size]
        height, width = height or own[0], width or own[1]
        check_multiples(ratio * self.transformer.config.patch_size, height, width)
        return height, width

    def _sample(self, inputs: OpenSoraInputs) -> tuple[Iterator[SamplingEvent], None]:
        self.upcast_weights()
        height, width, count = self._check_inputs(inputs)
        ratio = self.vae.spatial_compression_ratio
        shape = (self.transformer.config.in_channels, self.vae.latent_frames(self._num_frames(inputs)),
                 height // ratio, width // ratio)
        if inputs.latents is not None and inputs.latents.shape != (count, *shape):
            raise UserError(f"latents must be (B, c, T, h, w) = {(count, *shape)}, got {tuple(inputs.latents.shape)}")
        condition, null = self._conditions(inputs, count)
        scheduler = self.get_scheduler(inputs.scheduler)
        scheduler = type(scheduler).from_config(scheduler.config)  # with a state of its own
        # Timesteps stay on the CPU: a scheduler that reads one on the device would wait for it at every step.
        if inputs.sigmas is None:
            scheduler.set_timesteps(inputs.num_inference_steps)
        else:
            scheduler.set_timesteps(sigmas=list(inputs.sigmas))
        self._begin(inputs, len(scheduler.timesteps))
        return self._denoise(inputs, scheduler, inputs.seeds(count), shape, condition, null), None

    @torch.no_grad()
    def _denoise(self, inputs: OpenSoraInputs, scheduler: Any, seeds: Sequence[int], shape: Sequence[int],
                 condition: Condition, null: Condition) -> Iterator[SamplingEvent]:
        device, dtype = self._execution_device, self.transformer.dtype
        extra, checks = step_arguments(scheduler, seeds), FiniteChecks()
        x = inputs.latents
        if x is None:
            x = torch.stack([torch.randn(*shape, generator=make_generator(seed, "noise", 0)) for seed in seeds])
        x = x.to(device, torch.float32) * scheduler.init_noise_sigma
        place_sigmas(scheduler, device)
        steps, guided = len(scheduler.timesteps), inputs.guidance_scale != 1
        for step, timestep in enumerate(scheduler.timesteps):
            rows = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, timestep).to(dtype)
            text = null.concat(condition) if guided else condition
            timesteps = torch.full((len(rows),), timestep.item(), dtype=timestep.dtype, device=device)
            with self.transformer.cache_context("sampling"):
                noise = self.transformer(rows, timesteps, text.text, text.text_mask,
                                         return_dict=False, attention_kwargs=self.attention_kwargs)[0].float()
            if guided:
                negative, positive = noise.chunk(2)
                noise = negative + self.guidance_scale * (positive - negative)
            checks.add(noise, lambda _: non_finite("the transformer", self.transformer))
            out = scheduler.step(noise, timestep, x, **extra)
            x, condition, null = self._step_done(inputs, step, timestep, out.prev_sample, condition, null)
            yield RolloutStep(1, 1, step + 1, steps, getattr(out, "pred_original_sample", None))
            if self.interrupt:
                break
        checks.settle()
        yield RolloutGroup(1, 1, x)

    def _conditions(self, inputs: OpenSoraInputs, count: int) -> tuple[Condition, Condition]:
        """The text's states for all videos, and those of what guidance leads away from (without guidance: none)."""
        limit = inputs.max_sequence_length
        condition = embedded_condition(inputs.prompt_embeds, inputs.prompt_embeds_mask, count) \
            or Condition(*self._encode_texts([schedule[0][1] for schedule in inputs.schedules()], limit))
        null = Condition()
        if inputs.guidance_scale != 1:
            null = embedded_condition(inputs.negative_prompt_embeds, inputs.negative_prompt_embeds_mask, count) \
                or Condition(*self._encode_texts(inputs.negative_prompts(count), limit))
            rows = len(null.arguments["text"])
            null = null.select([i % rows for i in range(count)])
        return self._computed(condition), self._computed(null)

    def _computed(self, condition: Condition) -> Condition:
        """Check a condition and bring it to where the transformer computes."""
        if condition.text is None:
            return condition
        check_finite(condition.text, "the text encoder", self.text_encoder)
        return replace(condition, text=condition.text.to(self.transformer.dtype)).to(self._execution_device)

    def get_scheduler(self, scheduler: Any = None) -> Any:
        """Return a scheduler, given also by its name (see `schedulers`); None: the pipeline's. Raises UserError for one
        that does not take what the model predicts, which the pipeline's own says."""
        own = self.scheduler
        scheduler = make_epsilon_scheduler(scheduler, own) if isinstance(scheduler, str) else scheduler or own
        check_epsilon_scheduler(scheduler, [own.config.prediction_type])
        return scheduler

    def group_layout(self, latents: int, given: int = 0) -> tuple[int, ...]:
        """Latent frames of each group that is decoded: 8, then 7 more each, as the paper's temporal tiling has it."""
        size = GROUP_FRAMES // self.vae.temporal_compression_ratio
        first = min(1 + size, latents)
        more, rest = divmod(latents - first, size)
        return (first, *[size] * more, *([rest] if rest else []))

    def _groups_of(self, event: RolloutGroup) -> Sequence[Tensor]:
        return event.latents.split(self.group_layout(event.latents.shape[2]), dim=2)

    def decode_plan(self, memory: MemoryOptions, height: int, width: int, batch: int = 1) -> StreamPlan:
        """Plan decoding within `memory`, a group's frames at once at most."""
        free = free_memory(self._vae_device) if memory.free is None else memory.free
        frames = GROUP_FRAMES if memory.frames is None or not self.vae.causal else min(GROUP_FRAMES, memory.frames)
        return replace(memory, free=free, frames=frames).plan(self.vae, "decode", height, width, batch)

    def requirements(self, height: int | None = None, width: int | None = None, batch: int = 1) -> Requirements:
        """Estimate the memory for `batch` videos of this many pixels (None: the transformer's own size)."""
        height, width = self._size(height, width)
        decoding = memory_estimate(self.vae, "decode", height, width, frames=GROUP_FRAMES, batch=batch)
        return Requirements(component_bytes(self.components), 0, decoding)
