"""Text-to-video pipelines of diffusers, with the stream of events that `lvdm.generation` and the app use."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from odvae.inference.memory import AUTO, MemoryOptions
from odvae.model.distilled_decoder import DistilledDecoder
from odvae.utils.errors import UserError
from odvae.utils.finite import check_finite
from odvae.utils.precision import upcast_unsupported

from ..capabilities import PIPELINES, Capabilities, VideoGrid, video_grid
from .latent_decoder import Tile, decode, decoder_tile, latents_of
from .offload import Requirements
from .outputs import DecodeProgress, RolloutGroup, RolloutStep, VideoChunk
from .params import GenerationParams, check_supported
from .prompts import Prompt, as_list

SamplingEvent = RolloutStep | RolloutGroup | DecodeProgress | VideoChunk


class DiffusersAdapter:
    """A pipeline of diffusers, one of `lvdm.capabilities.PIPELINES`, used like an `LVDMPipeline`. It denoises a whole
    video as one group, by its own `__call__`.

    Attributes:
        decode_on_cpu: decode there, wherever the other components are.
        distilled_decoder: decodes in place of the VAE's decoder; see `attach_decoder`.
    """

    distilled_decoder: DistilledDecoder | None = None

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.kind = type(pipeline).__name__
        self.decode_on_cpu = False
        self._takes = inspect.signature(type(pipeline).__call__).parameters
        pipeline.set_progress_bar_config(disable=True)  # the events tell the progress

    # ---- its components ----

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def transformer(self) -> Any:
        """The denoiser; of two, the one for high noise if it is there."""
        first = self.pipeline.transformer
        return self.pipeline.transformer_2 if first is None else first

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @property
    def components(self) -> dict[str, Any]:
        return dict(self.pipeline.components)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do, and its defaults."""
        return PIPELINES[self.kind]

    @property
    def grid(self) -> VideoGrid:
        """The sizes of its videos."""
        return video_grid(self.kind, self.transformer.config, self.vae.config)

    def to(self, *args: Any, **kwargs: Any) -> DiffusersAdapter:
        self.pipeline.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        self.pipeline._exclude_from_cpu_offload = list(type(self.pipeline)._exclude_from_cpu_offload)
        self.pipeline.enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload all but the VAE, whose statistics are read outside its modules (LTX)."""
        self.pipeline._exclude_from_cpu_offload = [*type(self.pipeline)._exclude_from_cpu_offload, "vae"]
        self.pipeline.enable_sequential_cpu_offload(*args, **kwargs)

    def remove_all_hooks(self) -> None:
        self.pipeline.remove_all_hooks()

    def upcast_weights(self) -> None:
        """Turn half-precision weights on a CPU that cannot compute in half precision into float32."""
        upcast_unsupported([part for part in self.components.values() if isinstance(part, nn.Module)])

    def get_scheduler(self, scheduler: Any = None) -> Any:
        """Return its scheduler; it takes no other."""
        check_supported(self.kind, {"scheduler": scheduler})
        return self.scheduler

    def group_layout(self, latents: int, given: int = 0) -> tuple[int, ...]:
        """Latent frames of each group: one group."""
        return (latents,)

    def requirements(self, height: int | None = None, width: int | None = None, batch: int = 1) -> Requirements:
        """Estimate the memory for `batch` videos of this many pixels (None: its own size). Of decoding, only the
        frames of one latent frame in the decoder's last layers count; what the transformer computes does not."""
        grid = self.grid
        height, width = height or grid.height, width or grid.width
        grid.check_size(height, width)
        weights = {name: sum(x.nbytes for x in (*part.parameters(), *part.buffers()))
                   for name, part in self.components.items() if isinstance(part, nn.Module)}
        weights = {"transformer": 0, **weights}  # Wan 2.2 may have only its second one
        channels = next((x.shape[1] for x in reversed(list(self.vae.decoder.parameters())) if x.ndim > 2), 1)
        decoding = 3 * batch * channels * grid.temporal_compression * height * width * self.vae.dtype.itemsize
        return Requirements(weights, 0, decoding)

    # ---- its videos ----

    def encode_video(self, video: np.ndarray) -> Tensor:
        """Raise UserError: it continues no video."""
        raise UserError(f"a {self.kind} cannot continue an image or a video: "
                        f"{PIPELINES[self.kind].unsupported['video']}")

    def stream(self, prompt: Prompt | Sequence[Prompt], *, negative_prompt: str | Sequence[str] | None = None,
               height: int | None = None, width: int | None = None, num_frames: int | None = None,
               seed: int | Sequence[int] = 0, generator: Any = None, video_latents: Tensor | None = None,
               memory: MemoryOptions = AUTO, **inputs: Any) -> Iterator[SamplingEvent]:
        """Generate videos and yield events meanwhile: a `RolloutStep` after every step, the `RolloutGroup` of all
        latents, a `DecodeProgress`, and the `VideoChunk` of all frames.

        It computes in a thread of its own from the first event on; closing the iterator stops it after its step.

        Args:
            generator: torch.Generator, one or a list of one per video; None: those of `seed`, on the CPU.
            inputs: num_inference_steps, guidance_scale, frame_rate: None: the pipeline's own. Others are those of
                `LVDMPipeline.stream`, which must have their defaults.

        Raises:
            UserError: at once, for sizes and lengths that do not fit, and for what it cannot do.
            NonFiniteError: the transformer or the VAE gave NaN or infinity.
        """
        schedules, grid = as_list(prompt), self.grid
        given = {name: inputs.get(name) is not None for name in ("image", "video")}
        given |= {"sections": any(len(schedule) > 1 for schedule in schedules)}
        given["video"] |= video_latents is not None
        check_supported(self.kind, inputs, *(name for name, is_given in given.items() if is_given))
        if unknown := sorted({*inputs} - {*GenerationParams.model_fields, "image", "video"}):
            raise UserError(f"a {self.kind} takes no {', '.join(unknown)} here; call its `pipeline` with them")
        height, width = height or grid.height, width or grid.width
        grid.check_size(height, width)
        latents = grid.latent_frames(grid.min_frames if num_frames is None else num_frames)
        seeds = [seed + i for i in range(len(schedules))] if isinstance(seed, int) else list(seed)
        negative = negative_prompt or ""
        negative = [negative] * len(schedules) if isinstance(negative, str) else list(negative)
        tile = self.decode_plan(memory, height, width, len(schedules))
        arguments = self._defaults(inputs) | {
            "prompt": [schedule[0][1] for schedule in schedules], "height": height, "width": width,
            "num_frames": grid.num_frames(latents),
            "generator": generator or [torch.Generator().manual_seed(one) for one in seeds]}
        if "negative_prompt" in PIPELINES[self.kind].unsupported:
            check_supported(self.kind, {"negative_prompt": "".join(negative)})
        else:
            arguments["negative_prompt"] = negative
        return self._events(arguments, (latents, height, width), tile)

    def _defaults(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs that its call takes; where one is None, its kind's default."""
        able = PIPELINES[self.kind]
        values = {name: default if inputs.get(name) is None else inputs[name]
                  for name, default in (("num_inference_steps", able.num_inference_steps),
                                        ("guidance_scale", able.guidance_scale), ("frame_rate", self.grid.frame_rate))}
        return {name: value for name, value in values.items() if name in self._takes}

    def _events(self, arguments: dict[str, Any], size: tuple[int, int, int],
                tile: Tile | None) -> Iterator[SamplingEvent]:
        self.upcast_weights()
        latents = yield from _sample(self.pipeline, arguments)
        group = latents_of(self.pipeline, latents, *size)
        check_finite(group, "the transformer", self.transformer)
        yield RolloutGroup(1, 1, group)
        frames = self._decode(group, tile)
        yield DecodeProgress(1, 1, 1, 1)
        yield VideoChunk(1, 1, frames, group)

    def decode_plan(self, memory: MemoryOptions, height: int, width: int, batch: int = 1) -> Tile | None:
        """Return the tiles that the VAE decodes in; None: as it is set."""
        return None if memory.tile is None else decoder_tile(self.grid.spatial_compression, *memory.tile)

    def decode_latents(self, groups: Iterable[Tensor], plan: Tile | None = None) -> Iterator[np.ndarray]:
        """Decode latents (B, c, t, h, w) of whole videos to frames uint8 (B, t', H, W, 3), equal to those of
        `stream`."""
        self.upcast_weights()
        for latents in groups:
            yield self._decode(latents, plan)

    def _decode(self, latents: Tensor, tile: Tile | None) -> np.ndarray:
        if self.decode_on_cpu:
            remove_hook_from_module(self.vae, recurse=True)
            upcast_unsupported([self.vae.to("cpu")])
        try:
            return decode(self.pipeline, latents, tile, self.distilled_decoder)
        finally:
            self.pipeline.maybe_free_model_hooks()


def _sample(pipeline: Any, arguments: dict[str, Any]) -> Generator[RolloutStep, None, Tensor]:
    """Call the pipeline in a thread; yield after every step and return the latents as it gives them."""
    events: SimpleQueue[RolloutStep | Tensor | BaseException] = SimpleQueue()
    closed = Event()

    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if closed.is_set():
            pipeline._interrupt = True  # the remaining steps are skipped
        events.put(RolloutStep(1, 1, step + 1, pipeline.num_timesteps))
        return tensors

    def call() -> None:
        try:
            events.put(pipeline(**arguments, output_type="latent", return_dict=False,
                                callback_on_step_end=on_step_end)[0])
        except BaseException as error:
            events.put(error)

    thread = Thread(target=call, name="diffusers", daemon=True)
    thread.start()
    try:
        while isinstance(event := events.get(), RolloutStep):
            yield event
    finally:
        closed.set()
        thread.join()
    if isinstance(event, BaseException):
        with contextlib.suppress(Exception):
            pipeline.maybe_free_model_hooks()
        raise event
    return event
