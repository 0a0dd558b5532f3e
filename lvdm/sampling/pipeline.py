"""From a prompt, an image or a video to a video of any length: text encoder, transformer, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from odvae.data.transforms import to_tensor, to_uint8
from odvae.inference.memory import AUTO, MemoryOptions, StreamPlan, auto_plan, free_memory
from odvae.inference.streaming import encode_stream
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.model.conv import consume_state
from odvae.utils.errors import UserError
from odvae.utils.finite import check_finite, is_finite, non_finite
from odvae.utils.precision import upcast_unsupported

from ..condition import Condition, check_text_encoder, conditioner
from ..defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, HISTORY_GROUPS, HISTORY_NOISE, STEPS
from ..model.transformer import LVDMTransformer3DModel
from ..text import TextEncoder, TransformersEncoder, WordHashEncoder
from .offload import Requirements, offload_blocks, onload, requirements
from .prompts import Prompt, as_list, prompt_at
from .rollout import RolloutGroup, RolloutStep, group_layout, rollout
from .schedulers import check_scheduler, make_scheduler

DECODED_AT_ONCE = 2  # latent frames; bounds the memory
ENCODED_AT_ONCE = 8  # frames


@dataclass(frozen=True)
class VideoChunk:
    """The frames of group `group` of `groups` (from 1; the chunks of group 0 are what was given, as the VAE shows it):
    uint8 (B, t, H, W, 3), and their normalised latents (B, c, t', h, w)."""

    group: int
    groups: int
    frames: np.ndarray
    latents: Tensor


@dataclass(frozen=True)
class DecodeProgress:
    """Part `part` of `parts` of a group's latents is decoded. Counts are from 1; group 0 is what was given."""

    group: int
    groups: int
    part: int
    parts: int


@dataclass
class LVDMPipelineOutput(BaseOutput):
    """`frames`: uint8 (B, T, H, W, 3). `latents`: normalised, (B, c, 1 + (T-1)/4, H/8, W/8)."""

    frames: np.ndarray
    latents: Tensor


class LVDMPipeline(DiffusionPipeline):
    """Text or class to video, image to video, and continuation of a video, all by the same rollout.

    Args:
        vae: `odvae.AutoencoderKLODVAE`.
        transformer: `LVDMTransformer3DModel`, trained on that VAE's normalised latents.
        text_encoder: what the transformer was trained with: a `WordHashEncoder` or a transformers encoder; None where
            it takes no text. Prompts are then names of its classes, or "" where it has none.
        tokenizer: that of a transformers encoder, else None. `build` takes the two as one.
        scheduler: one of diffusers' for flow matching, see `solver`; None: Euler's.

    Raises:
        UserError: where the components do not fit each other.
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
        """From what `lvdm.text.load_text_encoder` returns."""
        if isinstance(text_encoder, TransformersEncoder):
            return cls(vae, transformer, text_encoder.model, text_encoder.tokenizer, scheduler)
        return cls(vae, transformer, text_encoder, scheduler=scheduler)

    def _check_components(self) -> None:
        """Raise UserError where the components do not fit each other; any of them may have been assigned since."""
        channels, wanted = self.vae.latent_channels, self.transformer.config.in_channels
        if channels != wanted:
            raise UserError(f"the VAE's latents have {channels} channels, the transformer was made for {wanted}: load "
                            f"the components that it was trained with")
        check_text_encoder(self.transformer, self._text_encoder())
        check_scheduler(self.scheduler)

    def _text_encoder(self) -> TextEncoder | None:
        if self.tokenizer is None:
            return self.text_encoder
        return TransformersEncoder(self.text_encoder, self.tokenizer)

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],  # a video's prompt is text, or (from second, text) pairs: see `prompts`
        *,
        frames: int = 17,                   # of the whole result, 1 + 4k, with the image or video that is given
        negative_prompt: str | Sequence[str] = "",  # what guidance leads away from; one a prompt, or one for all
        scheduler: Any = None,              # diffusers' or a name, see `schedulers`; None: the pipeline's
        steps: int = STEPS,                 # of the scheduler, a group of latents
        guidance_scale: float = GUIDANCE_SCALE,  # 1: none, at half the cost
        shift: float | None = None,         # > 1: more of the steps near noise; None: by size, `flow.resolution_shift`
        seed: int | Sequence[int] = 0,      # one a prompt; an int stands for seed, seed + 1, ...
        height: int | None = None,          # pixels; None: the image's or video's, or the transformer's own size
        width: int | None = None,
        image: np.ndarray | None = None,    # uint8 (H, W, 3): the first frame
        video: np.ndarray | None = None,    # uint8 (T, H, W, 3), T = 1 + 4k: goes on from its end
        initial: Tensor | None = None,      # (B or 1, c, t, h, w) normalised latents of a video: goes on from its end
        frame_rate: float | None = None,    # frames a second; None: the transformer's
        guidance_rescale: float = GUIDANCE_RESCALE,  # share of the contrast that guidance adds and that is taken back
        history_groups: int = HISTORY_GROUPS,  # groups of latents that a group looks back on
        history_noise: float = HISTORY_NOISE,  # noise level of what it looks back on
        memory: MemoryOptions = AUTO,        # what decoding may take
    ) -> Iterator[RolloutStep | DecodeProgress | VideoChunk]:
        """Make a video and hand it out while it is made: a `RolloutStep` after every step, a `DecodeProgress` after
        every part of a group that is decoded, a `VideoChunk` after every group of latents. Memory and the time a chunk
        takes do not depend on the length. Ask for no more and it waits; close it and it stops.

        The joined chunks are `__call__`'s result. What is given to go on from is encoded once, for all prompts, and
        comes back as the first chunks. A group follows the prompt that holds at its first frame.

        Raises:
            UserError: at once, for lengths, sizes, prompts or numbers that do not fit; it names the nearest that do.
                And where the VAE does not fit the memory that is free, not even in tiles, or components do not fit
                each other.
            NonFiniteError: a model gave NaN or infinity, at once for what is encoded, else by the step or the group; it
                names the part.
        """
        self._check_components()
        scheduler = self.get_scheduler(scheduler)
        check_scheduler(scheduler)
        self._widen()
        prompts = as_list(prompt)
        batch = len(prompts)
        negative = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed + i for i in range(batch)]
        for name, count, allowed in ("seeds", len(seeds), {batch}), ("negative prompts", len(negative), {1, batch}):
            if count not in allowed:
                raise UserError(f"{count} {name} were given for {batch} prompts; give one each")
        if sum(one is not None for one in (image, video, initial)) > 1:
            raise UserError("give an image, a video or latents to go on from, not more than one of them")
        given = image[None] if image is not None else video
        config, vae = self.transformer.config, self.vae
        space, time = vae.spatial_compression_ratio, vae.temporal_compression_ratio
        height, width = self._size(height, width, given, initial)
        latents = vae.latent_frames(frames)
        before = initial.shape[2] if initial is not None else vae.latent_frames(len(given)) if given is not None else 0
        if latents <= before:
            raise UserError(f"frames={frames} is the length of the whole result and must be more than the "
                            f"{1 + time * (before - 1)} given; the next is {1 + time * before}")
        plan = self.decode_plan(memory, height, width, batch)
        condition, null = self._conditions(prompts, negative, frame_rate or config.frame_rate)
        if given is not None:
            initial = self.encode_video(given)
        if initial is not None:
            initial = initial.to(self._execution_device, torch.float32).expand(batch, -1, -1, -1, -1)
        events = rollout(
            self.transformer, condition, null, latents=latents - before, height=height // space, width=width // space,
            seeds=seeds, scheduler=scheduler, steps=steps, guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale, shift=shift, history_groups=history_groups, history_noise=history_noise,
            frame_rate=frame_rate, initial=initial, device=self._execution_device)
        return self._decoded(events, initial, plan)

    @torch.no_grad()
    def _conditions(self, prompts: Sequence[Sequence[tuple[float, str]]], negative: Sequence[str],
                    frame_rate: float) -> tuple[Callable[[int], Condition], Condition]:
        """The condition of the group that begins with a latent, of every prompt, and that to guide away from."""
        encoder, transformer = self._text_encoder(), self.transformer
        texts = list(dict.fromkeys(text for cut in prompts for _, text in cut))
        if encoder is None and not transformer.config.class_names and any([*texts, *negative]):
            raise UserError("this model takes no prompts, as it was trained without captions and classes; give \"\"")
        make = conditioner(transformer, None if encoder is None else encoder.encode)
        device = self._execution_device
        known, null = make(texts).to(device), make(negative).to(device)
        for one in known, null:
            if one.text is not None:
                check_finite(one.text, "the text encoder", self.text_encoder)
        row, ratio = {text: i for i, text in enumerate(texts)}, self.vae.temporal_compression_ratio

        def condition(latent: int) -> Condition:
            second = max(0, 1 + ratio * (latent - 1)) / frame_rate
            return known.select([row[prompt_at(cut, second)] for cut in prompts])

        return condition, null

    @torch.no_grad()
    def _decoded(self, events: Iterator[RolloutStep | RolloutGroup], initial: Tensor | None,
                 plan: StreamPlan) -> Iterator[RolloutStep | DecodeProgress | VideoChunk]:
        """Decode each group once it is denoised; the given groups with the first, as their number is known then."""
        state: object = ()
        length = 0 if initial is None else initial.shape[2]
        given = () if initial is None else initial.split(self.group_layout(length, length), dim=2)
        waiting = [(0, latents) for latents in given]
        try:
            for event in events:
                if isinstance(event, RolloutStep):
                    yield event
                    continue
                for group, latents in [*waiting, (event.group, event.latents)]:
                    frames, state = yield from self._decode(latents, state, plan, group, event.groups)
                    yield VideoChunk(group, event.groups, frames, latents)
                waiting.clear()
        finally:
            self.maybe_free_model_hooks()

    def __call__(self, prompt: Prompt | Sequence[Prompt], **kwargs) -> LVDMPipelineOutput:  # type: ignore[no-untyped-def]
        """The whole video at once; the arguments are those of `stream`."""
        chunks = [event for event in self.stream(prompt, **kwargs) if isinstance(event, VideoChunk)]
        return LVDMPipelineOutput(frames=np.concatenate([chunk.frames for chunk in chunks], axis=1),
                                  latents=torch.cat([chunk.latents for chunk in chunks], dim=2))

    def get_scheduler(self, scheduler: Any = None) -> Any:
        """A scheduler, also by its name (see `schedulers`); None: the pipeline's."""
        return make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler or self.scheduler

    def group_layout(self, latents: int, given: int = 0) -> tuple[int, ...]:
        """Latent frames of each group, see `rollout.group_layout`."""
        return group_layout(latents, given, self.transformer.config.group_size)

    @torch.no_grad()
    def decode_latents(self, chunks: Iterable[Tensor], plan: StreamPlan | None = None) -> Iterator[np.ndarray]:
        """Normalised latents that come in chunks (B, c, t, h, w) as frames uint8 (B, t', H, W, 3), chunk by chunk. With
        the chunks of a video's groups the values are bit for bit those of `stream`.

        Args:
            plan: None: that of `stream`.
        """
        self._widen()
        past: object = ()
        for chunk in chunks:
            space = self.vae.spatial_compression_ratio
            plan = plan or self.decode_plan(AUTO, space * chunk.shape[3], space * chunk.shape[4], len(chunk))
            frames, past = _result(self._decode(chunk, past, plan))
            yield frames
        self.maybe_free_model_hooks()

    @torch.no_grad()
    def encode_video(self, video: np.ndarray) -> Tensor:
        """uint8 (T, H, W, 3), T = 1 + 4k -> normalised latents (1, c, t, h, w) float32."""
        self._widen()
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
        """What making videos of so many pixels (None: the transformer's own size) takes of memory."""
        config = self.transformer.config
        height = config.sample_height if height is None else height
        width = config.sample_width if width is None else width
        self._check_size(height, width)
        frames = DECODED_AT_ONCE * self.vae.temporal_compression_ratio
        return requirements(self.components, height, width, batch, frames)

    def _widen(self) -> None:
        """Weights in half precision become float32 where they lie on a CPU that has no instructions for it."""
        upcast_unsupported([self.vae, self.transformer, self.text_encoder])

    @property
    def _vae_device(self) -> torch.device:
        """Where the VAE works: it may have been left on the CPU by itself. Offloaded weights say nothing."""
        return self._execution_device if hasattr(self.vae, "_hf_hook") else self.vae.device

    def decode_plan(self, memory: MemoryOptions, height: int, width: int, batch: int = 1) -> StreamPlan:
        """As `memory` wants it, a group's latents at once at most."""
        most = DECODED_AT_ONCE * self.vae.temporal_compression_ratio
        free = free_memory(self._vae_device) if memory.free is None else memory.free
        memory = replace(memory, free=free, frames=most if memory.frames is None else min(memory.frames, most))
        return memory.plan(self.vae, "decode", height, width, batch)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """diffusers' own, but of the transformer block by block, and with the VAE on the accelerator: their modules
        read weights of others inside them."""
        super().enable_sequential_cpu_offload(*args, **kwargs)
        offload_blocks(self.transformer, self._offload_device)

    def _decode(self, latents: Tensor, past: object, plan: StreamPlan, group: int = 0,
                groups: int = 0) -> Generator[DecodeProgress, None, tuple[np.ndarray, object]]:
        """Normalised latents (B, c, t, h, w) and the decoder's state -> uint8 (B, t', H, W, 3) and the next state."""
        frames, at_once = [], plan.frames // self.vae.temporal_compression_ratio
        onload(self.vae)
        parts = self.vae.denormalize(latents.to(self._vae_device)).to(self.vae.dtype).split(at_once, dim=2)
        for number, part in enumerate(parts, start=1):
            with plan.applied(self.vae):
                past = consume_state(past)
                video, past = self.vae.decode_chunk(part, past)
                if not is_finite(video):
                    raise non_finite("the VAE's decoder", self.vae,
                                     f"for latents of up to {float(part.abs().max()):.3g}")
                frames.append(to_uint8(video))
            yield DecodeProgress(group, groups, number, len(parts))
        return np.concatenate(frames, axis=1), past

    def _size(self, height: int | None, width: int | None, given: np.ndarray | None,
              initial: Tensor | None) -> tuple[int, int]:
        """Pixels of the result: those asked for, or of what is given, or the transformer's own."""
        sides = [self.transformer.config.sample_height, self.transformer.config.sample_width]
        if given is not None:
            if given.dtype != np.uint8 or given.ndim != 4 or given.shape[3] != 3 or not len(given):
                raise UserError("an image must be uint8 (H, W, 3) and a video uint8 (T, H, W, 3), "
                                f"got {given.dtype} with {given.shape} as a video's shape")
            sides = list(given.shape[1:3])
        elif initial is not None:
            sides = [self.vae.spatial_compression_ratio * side for side in initial.shape[-2:]]
        for i, (name, asked) in enumerate((("height", height), ("width", width))):
            if asked is not None and (given is not None or initial is not None) and asked != sides[i]:
                raise UserError(f"{name}={asked} was asked for, but what was given to go on from has {sides[i]}; "
                                "resize it first (odvae.data.transforms.resize_crop)")
            sides[i] = sides[i] if asked is None else asked
        self._check_size(*sides)
        return sides[0], sides[1]

    def _check_size(self, height: int, width: int) -> None:
        unit = self.vae.spatial_compression_ratio * self.transformer.config.patch_size
        if height < unit or width < unit or height % unit or width % unit:
            near = [max(unit, unit * round(side / unit)) for side in (height, width)]
            raise UserError(f"{height}x{width} pixels do not fit, sides must be multiples of {unit}; "
                            f"the nearest is {near[0]}x{near[1]}")


def _result(decoding: Generator[DecodeProgress, None, tuple[np.ndarray, object]]) -> tuple[np.ndarray, object]:
    """What a decoding returns, its parts untold."""
    while True:
        try:
            next(decoding)
        except StopIteration as end:
            return end.value
