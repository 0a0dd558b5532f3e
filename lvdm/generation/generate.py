"""Generate videos to files, which are written while they are sampled; finished ones are skipped."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odvae.data.video.writer import VideoWriter
from odvae.inference.memory import AUTO, MemoryOptions
from odvae.trainer.distributed import best_device
from odvae.utils.errors import NonFiniteError, UserError
from odvae.utils.plots import contact_sheet
from odvae.utils.progress import bar

from ..sampling.diffusers_adapter import DiffusersAdapter
from ..sampling.loading import AnyPipeline
from ..sampling.outputs import RolloutStep
from ..sampling.prompts import format_prompt
from ..sampling.schedulers import num_function_evaluations
from .drift import Drift
from .fingerprints import fingerprints
from .latent_store import LatentMetadata, is_vae_of, read_latents
from .pending import COLUMNS, PendingVideo, batches, build_metadata
from .render import RenderEvent, VideoOutput, render
from .requests import GenerationRequest

logger = logging.getLogger(__name__)

TILE = 256  # pixels a side, when whole frames do not fit the memory


@dataclass
class GenerationReport:
    """The result of one call."""

    generated: list[Path] = field(default_factory=list)
    reused: list[Path] = field(default_factory=list)  # finished earlier
    failed: list[tuple[Path, str]] = field(default_factory=list)  # with the reason
    non_finite: list[Path] = field(default_factory=list)  # those that failed because a model gave NaN or infinity
    seconds: float = 0.0  # of computing
    video_seconds: float = 0.0  # of generated video
    sheet: Path | None = None

    def failure(self, message: str) -> Exception:
        """The exception for the failed ones: NonFiniteError if a model is at fault, else UserError."""
        return NonFiniteError(message) if self.non_finite else UserError(message)

    def check(self) -> None:
        """Raise the exception of the first failed one if no video exists."""
        if self.failed and not self.generated and not self.reused:
            raise self.failure(self.failed[0][1])

    def add(self, other: GenerationReport) -> None:
        """Add the videos and times of a part."""
        self.generated += other.generated
        self.reused += other.reused
        self.failed += other.failed
        self.non_finite += other.non_finite
        self.seconds += other.seconds
        self.video_seconds += other.video_seconds

    def lines(self) -> list[str]:
        """The report for the terminal."""
        lines = [*map(str, self.generated), *(f"{path} already exists, with the same settings" for path in self.reused),
                 *(f"{path} failed: {reason}" for path, reason in self.failed)]
        speed = self.seconds / self.video_seconds if self.video_seconds else None
        lines.append(f"{len(self.generated)} generated, {len(self.reused)} reused, {len(self.failed)} failed"
                     + ("" if speed is None else f"; {speed:.2f} s of computing per second of video"))
        return lines if self.sheet is None else [*lines, str(self.sheet)]


def generate(pipeline: AnyPipeline, requests: Sequence[GenerationRequest], *, batch: int = 8, overwrite: bool = False,
             offload: str | None = None, sheet: Path | None = None) -> GenerationReport:
    """Generate videos to files. Each group is decoded and appended to its file as soon as it is sampled, and stored as
    latents: a stopped video is resumed after its last stored group, a finished one is left alone.

    The parameters are stored in the MP4's comment and with the latents. The `drift` of a long video, with more groups
    than a group attends to, is measured.

    Args:
        batch: how many videos that differ only in prompts and seed are generated together, at most.
        overwrite: generate again what is finished or has other parameters.
        offload: "model" or "sequential", as in diffusers.
        sheet: a PNG with a row of frames per video.

    Raises:
        UserError: at once, if a file with other parameters exists; and if no video could be generated. Otherwise the
            report lists those that failed, which were also tried alone.
        NonFiniteError: no video could be generated, as a model gave NaN or infinity. Such videos leave no files.
    """
    check(requests, batch)
    parts = fingerprints(pipeline)
    videos = [PendingVideo(request, build_metadata(pipeline, request, parts), overwrite) for request in requests]
    enable_offload(pipeline, offload)
    report = render_pending(pipeline, videos, batch)
    report.check()
    if sheet is not None:
        report.sheet = write_sheet(videos, sheet)
    return report


def check(requests: Sequence[GenerationRequest], batch: int) -> None:
    """Raise UserError for a batch of no videos, or two videos with the same file name."""
    if batch < 1:
        raise UserError(f"batch={batch} must be at least 1")
    if len({request.target for request in requests}) != len(requests):
        raise UserError("two videos have the same file name; give different ones")


def enable_offload(pipeline: AnyPipeline, offload: str | None) -> None:
    """Keep idle weights off the accelerator; they cannot be read from then on. Raises UserError if there is none."""
    if offload is None:
        return
    if best_device().type == "cpu":
        raise UserError("offload needs an accelerator, and there is none; omit it")
    {"model": pipeline.enable_model_cpu_offload, "sequential": pipeline.enable_sequential_cpu_offload}[offload]()


def render_pending(pipeline: AnyPipeline, videos: Sequence[PendingVideo], batch: int) -> GenerationReport:
    """Render the videos that are not finished, in batches of at most `batch`."""
    report = GenerationReport(reused=[video.request.target for video in videos if video.finished])
    began = time.monotonic()
    _render_all(pipeline, _unfinished(videos, batch), report)
    report.seconds = time.monotonic() - began
    return report


def write_sheet(videos: Sequence[PendingVideo], sheet: Path) -> Path:
    """Draw a row of frames for each video that exists."""
    written = [video for video in videos if video.request.target.is_file()]
    prompts = [format_prompt(video.metadata.settings.prompts) for video in written]
    contact_sheet([video.thumbnails() for video in written], sheet, prompts, columns=COLUMNS)
    return sheet


def _unfinished(videos: Sequence[PendingVideo], batch: int) -> deque[list[PendingVideo]]:
    """The batches to render; videos that are only decoded and videos that are sampled are in different ones."""
    queue: deque[list[PendingVideo]] = deque()
    for group in batches(videos, batch):
        for complete in (True, False):
            if part := [video for video in group if not video.finished and video.complete is complete]:
                queue.append(part)
    return queue


def _render_all(pipeline: AnyPipeline, queue: deque[list[PendingVideo]], report: GenerationReport) -> None:
    """Render the batches. The videos of a batch that fails are tried again one by one."""
    total = sum(_steps(pipeline, videos[0], videos[0].request.context_length) for videos in queue)
    with bar(total, "generate", "step") as progress:
        while queue:
            videos = queue.popleft()
            try:
                _render_batch(pipeline, videos, progress)
                report.generated += [video.request.target for video in videos]
                settings = [video.metadata.settings for video in videos]
                report.video_seconds += sum(s.length / (s.frame_rate or 1) for s in settings)
            except (UserError, NonFiniteError, MemoryError, torch.OutOfMemoryError) as error:
                alone, non_finite = len(videos) == 1, isinstance(error, NonFiniteError)
                for video in videos:
                    video.discard(everything=alone and non_finite)
                if not alone:  # one of them is at fault, or they are too many
                    queue += [[video] for video in videos]
                    continue
                report.failed.append((videos[0].request.target, str(error) or type(error).__name__))
                report.non_finite += [videos[0].request.target] * non_finite


def _render_batch(pipeline: AnyPipeline, videos: Sequence[PendingVideo], progress: Any) -> None:
    """Render a batch, each video to its MP4 and its latent file."""
    metadata = videos[0].metadata
    rate, groups = metadata.settings.frame_rate or 1, len(pipeline.group_layout(metadata.latents, metadata.given))
    long = groups > metadata.settings.history_groups + 2
    with contextlib.ExitStack() as stack:
        outputs = [video.open(_writer(stack, video.request.target, video.metadata),
                              Drift(rate) if long else None) for video in videos]
        length = min(output.length for output in outputs)
        planned = _steps(pipeline, videos[0], videos[0].request.context_length)
        progress.total -= planned - _steps(pipeline, videos[0], length)
        for event in _render_events(pipeline, outputs):
            if isinstance(event, RolloutStep):
                progress.set_postfix(group=f"{event.group}/{event.groups}", refresh=False)
                progress.update(1)
        for video, output in zip(videos, outputs, strict=True):
            if output.chunks is not None:
                output.chunks.finalize()  # before the video: once its latents exist, it is only decoded again
            if output.drift is not None:
                output.drift.write(video.request.target)
    for output in outputs:
        if output.chunks is not None:
            output.chunks.remove()


def _render_events(pipeline: AnyPipeline, outputs: Sequence[VideoOutput]) -> Iterator[RenderEvent]:
    """Render; if memory runs out when a pipeline of diffusers decodes, decode in tiles. Ours has planned for it."""
    try:
        yield from render(pipeline, outputs)
    except (MemoryError, torch.OutOfMemoryError):
        if not isinstance(pipeline, DiffusersAdapter) or any(x.length < x.metadata.latents for x in outputs):
            raise
        logger.warning("out of memory in decoding; decoding in tiles of %dx%d pixels", TILE, TILE)
        yield from render(pipeline, outputs, MemoryOptions(tile=(TILE, TILE)))


def decode(pipeline: AnyPipeline, file: Path, target: Path, scale: int | None = None,
           memory: MemoryOptions = AUTO) -> None:
    """Decode stored latents to a video again, e.g. with other tiles or another scale.

    Raises:
        UserError: no latents are stored, or they are another VAE's.
    """
    metadata, latents = read_latents(file)
    if not is_vae_of(pipeline, metadata):
        raise UserError(f"{file} contains latents of another VAE; give the pipeline that generated it with --pipeline")
    groups = pipeline.group_layout(latents.shape[1], metadata.given)
    with contextlib.ExitStack() as stack, bar(len(groups), "decode", "group") as progress:
        write = _writer(stack, target, metadata, scale, final=False)
        for _ in render(pipeline, [VideoOutput(metadata, write, complete=latents)], memory):
            progress.update(1)


def _steps(pipeline: AnyPipeline, video: PendingVideo, length: int) -> int:
    """Evaluations of the model that remain for a video of which `length` latent frames exist."""
    if video.complete:
        return 0
    metadata = video.metadata
    groups = len(pipeline.group_layout(metadata.latents, metadata.given))
    done = len(pipeline.group_layout(length, metadata.given)) if length else 0
    scheduler = pipeline.get_scheduler(metadata.settings.scheduler)
    steps = metadata.settings.num_inference_steps or 0
    return (groups - done) * num_function_evaluations(scheduler, steps)


def _writer(stack: contextlib.ExitStack, target: Path, metadata: LatentMetadata, scale: int | None = None,
            final: bool = True) -> Callable[[np.ndarray], None]:
    """Open an MP4 that `stack` closes; return the function that appends frames, enlarged by `scale` or the parameters'
    own. `final`: it carries the fingerprint that marks it as finished."""
    factor = scale or metadata.settings.scale
    writer = stack.enter_context(VideoWriter(target, metadata.settings.frame_rate or 1, metadata={
        "comment": json.dumps(metadata.comment),
        "description": metadata.fingerprint if final else ""}))
    return lambda frames: writer.write(frames.repeat(factor, axis=1).repeat(factor, axis=2))
