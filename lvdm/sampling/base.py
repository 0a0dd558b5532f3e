"""What the pipelines over an OD-VAE share: the state of a call, memory plans, and where components compute."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from odvae.data.transforms import to_tensor, to_uint8
from odvae.inference.memory import AUTO, MemoryOptions, StreamPlan, auto_plan, free_memory
from odvae.inference.streaming import encode_stream
from odvae.model.distilled_decoder import DistilledDecoder
from odvae.utils.errors import UserError
from odvae.utils.files import read_json, write_json
from odvae.utils.finite import check_finite
from odvae.utils.precision import upcast_unsupported

from ..capabilities import PIPELINES, Capabilities, VideoGrid, capabilities, class_name, video_grid
from . import model_card
from .call_state import CallStateMixin
from .group_decoder import ClipDecoder, GroupDecoder, OverlappedDecoder, Pixels, can_overlap, decode_events
from .inputs import SamplingInputs
from .offload import has_tied_weights, is_offloaded, onload
from .outputs import (
    FLOAT_TYPES,
    OUTPUT_TYPES,
    DecodeProgress,
    LVDMPipelineOutput,
    RolloutGroup,
    SamplingEvent,
    VideoChunk,
    to_output_type,
)
from .prompt_encoder import PromptEncoderMixin

CODE = "pipeline"  # the module in a saved pipeline's folder
DECODED_AT_ONCE = 2  # latent frames; bounds the memory
ENCODED_AT_ONCE = 8  # frames


class VideoPipeline(CallStateMixin, PromptEncoderMixin, DiffusionPipeline):
    """A pipeline with a `vae` (`odvae.AutoencoderKLODVAE`), a `transformer` and a `text_encoder`.

    Any of them may be None: the text encoder alone encodes prompts, and embeddings take its place.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    inputs_type: type[SamplingInputs]
    distilled_decoder: DistilledDecoder | None = None  # decodes in place of the VAE's decoder; see `attach_decoder`
    decode_on_cpu = False  # while the other components are offloaded: the VAE stays on the CPU and computes there

    def __init__(self, **components: Any) -> None:
        super().__init__()
        self.register_modules(**components)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        self._check_components()

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json, and the module by which `DiffusionPipeline.from_pretrained(folder,
        trust_remote_code=True)` finds this class where our packages are installed; and a model card, unless there is
        one."""
        super().save_config(save_directory, push_to_hub=False, **kwargs)
        index, name = Path(save_directory, self.config_name), type(self).__name__
        write_json(index, read_json(index) | {"_class_name": [CODE, name]})
        Path(save_directory, f"{CODE}.py").write_text(f"from {type(self).__module__} import {name}\n\n"
                                                      f"__all__ = [\"{name}\"]\n", encoding="utf-8")
        self._write_card(Path(save_directory), overwrite=False)

    def _write_card(self, folder: Path, overwrite: bool, source: str = "FOLDER") -> None:
        """Write the model card; a pipeline without its networks has none."""
        file = folder / model_card.FILE
        if self.vae is not None and self.transformer is not None and (overwrite or not file.exists()):
            file.write_text(model_card.model_card(type(self).__name__, self.components, self.grid, source),
                            encoding="utf-8")

    def _upload_folder(self, working_dir: str, repo_id: str, **kwargs: Any) -> Any:
        """Upload with our model card in place of one that diffusers generates; a person's own is kept."""
        folder = Path(working_dir)
        if model_card.is_generated(folder / model_card.FILE):
            self._write_card(folder, overwrite=True, source=repo_id)
        return super()._upload_folder(working_dir, repo_id, **kwargs)

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
            NonFiniteError: a model gave NaN or infinity, at once in encoding, else at that step (on an accelerator at
                the end of the group) or group; it names the component.
        """
        call = self.inputs_type(prompt=prompt, **inputs)
        plan = self.decode_plan(call.memory, *self._check_inputs(call))
        return self._decode_events(*self._sample(call), plan)

    @torch.no_grad()
    def _generate(self, output_type: str, return_dict: bool,
                  arguments: Mapping[str, Any]) -> LVDMPipelineOutput | tuple[Any]:
        """Do `__call__` with its arguments."""
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"unknown output_type {output_type!r}; choose from {', '.join(OUTPUT_TYPES)}")
        inputs = self.inputs_type(**{field.name: arguments[field.name] for field in fields(self.inputs_type)})
        size = self._check_inputs(inputs)
        plan = None if output_type == "latent" else self.decode_plan(inputs.memory, *size)
        events, context = self._sample(inputs)
        latents, frames = [] if context is None else [context], []
        pixels = self._to_float if output_type in FLOAT_TYPES else to_uint8
        for event in self._decode_events(self._with_bar(events), context, plan, pixels):
            if isinstance(event, RolloutGroup):
                latents.append(event.latents)
            elif isinstance(event, VideoChunk):
                frames.append(event.frames)
        joined = torch.cat(latents, dim=2)
        result = to_output_type(np.concatenate(frames, axis=1), output_type) if plan else joined
        return LVDMPipelineOutput(frames=result, latents=joined) if return_dict else (result,)

    def check_inputs(self, prompt: Any = None, **inputs: Any) -> None:
        """Raise UserError for arguments of `__call__` that do not fit each other or the components."""
        self._check_inputs(self.inputs_type(prompt=prompt, **inputs))

    def _check_components(self) -> None:
        """Raise UserError where the components that are there do not match; any may have been assigned since."""
        raise NotImplementedError

    def _check_inputs(self, inputs: Any) -> tuple[int, int, int]:
        """Return height, width and number of the videos; raise UserError for inputs that do not fit the components."""
        raise NotImplementedError

    def _check_call(self, inputs: SamplingInputs) -> None:
        """Check what all pipelines have in common."""
        for name in "vae", "transformer":
            if getattr(self, name) is None:
                raise UserError(f"this pipeline was loaded without its {name}, so it can only encode prompts")
        inputs.check()
        self._check_components()
        self._check_text(inputs)

    def _sample(self, inputs: Any) -> tuple[Iterable[SamplingEvent], Tensor | None]:
        """Encode the inputs; return the sampling of new latents, and the latents that it continues (B, c, t, h, w)."""
        raise NotImplementedError

    def group_layout(self, latents: int, given: int = 0) -> tuple[int, ...]:
        """Latent frames of each group that is decoded by itself, of `latents` of which the first are given."""
        raise NotImplementedError

    @torch.no_grad()
    def _decode_events(self, events: Iterable[SamplingEvent], context: Tensor | None, plan: StreamPlan | None,
                       pixels: Pixels = to_uint8) -> Iterator[SamplingEvent | DecodeProgress | VideoChunk]:
        """Decode groups once they are denoised (without a plan: none), and the context with the first."""
        decoder = None if plan is None else self._decoder(plan, pixels, overlap=True)
        length = 0 if context is None else context.shape[2]
        parts = () if context is None else context.split(self.group_layout(length, length), dim=2)
        try:
            yield from decode_events(events, decoder, parts, self._groups_of)
        finally:
            self.maybe_free_model_hooks()

    def _groups_of(self, event: RolloutGroup) -> Sequence[Tensor]:
        """The groups that denoised latents are decoded in."""
        return [event.latents]

    def _decoder(self, plan: StreamPlan, pixels: Pixels = to_uint8, overlap: bool = False) -> GroupDecoder:
        if overlap and can_overlap(self.vae, self.transformer, self._vae_device) and pixels is to_uint8:
            return OverlappedDecoder(self.vae, self._vae_device, plan, self.distilled_decoder)
        kind = GroupDecoder if self.vae.causal or self.distilled_decoder is not None else ClipDecoder
        return kind(self.vae, self._vae_device, plan, pixels, self.distilled_decoder)

    def _to_float(self, video: Tensor) -> np.ndarray:
        """Convert (B, 3, T, H, W), about [-1, 1], to (B, T, H, W, 3) in [0, 1], as diffusers does."""
        frames: np.ndarray = self.video_processor.postprocess_video(video.float(), output_type="np")
        return frames

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

    @property
    def vae_scale_factor_spatial(self) -> int:
        """Pixels a side of a latent."""
        return 8 if self.vae is None else int(self.vae.spatial_compression_ratio)

    @property
    def vae_scale_factor_temporal(self) -> int:
        """Frames of a latent, but for the first, which has one."""
        return 4 if self.vae is None else int(self.vae.temporal_compression_ratio)

    @property
    def kind(self) -> str:
        """Its class in `lvdm.capabilities.PIPELINES`."""
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__name__ in PIPELINES)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do, and its defaults."""
        return capabilities(self.kind, self.transformer.config)

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
        chunks = (to_tensor(video[i:i + ENCODED_AT_ONCE], self._vae_device)[None].to(self.vae.dtype)
                  for i in range(0, len(video), ENCODED_AT_ONCE))
        with plan.applied(self.vae):
            raw = torch.cat(list(encode_stream(self.vae, chunks, frames=plan.frames)), dim=2)
        latents = self.vae.normalize(raw.float())
        check_finite(latents, "the VAE's encoder", self.vae)
        return latents

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload as diffusers does, with its arguments.

        Raises:
            UserError: to a disk, a component two layers of which share a weight: diffusers 0.42 loses it.
        """
        given = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        excluded = given.get("exclude_modules") or []
        tied = [name for name, part in self.components.items() if isinstance(part, nn.Module) and has_tied_weights(part)
                and name not in ([excluded] if isinstance(excluded, str) else excluded)]
        if tied and given.get("offload_to_disk_path") is not None:
            raise UserError(f"{' and '.join(tied)}: layers share a weight, so it cannot be offloaded to a disk; add it "
                            f"to exclude_modules, or leave out offload_to_disk_path")
        super().enable_group_offload(*args, **kwargs)

    def upcast_weights(self) -> None:
        """Turn half-precision weights on a CPU that cannot compute in half precision into float32."""
        upcast_unsupported([self.vae, self.transformer, self.text_encoder])

    @property
    def _vae_device(self) -> torch.device:
        """Where the VAE computes: it alone may have been left on the CPU. Offloaded weights do not say it."""
        return self._execution_device if is_offloaded(self.vae) else self.vae.device

    def decode_plan(self, memory: MemoryOptions, height: int, width: int, batch: int = 1) -> StreamPlan:
        """Plan decoding within `memory`, at most `DECODED_AT_ONCE` latent frames at once."""
        most = DECODED_AT_ONCE * self.vae.temporal_compression_ratio
        free = free_memory(self._vae_device) if memory.free is None else memory.free
        memory = replace(memory, free=free, frames=most if memory.frames is None else min(memory.frames, most))
        return memory.plan(self.vae, "decode", height, width, batch)

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload as diffusers does, which calls this again after every video."""
        self._exclude_from_cpu_offload = ["vae"] * self.decode_on_cpu  # diffusers reads this name
        super().enable_model_cpu_offload(*args, **kwargs)
        self._keep_vae()

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        self._exclude_from_cpu_offload = ["vae"] * self.decode_on_cpu
        super().enable_sequential_cpu_offload(*args, **kwargs)
        self._keep_vae()

    def _keep_vae(self) -> None:
        if self.decode_on_cpu:
            remove_hook_from_module(self.vae, recurse=True)  # it would bring the weights to the accelerator
            upcast_unsupported([self.vae.to("cpu")])
