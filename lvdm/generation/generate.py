"""Generate videos to files that are written while they are sampled; finished ones are not made again."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
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

from ..sampling.pipeline import LVDMPipeline
from ..sampling.prompts import format_prompt
from ..sampling.rollout import RolloutStep
from ..sampling.schedulers import num_function_evaluations
from .drift import Drift
from .latent_store import LatentMetadata, fingerprints, read_latents
from .pending import COLUMNS, PendingVideo, batches, build_metadata
from .render import VideoOutput, render
from .requests import GenerationRequest


@dataclass
class GenerationReport:
    """What one call did."""

    made: list[Path] = field(default_factory=list)
    reused: list[Path] = field(default_factory=list)  # finished before
    failed: list[tuple[Path, str]] = field(default_factory=list)  # and why
    non_finite: list[Path] = field(default_factory=list)  # those of them where a model gave NaN or infinity
    seconds: float = 0.0  # of computing
    video_seconds: float = 0.0  # of video that was made
    sheet: Path | None = None

    def failure(self, message: str) -> Exception:
        """The error for those that failed: a user's mistake, unless a model is at fault."""
        return NonFiniteError(message) if self.non_finite else UserError(message)

    def lines(self) -> list[str]:
        lines = [*map(str, self.made), *(f"{path} is there already, of the same settings" for path in self.reused),
                *(f"{path} failed: {reason}" for path, reason in self.failed)]
        speed = self.seconds / self.video_seconds if self.video_seconds else None
        lines.append(f"{len(self.made)} made, {len(self.reused)} reused, {len(self.failed)} failed"
                     + ("" if speed is None else f"; {speed:.2f} s of computing a second of video"))
        return lines if self.sheet is None else [*lines, str(self.sheet)]


def generate(pipeline: LVDMPipeline, requests: Sequence[GenerationRequest], *, batch: int = 8, overwrite: bool = False,
             offload: str | None = None, sheet: Path | None = None) -> GenerationReport:
    """Generate videos to files. Each group is decoded and appended to its file as soon as it is sampled, and stored as
    latents: a stopped video is resumed after its last stored group, a finished one is left alone.

    The parameters are stored in the MP4's comment and with the latents. Of a long video, with more groups than one
    attends to, the `drift` is measured.

    Args:
        batch: how many videos with the same parameters, but for prompts and seed, are made together, at most.
        overwrite: make them anew, also those that are finished or of other parameters.
        offload: "model" or "sequential", as diffusers does it, to an accelerator.
        sheet: a PNG with a row of frames of each video.

    Raises:
        UserError: at once, where a file of other parameters is there; and where nothing could be made. Otherwise the
            report says which videos failed, each of them alone too.
        NonFiniteError: nothing could be made, as a model gave NaN or infinity. Of such a video nothing is left.
    """
    if batch < 1:
        raise UserError(f"batch={batch} videos made together must be at least 1")
    if len({request.target for request in requests}) != len(requests):
        raise UserError("two videos have the same name; give other names")
    if offload is not None and best_device().type == "cpu":
        raise UserError("offload keeps weights off an accelerator, and there is none here; leave it out")
    parts, report = fingerprints(pipeline), GenerationReport(sheet=sheet)
    videos = [PendingVideo(one, build_metadata(pipeline, one, parts), overwrite) for one in requests]
    if offload is not None:
        {"model": pipeline.enable_model_cpu_offload, "sequential": pipeline.enable_sequential_cpu_offload}[offload]()
    report.reused = [video.request.target for video in videos if video.finished]
    began = time.monotonic()
    _render_all(pipeline, _unfinished(videos, batch), report)
    report.seconds = time.monotonic() - began
    if requests and len(report.failed) == len(requests):
        raise report.failure(report.failed[0][1])
    if sheet is not None:
        there = [video for video in videos if video.request.target.is_file()]
        prompts = [format_prompt(video.metadata.settings.prompts) for video in there]
        contact_sheet([video.thumbnails() for video in there], sheet, prompts, columns=COLUMNS)
    return report


def _unfinished(videos: Sequence[PendingVideo], batch: int) -> deque[list[PendingVideo]]:
    """The batches to render: of each, those that are only decoded, and those that are sampled."""
    found: deque[list[PendingVideo]] = deque()
    for together in batches(videos, batch):
        left = [video for video in together if not video.finished]
        found += [part for complete in (True, False) if (part := [one for one in left if one.complete is complete])]
    return found


def _render_all(pipeline: LVDMPipeline, queue: deque[list[PendingVideo]], report: GenerationReport) -> None:
    """Render the batches. The videos of one that fails are tried again one by one."""
    total = sum(_steps(pipeline, videos[0], videos[0].request.length) for videos in queue)
    with bar(total, "generate", "step") as progress:
        while queue:
            videos = queue.popleft()
            try:
                _render_batch(pipeline, videos, progress)
                report.made += [video.request.target for video in videos]
                settings = [video.metadata.settings for video in videos]
                report.video_seconds += sum(one.frames / (one.frame_rate or 1) for one in settings)
            except (UserError, NonFiniteError, MemoryError, torch.OutOfMemoryError) as error:
                alone, non_finite = len(videos) == 1, isinstance(error, NonFiniteError)
                for video in videos:
                    video.discard(everything=alone and non_finite)
                if not alone:  # one of them is wrong, or they are too many
                    queue += [[video] for video in videos]
                    continue
                report.failed.append((videos[0].request.target, str(error) or type(error).__name__))
                report.non_finite += [videos[0].request.target] * non_finite


def _render_batch(pipeline: LVDMPipeline, videos: Sequence[PendingVideo], progress: Any) -> None:
    """Render videos together, each to its MP4 and its file of latents."""
    metadata = videos[0].metadata
    rate, groups = metadata.settings.frame_rate or 1, len(pipeline.group_layout(metadata.latents, metadata.given))
    long = groups > metadata.settings.history_groups + 2
    with contextlib.ExitStack() as stack:
        outputs = [video.open(_writer(stack, video.request.target, video.metadata),
                              Drift(rate) if long else None) for video in videos]
        length = min(output.length for output in outputs)
        progress.total -= _steps(pipeline, videos[0], videos[0].request.length) - _steps(pipeline, videos[0], length)
        for event in render(pipeline, outputs):
            if isinstance(event, RolloutStep):
                progress.set_postfix(group=f"{event.group}/{event.groups}", refresh=False)
                progress.update(1)
        for video, output in zip(videos, outputs, strict=True):
            if output.chunks is not None:
                output.chunks.finalize()  # before the video: with its latents there, it is only decoded again
            if output.drift is not None:
                output.drift.write(video.request.target)
    for output in outputs:
        if output.chunks is not None:
            output.chunks.remove()


def decode(pipeline: LVDMPipeline, file: Path, target: Path, scale: int | None = None,
           memory: MemoryOptions = AUTO) -> None:
    """Decode stored latents to a video again, e.g. in other tiles or enlarged otherwise.

    Raises:
        UserError: no latents are stored, or another VAE made them.
    """
    metadata, latents = read_latents(file)
    if metadata.other_parts(fingerprints(pipeline), ["vae"]):
        raise UserError(f"{file} holds latents of another VAE; give --pipeline the one that made it")
    groups = pipeline.group_layout(latents.shape[1], metadata.given)
    with contextlib.ExitStack() as stack, bar(len(groups), "decode", "group") as progress:
        write = _writer(stack, target, metadata, scale, final=False)
        for _ in render(pipeline, [VideoOutput(metadata, write, complete=latents)], memory):
            progress.update(1)


def _steps(pipeline: LVDMPipeline, video: PendingVideo, length: int) -> int:
    """Evaluations of the model that a video takes, of which `length` latent frames are there."""
    if video.complete:
        return 0
    metadata = video.metadata
    groups = len(pipeline.group_layout(metadata.latents, metadata.given))
    before = len(pipeline.group_layout(length, metadata.given)) if length else 0
    scheduler = pipeline.get_scheduler(metadata.settings.scheduler)
    return (groups - before) * num_function_evaluations(scheduler, metadata.settings.steps)


def _writer(stack: contextlib.ExitStack, target: Path, metadata: LatentMetadata, scale: int | None = None,
            final: bool = True) -> Callable[[np.ndarray], None]:
    """Open an MP4 that `stack` closes; returns the function that appends frames, enlarged by `scale` or the parameters'
    own. `final`: it carries its fingerprint, by which it is found to be finished."""
    factor = scale or metadata.settings.scale
    writer = stack.enter_context(VideoWriter(target, metadata.settings.frame_rate or 1, metadata={
        "comment": json.dumps(metadata.settings.model_dump(mode="json")),
        "description": metadata.fingerprint if final else ""}))
    return lambda frames: writer.write(frames.repeat(factor, axis=1).repeat(factor, axis=2))
