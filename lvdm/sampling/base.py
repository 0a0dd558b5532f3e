"""What the pipelines over an OD-VAE share: the state of a call, memory plans, and where components compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline
from torch import Tensor

from odvae.data.transforms import to_tensor
from odvae.inference.memory import AUTO, MemoryOptions, StreamPlan, auto_plan, free_memory
from odvae.inference.streaming import encode_stream
from odvae.utils.errors import UserError
from odvae.utils.files import read_json, write_json
from odvae.utils.finite import check_finite
from odvae.utils.precision import upcast_unsupported

from ..capabilities import PIPELINES, VideoGrid, class_name, video_grid
from .group_decoder import ClipDecoder, GroupDecoder
from .inputs import SamplingInputs
from .offload import offload_blocks, onload
from .outputs import (
    OUTPUT_TYPES,
    DecodeProgress,
    LVDMPipelineOutput,
    RolloutGroup,
    RolloutStep,
    SamplingEvent,
    VideoChunk,
    to_output_type,
)

CODE = "pipeline"  # the module in a saved pipeline's folder
DECODED_AT_ONCE = 2  # latent frames; bounds the memory
ENCODED_AT_ONCE = 8  # frames


class VideoPipeline(DiffusionPipeline):
    """A pipeline with a `vae` (`odvae.AutoencoderKLODVAE`), a `transformer` and a `text_encoder`."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _exclude_from_cpu_offload = ["vae"]  # noqa: RUF012  (diffusers reads these names)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    inputs_type: type[SamplingInputs]
    decode_on_cpu = False  # while the other components are offloaded: the VAE stays on the CPU and computes there

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json, and the module by which `DiffusionPipeline.from_pretrained(folder,
        trust_remote_code=True)` finds this class where our packages are installed."""
        super().save_config(save_directory, push_to_hub=False, **kwargs)
        index, name = Path(save_directory, self.config_name), type(self).__name__
        write_json(index, read_json(index) | {"_class_name": [CODE, name]})
        Path(save_directory, f"{CODE}.py").write_text(f"from {type(self).__module__} import {name}\n\n"
                                                      f"__all__ = [\"{name}\"]\n", encoding="utf-8")

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read model_index.json; code in the folder is not run, as this class is known."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = class_name(config)
        return loaded

    def stream(self, prompt: Any = None, **inputs: Any) -> Iterator[SamplingEvent | DecodeProgress | VideoChunk]:
        """Generate a video and yield it meanwhile: a `RolloutStep` after every step, a `RolloutGroup` when a group of
        latents is denoised, a `DecodeProgress` after every decoded part of it, a `VideoChunk` when it is decoded.
        Nothing is computed until the next event is requested; closing the iterator stops the generation.

        The concatenated chunks are the result of `__call__`.

        Args:
            inputs: those of `__call__` but output_type and return_dict.

        Raises:
            UserError: at once, for lengths, sizes, prompts or numbers that do not fit (it names the nearest that do),
                for components that do not match, and for a VAE that does not fit the free memory even in tiles.
            NonFiniteError: a model gave NaN or infinity, at once in encoding, else at that step or group; it names the
                component.
        """
        call = self.inputs_type(prompt=prompt, **inputs)
        plan = self.decode_plan(call.memory, *self.check_inputs(call))
        return self._decode_events(*self._sample(call), plan)

    @torch.no_grad()
    def _generate(self, output_type: str, return_dict: bool,
                  arguments: Mapping[str, Any]) -> LVDMPipelineOutput | tuple[Any]:
        """Do `__call__` with its arguments."""
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"unknown output_type {output_type!r}; choose from {', '.join(OUTPUT_TYPES)}")
        inputs = self.inputs_type(**{field.name: arguments[field.name] for field in fields(self.inputs_type)})
        size = self.check_inputs(inputs)
        plan = None if output_type == "latent" else self.decode_plan(inputs.memory, *size)
        events, context = self._sample(inputs)
        latents, frames = [] if context is None else [context], []
        for event in self._decode_events(self._with_bar(events), context, plan):
            if isinstance(event, RolloutGroup):
                latents.append(event.latents)
            elif isinstance(event, VideoChunk):
                frames.append(event.frames)
        joined = torch.cat(latents, dim=2)
        result = to_output_type(np.concatenate(frames, axis=1), output_type) if plan else joined
        return LVDMPipelineOutput(frames=result, latents=joined) if return_dict else (result,)

    def check_inputs(self, inputs: Any) -> tuple[int, int, int]:
        """Return height, width and number of the videos; raise UserError for inputs that do not fit the components."""
        raise NotImplementedError

    def _sample(self, inputs: Any) -> tuple[Iterable[SamplingEvent], Tensor | None]:
        """Encode the inputs; return the sampling of new latents, and the latents that it continues (B, c, t, h, w)."""
        raise NotImplementedError

    def group_layout(self, latents: int, given: int = 0) -> tuple[int, ...]:
        """Latent frames of each group that is decoded by itself, of `latents` of which the first are given."""
        raise NotImplementedError

    @torch.no_grad()
    def _decode_events(self, events: Iterable[SamplingEvent], context: Tensor | None, plan: StreamPlan | None,
                       ) -> Iterator[SamplingEvent | DecodeProgress | VideoChunk]:
        """Decode groups once they are denoised (without a plan: none), and the context with the first."""
        decoder = None if plan is None else self._decoder(plan)
        length = 0 if context is None else context.shape[2]
        parts = () if context is None else context.split(self.group_layout(length, length), dim=2)
        pending = [(0, part) for part in parts]
        try:
            for event in events:
                yield event
                if isinstance(event, RolloutStep) or decoder is None:
                    continue
                groups = self._groups_of(event)
                for group, latents in [*pending, *enumerate(groups, start=event.group)]:
                    yield from decoder.decode(latents, group, event.groups + len(groups) - 1)
                pending.clear()
        finally:
            self.maybe_free_model_hooks()

    def _groups_of(self, event: RolloutGroup) -> Sequence[Tensor]:
        """The groups that denoised latents are decoded in."""
        return [event.latents]

    def _decoder(self, plan: StreamPlan) -> GroupDecoder:
        kind = GroupDecoder if self.vae.causal else ClipDecoder
        return kind(self.vae, self._vae_device, plan)

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
                decoder = self._decoder(plan)
            yield from (event.frames for event in decoder.decode(latents) if isinstance(event, VideoChunk))
        self.maybe_free_model_hooks()

    def _begin(self, inputs: SamplingInputs, num_timesteps: int) -> None:
        """Set what a callback may read and assign."""
        self._guidance_scale, self._attention_kwargs = inputs.guidance_scale, inputs.attention_kwargs
        self._num_timesteps, self._interrupt = num_timesteps, False
        self._current_timestep: Tensor | None = None

    def _step_done(self, inputs: SamplingInputs, step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        """Call the user's callback after a step; return the latents to go on with."""
        self._current_timestep = timestep
        if inputs.callback_on_step_end is None:
            return latents
        tensors = {"latents": latents} if "latents" in inputs.callback_on_step_end_tensor_inputs else {}
        tensors = inputs.callback_on_step_end(self, step, timestep, tensors) or {}
        changed: Tensor = tensors.pop("latents", latents)
        return changed

    def _with_bar(self, events: Iterable[SamplingEvent]) -> Iterator[SamplingEvent]:
        """Show a bar of the steps, as `set_progress_bar_config` configured it."""
        with self.progress_bar(total=self._num_timesteps) as bar:
            for event in events:
                if isinstance(event, RolloutStep):
                    bar.update()
                yield event

    @property
    def guidance_scale(self) -> float:
        """That of the running call; a callback may assign `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """How often the transformer is evaluated by the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The noise level of the last step, 1000 for pure noise."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """A callback may assign `_interrupt`: the group at hand ends after its step, and no other is started."""
        return self._interrupt

    @property
    def kind(self) -> str:
        """Its class in `lvdm.capabilities.PIPELINES`."""
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__name__ in PIPELINES)

    @property
    def grid(self) -> VideoGrid:
        """The sizes of its videos."""
        return video_grid(self.kind, self.transformer.config, self.vae.config)

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

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload as diffusers does, which calls this again after every video."""
        super().enable_model_cpu_offload(*args, **kwargs)
        self._keep_vae()

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload as diffusers does, but the transformer block by block and the VAE not at all: their modules read
        weights of modules inside them."""
        super().enable_sequential_cpu_offload(*args, **kwargs)
        offload_blocks(self.transformer, self._offload_device)
        self._keep_vae()

    def _keep_vae(self) -> None:
        if self.decode_on_cpu:
            remove_hook_from_module(self.vae, recurse=True)  # it would bring the weights to the accelerator
            upcast_unsupported([self.vae.to("cpu")])
