"""What the pipelines over an OD-VAE share: the state of a call, memory plans, and where components compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from odvae.data.transforms import to_tensor
from odvae.inference.memory import MemoryOptions, StreamPlan, auto_plan, free_memory
from odvae.inference.streaming import encode_stream
from odvae.utils.finite import check_finite
from odvae.utils.precision import upcast_unsupported

from ..capabilities import PIPELINES, VideoGrid, video_grid
from .inputs import SamplingInputs
from .offload import offload_blocks, onload
from .outputs import RolloutStep

DECODED_AT_ONCE = 2  # latent frames; bounds the memory
ENCODED_AT_ONCE = 8  # frames

Event = TypeVar("Event")


class VideoPipeline(DiffusionPipeline):
    """A pipeline with a `vae` (`odvae.AutoencoderKLODVAE`), a `transformer` and a `text_encoder`."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _exclude_from_cpu_offload = ["vae"]  # noqa: RUF012  (diffusers reads these names)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

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

    def _with_bar(self, events: Iterable[Event]) -> Iterator[Event]:
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

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload as diffusers does, but the transformer block by block and the VAE not at all: their modules read
        weights of modules inside them."""
        super().enable_sequential_cpu_offload(*args, **kwargs)
        offload_blocks(self.transformer, self._offload_device)
