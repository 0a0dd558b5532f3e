"""From a prompt, an image or a video to a video of any length: text encoder, transformer, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from odvae.data.transforms import to_tensor
from odvae.inference.memory import AUTO, MemoryOptions, StreamPlan, auto_plan, free_memory
from odvae.inference.streaming import encode_stream
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import UserError
from odvae.utils.finite import check_finite
from odvae.utils.precision import upcast_unsupported

from ..condition import Condition, check_text_encoder, conditioner
from ..defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, HISTORY_GROUPS, HISTORY_NOISE, STEPS
from ..model.transformer import LVDMTransformer3DModel
from ..text import TextEncoder, TransformersEncoder, WordHashEncoder
from .group_decoder import GroupDecoder
from .inputs import check_size, context_video, latent_lengths, one_per_prompt, output_size
from .offload import Requirements, offload_blocks, onload, requirements
from .outputs import DecodeProgress, LVDMPipelineOutput, VideoChunk
from .prompts import Prompt, as_list, prompt_at
from .rollout import RolloutGroup, RolloutStep, group_layout, rollout
from .schedulers import check_scheduler, make_scheduler

DECODED_AT_ONCE = 2  # latent frames; bounds the memory
ENCODED_AT_ONCE = 8  # frames


class LVDMPipeline(DiffusionPipeline):
    """Text or class to video, image to video, and continuation of a video, all by the same rollout.

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

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _exclude_from_cpu_offload = ["vae"]  # noqa: RUF012  (diffusers reads these names)
    _optional_components = ["text_encoder", "tokenizer", "scheduler"]  # noqa: RUF012

    def __init__(self, vae: AutoencoderKLODVAE, transformer: LVDMTransformer3DModel,
                 text_encoder: nn.Module | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
                 scheduler: Any = None) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer,
                              scheduler=scheduler or FlowMatchEulerDiscreteScheduler())
        self._check_components()
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
        """Raise UserError where the components do not match; any of them may have been assigned since."""
        channels, expected = self.vae.latent_channels, self.transformer.config.in_channels
        if channels != expected:
            raise UserError(f"the VAE's latents have {channels} channels, the transformer was made for {expected}: "
                            f"load the components that it was trained with")
        check_text_encoder(self.transformer, self.caption_encoder)
        check_scheduler(self.scheduler)

    @property
    def caption_encoder(self) -> TextEncoder | None:
        """The text encoder, with its tokenizer where it has one."""
        if self.tokenizer is None:
            return self.text_encoder
        return TransformersEncoder(self.text_encoder, self.tokenizer)

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],  # per video, text or a schedule of (from second, text): see `prompts`
        *,
        frames: int = 17,                   # of the whole result, 1 + 4k, including the image or video it continues
        negative_prompt: str | Sequence[str] = "",  # what guidance leads away from; one per prompt, or one for all
        scheduler: Any = None,              # diffusers' or a name, see `schedulers`; None: the pipeline's
        steps: int = STEPS,                 # of the scheduler, per group of latents
        guidance_scale: float = GUIDANCE_SCALE,  # 1: no guidance, at half the cost
        shift: float | None = None,         # > 1: more of the steps near noise; None: by size, `flow.resolution_shift`
        seed: int | Sequence[int] = 0,      # one per prompt; an int stands for seed, seed + 1, ...
        height: int | None = None,          # pixels; None: those of the image or video, or the transformer's own
        width: int | None = None,
        image: np.ndarray | None = None,    # uint8 (H, W, 3): the first frame
        video: np.ndarray | None = None,    # uint8 (T, H, W, 3), T = 1 + 4k: to continue
        initial: Tensor | None = None,      # (B or 1, c, t, h, w) normalized latents of a video: to continue
        frame_rate: float | None = None,    # frames per second; None: the transformer's
        guidance_rescale: float = GUIDANCE_RESCALE,  # share of the contrast added by guidance that is removed again
        history_groups: int = HISTORY_GROUPS,  # past groups of latents that a group attends to
        history_noise: float = HISTORY_NOISE,  # noise level of that history
        memory: MemoryOptions = AUTO,        # what decoding may take
    ) -> Iterator[RolloutStep | DecodeProgress | VideoChunk]:
        """Generate a video and yield it meanwhile: a `RolloutStep` after every step, a `DecodeProgress` after every
        decoded part of a group, a `VideoChunk` after every group. Memory and time per chunk do not depend on the
        length. Nothing is computed until the next event is requested; closing the iterator stops the generation.

        The concatenated chunks are the result of `__call__`. What is continued is encoded once, for all prompts, and
        yielded as the first chunks. A group follows the prompt that holds at its first frame.

        Raises:
            UserError: at once, for lengths, sizes, prompts or numbers that do not fit (it names the nearest that do),
                for components that do not match, and for a VAE that does not fit the free memory even in tiles.
            NonFiniteError: a model gave NaN or infinity, at once in encoding, else at that step or group; it names the
                component.
        """
        self._check_components()
        scheduler = self.get_scheduler(scheduler)
        check_scheduler(scheduler)
        self.upcast_weights()
        prompts = as_list(prompt)
        negative_prompts, seeds = one_per_prompt(negative_prompt, seed, len(prompts))
        context = context_video(image, video, initial)
        height, width = output_size(self.vae, self.transformer, height, width, context, initial)
        total, given = latent_lengths(self.vae, frames, context, initial)
        plan = self.decode_plan(memory, height, width, len(prompts))
        condition, null = self._encode_prompts(prompts, negative_prompts, frame_rate)
        initial = self._context_latents(context, initial, len(prompts))
        ratio = self.vae.spatial_compression_ratio
        events = rollout(
            self.transformer, condition, null, latents=total - given, height=height // ratio, width=width // ratio,
            seeds=seeds, scheduler=scheduler, steps=steps, guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale, shift=shift, history_groups=history_groups, history_noise=history_noise,
            frame_rate=frame_rate, initial=initial, device=self._execution_device)
        return self._decode_events(events, initial, plan)

    @torch.no_grad()
    def _encode_prompts(self, schedules: Sequence[Sequence[tuple[float, str]]], negative_prompts: Sequence[str],
                        frame_rate: float | None) -> tuple[Callable[[int], Condition], Condition]:
        """The condition of all samples by a group's first latent frame, and the condition to guide away from."""
        encoder, transformer = self.caption_encoder, self.transformer
        texts = list(dict.fromkeys(text for schedule in schedules for _, text in schedule))
        if encoder is None and not transformer.config.class_names and any([*texts, *negative_prompts]):
            raise UserError("this model takes no prompts, as it was trained without captions and classes; give \"\"")
        encode = conditioner(transformer, None if encoder is None else encoder.encode)
        device = self._execution_device
        encoded, null = encode(texts).to(device), encode(negative_prompts).to(device)
        for condition in encoded, null:
            if condition.text is not None:
                check_finite(condition.text, "the text encoder", self.text_encoder)
        rows, ratio = {text: i for i, text in enumerate(texts)}, self.vae.temporal_compression_ratio
        rate = frame_rate or transformer.config.frame_rate

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

    @torch.no_grad()
    def _decode_events(self, events: Iterator[RolloutStep | RolloutGroup], initial: Tensor | None,
                       plan: StreamPlan) -> Iterator[RolloutStep | DecodeProgress | VideoChunk]:
        """Decode each group once it is denoised, and the context with the first, when the number of groups is known."""
        decoder = GroupDecoder(self.vae, self._vae_device, plan)
        length = 0 if initial is None else initial.shape[2]
        context = () if initial is None else initial.split(self.group_layout(length, length), dim=2)
        pending = [(0, latents) for latents in context]
        try:
            for event in events:
                if isinstance(event, RolloutStep):
                    yield event
                    continue
                for group, latents in [*pending, (event.group, event.latents)]:
                    yield from decoder.decode(latents, group, event.groups)
                pending.clear()
        finally:
            self.maybe_free_model_hooks()

    def __call__(self, prompt: Prompt | Sequence[Prompt], **kwargs) -> LVDMPipelineOutput:  # type: ignore[no-untyped-def]
        """Generate the whole video at once; the arguments are those of `stream`."""
        chunks = [event for event in self.stream(prompt, **kwargs) if isinstance(event, VideoChunk)]
        return LVDMPipelineOutput(frames=np.concatenate([chunk.frames for chunk in chunks], axis=1),
                                  latents=torch.cat([chunk.latents for chunk in chunks], dim=2))

    def get_scheduler(self, scheduler: Any = None) -> Any:
        """Return a scheduler, given also by its name (see `schedulers`); None: the pipeline's."""
        return make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler or self.scheduler

    def group_layout(self, latents: int, given: int = 0) -> tuple[int, ...]:
        """Latent frames of each group, see `rollout.group_layout`."""
        return group_layout(latents, given, self.transformer.config.group_size)

    @torch.no_grad()
    def decode_latents(self, groups: Iterable[Tensor], plan: StreamPlan | None = None) -> Iterator[np.ndarray]:
        """Decode a video's normalized latents, given group by group (B, c, t, h, w), to frames uint8 (B, t', H, W, 3).
        With the groups of `group_layout` the values equal those of `stream` bit for bit.

        Args:
            plan: None: that of `stream`.
        """
        self.upcast_weights()
        decoder, ratio = None, self.vae.spatial_compression_ratio
        for latents in groups:
            if decoder is None:
                plan = plan or self.decode_plan(AUTO, ratio * latents.shape[3], ratio * latents.shape[4], len(latents))
                decoder = GroupDecoder(self.vae, self._vae_device, plan)
            yield from (event.frames for event in decoder.decode(latents) if isinstance(event, VideoChunk))
        self.maybe_free_model_hooks()

    @torch.no_grad()
    def encode_video(self, video: np.ndarray) -> Tensor:
        """Encode uint8 (T, H, W, 3), T = 1 + 4k, to normalized latents (1, c, t, h, w) float32."""
        self.upcast_weights()
        self.vae.latent_frames(len(video))
        plan = auto_plan(self.vae, "encode", *video.shape[1:3], free=free_memory(self._vae_device))
        onload(self.vae)
        chunks = (to_tensor(video[i:i + ENCODED_AT_ONCE])[None].to(self._vae_device, self.vae.dtype)
                  for i in range(0, len(video), ENCODED_AT_ONCE))
        with plan.applied(self.vae):
            raw = torch.cat(list(encode_stream(self.vae, chunks, frames=plan.frames)), dim=2)
        latents = self.vae.normalize(raw.float())
        check_finite(latents, "the VAE's encoder", self.vae)
        return latents

    def requirements(self, height: int | None = None, width: int | None = None, batch: int = 1) -> Requirements:
        """Estimate the memory for `batch` videos of this many pixels (None: the transformer's own size)."""
        config = self.transformer.config
        height = config.sample_height if height is None else height
        width = config.sample_width if width is None else width
        check_size(self.vae, self.transformer, height, width)
        frames = DECODED_AT_ONCE * self.vae.temporal_compression_ratio
        return requirements(self.components, height, width, batch, frames)

    def upcast_weights(self) -> None:
        """Turn half-precision weights on a CPU that cannot compute in half precision into float32."""
        upcast_unsupported([self.vae, self.transformer, self.text_encoder])

    @property
    def _vae_device(self) -> torch.device:
        """Where the VAE computes: it alone may have been left on the CPU. Offloaded weights do not say it."""
        return self._execution_device if hasattr(self.vae, "_hf_hook") else self.vae.device

    def decode_plan(self, memory: MemoryOptions, height: int, width: int, batch: int = 1) -> StreamPlan:
        """Plan decoding within `memory`, at most `DECODED_AT_ONCE` latent frames at once."""
        most = DECODED_AT_ONCE * self.vae.temporal_compression_ratio
        free = free_memory(self._vae_device) if memory.free is None else memory.free
        memory = replace(memory, free=free, frames=most if memory.frames is None else min(memory.frames, most))
        return memory.plan(self.vae, "decode", height, width, batch)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload as diffusers does, but the transformer block by block and the VAE not at all: their modules read
        weights of modules inside them."""
        super().enable_sequential_cpu_offload(*args, **kwargs)
        offload_blocks(self.transformer, self._offload_device)
