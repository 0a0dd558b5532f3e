"""Where a generation job starts from: its stored latents, a file, or a video of the history."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from app.tasks.context import JobContext
from app.tasks.generate import GenerateParams, source_job
from lvdm.generation.latent_store import LatentChunks, LatentMetadata, parts_folder, read_latents
from lvdm.generation.pending import build_metadata
from lvdm.generation.requests import GenerationRequest, continuation, describe_file, load_context_frames
from lvdm.sampling.loading import AnyPipeline
from lvdm.sampling.params import VideoFileParams
from odvae.utils.files import read_json


def open_chunks(context: JobContext, pipeline: AnyPipeline, params: GenerateParams) -> LatentChunks:
    """Open the stored latents of this job; at its first run, start from those of its source."""
    target, parts = context.folder / "final.safetensors", context.models.parts()
    file = parts_folder(target) / "about.json"
    if file.is_file():
        metadata = LatentMetadata.model_validate(read_json(file))
        if not metadata.different_parts(parts, sorted({*parts, *metadata.parts} - {"scheduler"})):
            return LatentChunks(target, metadata)
        context.note("The model has changed since this job started, so it was restarted.")
        LatentChunks.remove_of(target)
        shutil.rmtree(context.folder / "chunks", ignore_errors=True)
    request = _build_request(context, pipeline, params, target.with_suffix(".mp4"))
    return LatentChunks(target, build_metadata(pipeline, request, parts), request.context_latents)


def _build_request(context: JobContext, pipeline: AnyPipeline, params: GenerateParams,
                   target: Path) -> GenerationRequest:
    """Return the video to generate, with the latents of its source."""
    settings = params.file_params()
    if params.job:
        return _extend_video(context, pipeline, params, settings)
    if not params.upload:
        return GenerationRequest(target, settings)
    context.report_progress(phase="encoding", detail="uploaded file")
    upload = context.services.uploads.find(params.upload, context.job.owner)
    source = describe_file(upload.path).replace(upload.path.name, upload.name)
    settings = settings.model_copy(update={"source": source})
    frames = load_context_frames(pipeline, upload.path, settings)
    return GenerationRequest(target, settings, pipeline.encode_video(frames))


def _extend_video(context: JobContext, pipeline: AnyPipeline, params: GenerateParams,
                  settings: VideoFileParams) -> GenerationRequest:
    """Return a continuation of a video of the history, with the settings that change from the join on."""
    parent = source_job(params, context.services, context.job.owner)
    file = context.services.job_files.folder(parent) / "final.safetensors"
    before = read_latents(file)[0].settings
    fixed = {"sections", "height", "width", "frame_rate", "source", "scale", "seed"}
    changes = {name: getattr(settings, name) for name in type(settings).model_fields
               if name not in fixed and getattr(settings, name) != getattr(before, name)}
    request = continuation(pipeline, file, changes, parts=context.models.parts())
    join = max((second for second, _ in request.settings.sections), default=0.0)
    join = max(join, before.length / (before.frame_rate or 1))
    later = tuple(section for section in settings.sections if section[0] > join)
    settings = request.settings.model_copy(update={"sections": (*request.settings.sections, *later)})
    return replace(request, settings=settings)
