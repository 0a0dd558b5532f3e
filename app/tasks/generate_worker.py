"""Run generation and decoding jobs: render a video into chunks, progress reports and final files."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from app.inference.fragmented_mp4 import FragmentedMp4Writer, write_picture
from app.inference.latent_preview import preview_picture
from app.inference.model_manager import MemoryFallback, is_out_of_memory
from app.storage.jobs import JobSignal
from app.tasks.context import JobContext, JobInterrupted
from app.tasks.generate import GenerateParams, pipeline_folder
from app.tasks.generate_source import open_chunks
from app.tasks.loras import lora_files
from app.tasks.pipeline_spec import load_pipeline_spec
from lvdm.generation.drift import Drift
from lvdm.generation.latent_store import LatentChunks, LatentMetadata, parts_folder, read_latents
from lvdm.generation.render import VideoOutput, render
from lvdm.sampling.loading import AnyPipeline
from lvdm.sampling.outputs import DecodeProgress, RolloutGroup, RolloutStep, VideoChunk
from odvae.inference.memory import MemoryOptions
from odvae.utils.errors import NonFiniteError, UserError

PREVIEW_INTERVAL = 0.5  # seconds between two previews


def run(context: JobContext) -> None:
    """Sample the missing groups, decode all groups, and write final.mp4, final.safetensors and poster.webp."""
    params = GenerateParams.model_validate(context.job.params)
    context.report_progress(phase="loading")
    folder = pipeline_folder(params.pipeline, context.services)
    pipeline = context.models.pipeline(folder, lora_files(params.loras, context.services.assets))
    target = context.folder / "final.safetensors"
    if target.is_file() and not parts_folder(target).exists():  # the server died after the last file
        _decode_stored(context, pipeline, target, params.tile)
        return
    chunks = open_chunks(context, pipeline, params)
    generation = GenerationRun(context, pipeline, chunks.metadata, chunks, name=load_pipeline_spec(folder).name)
    try:
        generation.render(params.tile)
    except Exception as error:
        if generation.frames and _keeps_finished(error):
            with contextlib.suppress(OSError, MemoryError):  # report the first error
                generation.finish(stopped=True)
        raise
    generation.finish()
    decodings = generation.decode_seconds
    context.models.measure(folder, context.job.params, generation.step_seconds,
                           [sum(decodings)] if generation.at_once else decodings,
                           guided=pipeline.capabilities.passes(context.job.params["guidance_scale"]) == 2)


def decode_again(context: JobContext, latents: Path, pipeline: str, tile: int | None) -> None:
    """Decode stored latents once more, e.g. in other tiles."""
    context.report_progress(phase="loading")
    loaded = context.models.pipeline(pipeline_folder(pipeline, context.services))
    if read_latents(latents)[0].different_parts(context.models.parts(), ["vae"]):
        raise UserError("The latents are of another VAE. Choose the pipeline that generated them.")
    _decode_stored(context, loaded, latents, tile)


def _decode_stored(context: JobContext, pipeline: AnyPipeline, file: Path, tile: int | None) -> None:
    metadata, latents = read_latents(file)
    generation = GenerationRun(context, pipeline, metadata, complete=latents)
    generation.render(tile)
    generation.finish()


def _keeps_finished(error: Exception) -> bool:
    """Whether a job that ends with this error keeps its finished groups as a video."""
    if isinstance(error, JobInterrupted):
        return error.signal is JobSignal.STOP
    return not isinstance(error, NonFiniteError)


def _next_fallback(context: JobContext, fallbacks: list[MemoryFallback], current: int, error: Exception) -> int:
    """Return the next fallback that helps, free the memory of the failed run, and notify the user. Raises the error
    again if there is none."""
    stage = "decoding" if context.progress.phase == "decoding" else "sampling"
    next_index = next((i for i in range(current + 1, len(fallbacks)) if stage in fallbacks[i].helps), None)
    if next_index is None:
        raise error
    error.__traceback__ = None  # it holds the tensors of the failed run
    context.models.free_memory()
    context.note(f"Out of memory in {stage}, at group {context.progress.group} of {context.progress.groups}; continued "
                 f"{fallbacks[next_index].effect}.")
    return next_index


@dataclass
class GenerationRun:
    """The rendering of one video: its files, counts and times.

    Attributes:
        chunks: the stored latents, to which new ones are added; or
        complete: (c, t, h, w) all latents, to be decoded only.
        name: of the pipeline, for the user.
        step_seconds, decode_seconds: of each sampling step, and of decoding each group, in this run.
    """

    context: JobContext
    pipeline: AnyPipeline
    metadata: LatentMetadata
    chunks: LatentChunks | None = None
    complete: Tensor | None = None
    name: str = ""
    step_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    _writer: FragmentedMp4Writer | None = None
    _drift: Drift | None = None
    _previewed_at: float = 0.0
    _groups_done: int = 0  # groups in the video
    _groups_published: int = 0  # groups published by earlier runs, which this run writes again with the same bytes

    @property
    def rate(self) -> float:
        return self.metadata.settings.frame_rate or 1.0

    @property
    def frames(self) -> int:
        """The number of frames in the video."""
        return 0 if self._writer is None else self._writer.frames

    @property
    def groups(self) -> int:
        return len(self.pipeline.group_layout(self.metadata.latents, self.metadata.given))

    @property
    def at_once(self) -> bool:
        """Whether all of the video is sampled before any of it is decoded."""
        return not self.pipeline.grid.group

    def render(self, tile: int | None) -> None:
        """Render the video, by a fallback if memory runs out. `tile`: side of the decoding tiles in pixels."""
        models, settings = self.context.models, self.metadata.settings
        fallbacks, current = models.memory_fallbacks(settings.height or 0, settings.width or 0, tile), 0
        while True:
            try:
                models.place(self.pipeline, fallbacks[current])
                self._render(fallbacks[current].memory)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                current = _next_fallback(self.context, fallbacks, current, error)

    def _render(self, memory: MemoryOptions) -> None:
        """Render the video, starting with its stored groups, and report the progress."""
        if self._writer is not None:
            self._writer.close()
        resumed = (self.context.folder / "chunks").is_dir()
        self._groups_published = int(self.context.job.result.get("chunks", 0)) if resumed else 0
        self._groups_done = 0
        self._writer, self._drift = FragmentedMp4Writer(self.context.folder, self.rate), Drift(self.rate)
        output = VideoOutput(self.metadata, self._writer.append, self.chunks, self.complete, self._drift)
        if output.length < self.metadata.latents:
            self.context.report_progress(phase="text")
        self.context.report_progress(groups=self.groups, group=1, step=0, frames=0)
        begin, decoding = time.monotonic(), 0.0
        with contextlib.closing(render(self.pipeline, [output], memory)) as events:  # type: ignore[type-var]
            for event in events:
                if isinstance(event, RolloutGroup):
                    continue
                seconds = time.monotonic() - begin
                if isinstance(event, RolloutStep):
                    self.step_seconds.append(seconds)
                elif isinstance(event, DecodeProgress):
                    decoding += seconds
                elif event.group:
                    self.decode_seconds.append(decoding)
                decoding = 0.0 if isinstance(event, VideoChunk) else decoding
                self._report_event(event)
                begin = time.monotonic()

    def _report_event(self, event: RolloutStep | DecodeProgress | VideoChunk) -> None:
        group = self._groups_done + 1
        if isinstance(event, RolloutStep):
            self._preview(event)
            phase = "decoding" if event.step == event.steps else "sampling"  # of what follows
            groups = 1 if self.at_once else self.groups
            self._report(phase=phase, group=group, groups=groups, step=event.step, steps=event.steps, part=0, detail="")
        elif isinstance(event, DecodeProgress):
            detail = "" if event.group else "stored latents"
            self._report(phase="decoding", group=group, groups=self.groups, part=event.part, parts=event.parts,
                         detail=detail)
        else:
            self._report_chunk(event)

    def _report_chunk(self, event: VideoChunk) -> None:
        """Publish a written group, and the poster."""
        self._groups_done += 1
        frames, done = event.frames[0], self._groups_done
        if done <= 2:
            write_picture(self.context.folder / "poster.webp", frames[len(frames) // 2])
        if done > self._groups_published or self.frames >= self.metadata.settings.length:
            self.context.update_result(chunks=done, frames=self.frames, seconds=self.frames / self.rate)
        phase = "writing" if done == self.groups else "sampling" if event.groups and not self.at_once else "decoding"
        self._report(phase=phase, group=min(done + 1, self.groups), step=0, frames=self.frames)

    def _report(self, **changes: Any) -> None:
        """Report progress with an estimate of the remaining time. `done` and `total` count steps and decodings."""
        progress = replace(self.context.progress, **changes)
        steps = progress.steps or self.metadata.settings.num_inference_steps or 1
        finished = self.groups if progress.phase == "writing" else max(0, progress.group - 1)
        sampled = 1 if self.at_once else self.groups  # how often all steps are done
        step, group = _typical(self.step_seconds), _typical(self.decode_seconds)
        steps_done = {"sampling": progress.step, "writing": 0}.get(progress.phase, steps)
        steps_done += steps * (sampled if progress.phase == "writing" else 0 if self.at_once else finished)
        left = None
        if step is not None:
            left = max(0.0, step * (steps * sampled - steps_done) + (group or 0.0) * (self.groups - finished))
        done, total = steps_done + finished, steps * sampled + self.groups
        self.context.report_progress(**changes, done=done, total=total, seconds_left=left)

    def _preview(self, event: RolloutStep) -> None:
        if event.estimate is not None and time.monotonic() - self._previewed_at >= PREVIEW_INTERVAL:
            self._previewed_at = time.monotonic()
            matrix = self.context.models.color_matrix(self.pipeline)
            write_picture(self.context.folder / "preview.webp", preview_picture(event.estimate[0, :, -1], matrix))

    def finish(self, stopped: bool = False) -> None:
        """Write final.mp4, with the parameters in its metadata, and the latents as one file.

        Args:
            stopped: write the finished groups only, and keep the stored groups so that the job can be resumed.
        """
        assert self._writer is not None and self._drift is not None
        job = self.context.services.job_files.find(self.context.job.id)  # with the notes of this run
        metadata = self.metadata
        if stopped and self.chunks is not None:  # the files hold less than requested
            settings = metadata.settings.model_copy(update={"num_frames": self.frames})
            latents = self.pipeline.grid.latent_frames(self.frames)
            metadata = metadata.model_copy(update={"latents": latents, "settings": settings})
        comment = metadata.comment | {"made_by": "lvdm-app", "notes": list(job.notes)}
        self._writer.finish(self.context.folder / "final.mp4", comment)
        if self.chunks is not None:
            self.chunks.truncate(metadata.latents)
            self.chunks.finalize(metadata)
            if not stopped:
                self.chunks.remove()
        report = self._drift.report() if self.frames > 1 else {}
        self._writer.close()
        self.context.update_result(
            settings=metadata.settings.model_dump(mode="json"), frames=self.frames, seconds=self.frames / self.rate,
            final=True, pipeline=self.name, extendable="video" not in self.pipeline.capabilities.unsupported,
            drift={name: report.get(name) for name in ("jump", "first_to_last")} if report else {},
            seconds_per_step=_typical(self.step_seconds), seconds_per_decode=_typical(self.decode_seconds))


def _typical(seconds: list[float]) -> float | None:
    """Return the median of the last durations, without the first, which fills caches."""
    last = sorted(seconds[1:][-40:] or seconds)
    value = last[len(last) // 2] if last else None
    return value if value is None or math.isfinite(value) else None
