"""The worker's side of generating and decoding: events of the pipeline become chunks, kept latents and progress."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from app.inference.fragmented_mp4 import FragmentedMp4Writer, write_picture
from app.inference.latent_preview import preview_picture
from app.inference.model_manager import MemoryFallback, is_out_of_memory
from app.storage.jobs import JobSignal
from app.tasks.context import JobContext, JobInterrupted
from app.tasks.generate import GenerateParams, pipeline_folder, source_job
from lvdm.generation.drift import Drift
from lvdm.generation.latent_store import LatentChunks, LatentMetadata, parts_folder, read_latents
from lvdm.generation.pending import build_metadata
from lvdm.generation.requests import GenerationRequest as Video
from lvdm.generation.requests import continuation, describe_file, load_context_frames
from lvdm.sampling.pipeline import DecodeProgress, LVDMPipeline, VideoChunk
from lvdm.sampling.rollout import RolloutStep
from odvae.utils.errors import NonFiniteError, UserError
from odvae.utils.files import read_json

if TYPE_CHECKING:
    from lvdm.sampling.params import VideoFileParams

PREVIEWED = 0.5  # seconds between two pictures of latents


def run(context: JobContext) -> None:
    """Sample what is not kept yet, decode all of it, and leave final.mp4, final.safetensors and poster.webp."""
    params = GenerateParams.model_validate(context.job.params)
    context.report_progress(phase="loading")
    folder = pipeline_folder(params.pipeline, context.services)
    pipeline = context.engine.pipeline(folder)
    target = context.folder / "final.safetensors"
    if target.is_file() and not parts_folder(target).exists():  # the server died between the last file and the store
        _decode_kept(context, pipeline, target, params.tile)
        return
    parts = _parts(context, pipeline, params)
    making = GenerationRun(context, pipeline, parts.about)
    rungs, rung = context.engine.memory_fallbacks(params.height or 0, params.width or 0, params.tile), 0
    try:
        while True:
            try:
                context.engine.place(pipeline, rungs[rung])
                making.sample_and_decode(parts, rungs[rung])
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                rung = _next_fallback(context, rungs, rung, error)
                parts = LatentChunks(parts.target, parts.about)
    except Exception as error:
        stopped = (
            error.signal is JobSignal.STOP
            if isinstance(error, JobInterrupted)
            else not isinstance(error, NonFiniteError)
        )
        if stopped and making.frames:
            with contextlib.suppress(OSError, MemoryError):  # the first error is the one to tell
                making.complete(parts, stopped=True)
        raise
    making.complete(parts)
    context.engine.measure(folder, context.job.params, making.step_seconds, making.decode_seconds)


def decode_again(context: JobContext, latents: Path, pipeline: str, tile: int | None) -> None:
    """Decode kept latents once more, e.g. in other tiles."""
    context.report_progress(phase="loading")
    loaded = context.engine.pipeline(pipeline_folder(pipeline, context.services))
    if read_latents(latents)[0].other_parts(context.engine.parts(), ["vae"]):
        raise UserError("The latents are of another VAE. Choose the pipeline that made them.")
    _decode_kept(context, loaded, latents, tile)


def _decode_kept(context: JobContext, pipeline: LVDMPipeline, latents: Path, tile: int | None) -> None:
    about, kept = read_latents(latents)
    making = GenerationRun(context, pipeline, about)
    rungs, rung = context.engine.memory_fallbacks(about.settings.height or 0, about.settings.width or 0, tile), 0
    while True:
        try:
            context.engine.place(pipeline, rungs[rung])
            making.follow(making.decoding(kept[None], rungs[rung]), None)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rung = _next_fallback(context, rungs, rung, error)
    making.complete(None)


def _next_fallback(context: JobContext, rungs: list[MemoryFallback], rung: int, error: Exception) -> int:
    """The next rung that helps against what happened, with the memory of the failed run freed; the job is told. Raises
    the error again where there is none."""
    where = "decoding" if context.progress.phase == "decoding" else "sampling"
    lower = next((i for i in range(rung + 1, len(rungs)) if where in rungs[i].helps), None)
    if lower is None:
        raise error
    error.__traceback__ = None  # it holds the tensors of the failed run
    context.engine.free_memory()
    context.note(
        f"Memory ran out in {where}, at group {context.progress.group} of {context.progress.groups}; it went on "
        f"{rungs[lower].effect}."
    )
    return lower


def _parts(context: JobContext, pipeline: LVDMPipeline, params: GenerateParams) -> LatentChunks:
    """The latents that are kept of this job; at its first run, what it goes on from is put there."""
    target, made_by = context.folder / "final.safetensors", context.engine.parts()
    about_file = parts_folder(target) / "about.json"
    if about_file.is_file():
        about = LatentMetadata.model_validate(read_json(about_file))
        if not about.other_parts(made_by, sorted({*made_by, *about.parts} - {"scheduler"})):
            return LatentChunks(target, about)
        context.note("The model has changed since this job began, so it began anew.")
        LatentChunks.remove_of(target)
        shutil.rmtree(context.folder / "chunks", ignore_errors=True)
    video = _resolve_context(context, pipeline, params, target.with_suffix(".mp4"))
    parts = LatentChunks(target, build_metadata(pipeline, video, made_by))
    if video.context_latents is not None and not parts.length:
        parts.add(video.context_latents[0])
    return LatentChunks(target, parts.about)


def _resolve_context(context: JobContext, pipeline: LVDMPipeline, params: GenerateParams, target: Path) -> Video:
    """What is to be made, and the latents that it goes on from."""
    settings = params.file_params()
    if params.job:
        return _extend_video(context, pipeline, params, settings)
    if not params.upload:
        return Video(target, settings)
    context.report_progress(phase="encoding", detail="what was uploaded")
    upload = context.services.uploads.find(params.upload, context.job.owner)
    settings = settings.model_copy(
        update={"source": describe_file(upload.path).replace(upload.path.name, upload.name)}
    )
    frames = load_context_frames(pipeline, upload.path, settings)
    return Video(target, settings, pipeline.encode_video(frames))


def _extend_video(
    context: JobContext, pipeline: LVDMPipeline, params: GenerateParams, settings: VideoFileParams
) -> Video:
    """A video of the history that goes on, with the settings that were changed from there on."""
    parent = source_job(params, context.services, context.job.owner)
    file = context.services.library.folder(parent) / "final.safetensors"
    before = read_latents(file)[0].settings
    fixed = {"sections", "height", "width", "frame_rate", "source", "scale", "seed"}
    changes = {name: getattr(settings, name) for name in type(settings).model_fields
               if name not in fixed and getattr(settings, name) != getattr(before, name)}
    video = continuation(pipeline, file, changes, parts=context.engine.parts())
    join = max((second for second, _ in video.settings.sections), default=0.0)
    later = tuple(one for one in settings.sections if one[0] > max(join, before.frames / (before.frame_rate or 1)))
    settings = video.settings.model_copy(update={"sections": (*video.settings.sections, *later)})
    return replace(video, settings=settings)


@dataclass
class GenerationRun:
    """One video on its way: counts, times, chunks."""

    context: JobContext
    pipeline: LVDMPipeline
    about: LatentMetadata
    frames: int = 0
    step_seconds: list[float] = field(default_factory=list)  # of this run
    decode_seconds: list[float] = field(default_factory=list)  # of a group
    _video: FragmentedMp4Writer | None = None
    _drift: Drift | None = None
    _previewed: float = 0.0
    _seen: int = 0  # chunks

    @property
    def rate(self) -> float:
        return self.about.settings.frame_rate or 1.0

    @property
    def groups(self) -> int:
        return len(self.pipeline.group_layout(self.about.latents, self.about.given))

    def sample_and_decode(self, parts: LatentChunks, rung: MemoryFallback) -> None:
        """Decode what is kept, then make the rest."""
        settings, kept = self.about.settings, parts.latents
        initial = None if kept is None else kept[None]
        if initial is not None and parts.length >= self.about.latents:
            self.follow(self.decoding(initial, rung), None)
            return
        self.context.report_progress(phase="text")
        self.follow(self.pipeline.stream(
            [settings.prompts], seed=[settings.seed], negative_prompt=[settings.negative_prompt], initial=initial,
            memory=rung.memory, **settings.stream_arguments), parts)

    def decoding(self, latents: Tensor, rung: MemoryFallback) -> Iterator[VideoChunk]:
        """The pieces of latents (1, c, t, h, w) that are whole."""
        pieces = latents.split(
            self.pipeline.group_layout(latents.shape[2], min(self.about.given, latents.shape[2])), dim=2
        )
        space = self.pipeline.vae.spatial_compression_ratio
        plan = self.pipeline.decode_plan(rung.memory, *(space * side for side in latents.shape[3:]))
        for piece, frames in zip(pieces, self.pipeline.decode_latents(pieces, plan), strict=True):
            yield VideoChunk(0, 0, frames, piece)

    def follow(self, events: Iterator[Any], parts: LatentChunks | None) -> None:
        """Turn the pipeline's events into chunks, kept latents and progress."""
        self.frames, chunks, done = 0, 0, 0  # done: groups that are in the video
        if self._video is not None:
            self._video.close()
        seen = self.context.folder / "chunks"  # what was to be seen before this run is made again, to the same bytes
        self._seen = int(self.context.job.result.get("chunks", 0)) if seen.is_dir() else 0
        self._video = FragmentedMp4Writer(self.context.folder, self.rate)
        self._drift = Drift(self.rate)
        total, begin, decoding = self.groups, time.monotonic(), 0.0
        self.context.report_progress(groups=total, group=1, step=0, frames=0)
        with contextlib.closing(events) as events:  # type: ignore[type-var]
            for event in events:
                now = time.monotonic()
                if isinstance(event, RolloutStep):
                    self.step_seconds.append(now - begin)
                    before = total - event.groups + event.group - 1  # groups that are made
                    self._preview(event)
                    phase = "decoding" if event.step == event.steps else "sampling"  # is what follows
                    self._report(phase=phase, group=before + 1, step=event.step, steps=event.steps, piece=0, detail="")
                elif isinstance(event, DecodeProgress):
                    kept, decoding = event.group == 0, decoding + now - begin
                    self._report(phase="decoding", group=done + 1, piece=event.part, pieces=event.parts,
                               detail="what is kept" if kept else "")
                else:
                    if parts is not None and event.group:
                        parts.add(event.latents[0])
                    if event.group:
                        self.decode_seconds.append(decoding)
                    decoding = 0.0
                    chunks, done = chunks + 1, done + 1
                    self._add(event.frames[0], chunks, done, parts)
                begin = time.monotonic()

    def _add(self, frames: np.ndarray, chunks: int, done: int, parts: LatentChunks | None) -> None:
        assert self._video is not None and self._drift is not None
        self.frames = self._video.append(frames)
        self._drift.add(frames)
        if done <= 2:
            write_picture(self.context.folder / "poster.webp", frames[len(frames) // 2])
        if chunks > self._seen or self.frames >= self.about.settings.frames:
            self.context.update_result(chunks=chunks, frames=self.frames, seconds=self.frames / self.rate)
        phase = "writing" if done == self.groups else "sampling" if parts is not None else "decoding"
        self._report(phase=phase, group=min(done + 1, self.groups), step=0,
                   frames=self.frames)

    def _report(self, **changes: Any) -> None:
        """Report, with the time left by what steps and groups took so far. Done and total count steps and groups."""
        progress = replace(self.context.progress, **changes)
        steps = progress.steps or self.about.settings.steps
        made = self.groups if progress.phase == "writing" else max(0, progress.group - 1)
        step, group = _typical(self.step_seconds), _typical(self.decode_seconds)
        left = None
        if step is not None:
            groups = self.groups - made
            left = max(0.0, step * (steps * groups - progress.step) + (group or 0.0) * groups)
        share = {"sampling": progress.step, "writing": 0}.get(progress.phase, steps)
        self.context.report_progress(
            **changes, done=made * (steps + 1) + share, total=self.groups * (steps + 1), seconds_left=left
        )

    def _preview(self, event: RolloutStep) -> None:
        if event.estimate is not None and time.monotonic() - self._previewed >= PREVIEWED:
            self._previewed = time.monotonic()
            matrix = self.context.engine.colours(self.pipeline)
            write_picture(self.context.folder / "preview.webp", preview_picture(event.estimate[0, :, -1], matrix))

    def complete(self, parts: LatentChunks | None, stopped: bool = False) -> None:
        """Write final.mp4 with the settings in it, and the latents as one file."""
        assert self._video is not None and self._drift is not None
        job = self.context.services.library.find(self.context.job.id)  # with the notes of this run
        about = self.about
        if stopped and parts is not None:  # of this file, shorter settings are the true ones
            length = self.pipeline.vae.latent_frames(self.frames)
            settings = about.settings.model_copy(update={"frames": self.frames})
            about = about.model_copy(update={"latents": length, "settings": settings})
        metadata = about.settings.model_dump(mode="json") | {"made_by": "lvdm-app", "notes": list(job.notes)}
        self._video.finish(self.context.folder / "final.mp4", metadata)
        if parts is not None:
            whole = LatentChunks(parts.target, parts.about)
            whole.about = about
            whole.truncate(about.latents)
            whole.finalize()
            if not stopped:
                whole.remove()
        report = self._drift.report() if self.frames > 1 else {}
        self._video.close()
        self.context.update_result(frames=self.frames, seconds=self.frames / self.rate, final=True,
                          settings=about.settings.model_dump(mode="json"),
                          drift={name: report.get(name) for name in ("jump", "first_to_last")} if report else {},
                          seconds_a_step=_typical(self.step_seconds), seconds_a_decode=_typical(self.decode_seconds))


def _typical(seconds: list[float]) -> float | None:
    """The median of the last ones; the very first has caches to fill."""
    last = sorted(seconds[1:][-40:] or seconds)
    value = last[len(last) // 2] if last else None
    return value if value is None or math.isfinite(value) else None
