"""Generate videos to files, written while they are sampled; what is there already is not made again."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odvae.data.video.writer import VideoWriter
from odvae.inference.memory import AUTO, MemoryOptions
from odvae.trainer.distributed import best_device
from odvae.utils.errors import NonFiniteError, UserError
from odvae.utils.plots import contact_sheet
from odvae.utils.progress import bar

from ..sampling.params import VideoFileParams
from ..sampling.pipeline import LVDMPipeline, VideoChunk
from ..sampling.prompts import format_prompt
from ..sampling.rollout import RolloutStep
from ..sampling.schedulers import num_function_evaluations
from .drift import Drift
from .latent_store import fingerprints, read_latents
from .pending import COLUMNS, PendingVideo, batches, build_metadata
from .requests import GenerationRequest


@dataclass
class Generated:
    """What one call did."""

    made: list[Path] = field(default_factory=list)
    reused: list[Path] = field(default_factory=list)  # were there already
    failed: list[tuple[Path, str]] = field(default_factory=list)  # and why
    non_finite: list[Path] = field(default_factory=list)  # those of them where a model gave NaN or infinity
    computing: float = 0.0  # s
    shown: float = 0.0  # s of video made meanwhile
    sheet: Path | None = None

    def failure(self, message: str) -> Exception:
        """The error that tells of those that failed: a user's mistake, unless a model is at fault."""
        return NonFiniteError(message) if self.non_finite else UserError(message)

    def lines(self) -> list[str]:
        lines = [*map(str, self.made), *(f"{path} is there already, of the same settings" for path in self.reused),
                *(f"{path} failed: {reason}" for path, reason in self.failed)]
        speed = f"; {self.computing / self.shown:.2f} s of computing a second of video" if self.shown else ""
        lines.append(f"{len(self.made)} made, {len(self.reused)} reused, {len(self.failed)} failed{speed}")
        return lines if self.sheet is None else [*lines, str(self.sheet)]


def generate(pipeline: LVDMPipeline, jobs: Sequence[GenerationRequest], *, batch: int = 8, overwrite: bool = False,
             offload: str | None = None, sheet: Path | None = None) -> Generated:
    """Make videos, each group decoded and appended to the file as soon as it is sampled, and kept as latents: what was
    stopped goes on from its last finished group, what is finished is left alone.

    Settings are stored in the MP4's comment and in the latents. Of a long video, one that is more than a group looks
    back on, the `drift` is measured.

    Args:
        batch: videos of the same settings but for prompts and seed that are made together, at most.
        overwrite: make them anew, also those that are finished or of other settings.
        offload: "model" or "sequential", as diffusers does it, to an accelerator.
        sheet: a PNG with a row of frames of each video.

    Raises:
        UserError: at once, where a file is there that has other settings; and where nothing could be made. Else what
            fails, alone too, is told in the result.
        NonFiniteError: nothing could be made, as a model gave NaN or infinity. Of such a video nothing is left.
    """
    if batch < 1:
        raise UserError(f"batch={batch} videos made together must be at least 1")
    if len({job.target for job in jobs}) != len(jobs):
        raise UserError("two videos have the same name; give other names")
    if offload is not None and best_device().type == "cpu":
        raise UserError("offload keeps weights off an accelerator, and there is none here; leave it out")
    parts, done = fingerprints(pipeline), Generated(sheet=sheet)
    rows = [PendingVideo(job, build_metadata(pipeline, job, parts), overwrite) for job in jobs]
    if offload is not None:
        {"model": pipeline.enable_model_cpu_offload, "sequential": pipeline.enable_sequential_cpu_offload}[offload]()
    groups = []
    for together in batches(rows, batch):
        done.reused += [row.job.target for row in together if row.finished]
        left = [row for row in together if not row.finished]
        whole = [row for row in left if row.complete]  # only decoded
        groups += [part for part in (whole, [row for row in left if not row.complete]) if part]
    total = sum(_steps(pipeline, part, part[0].job.length) for part in groups if not part[0].complete)
    began = time.monotonic()
    with bar(total, "generate", "step") as progress:
        for part in groups:
            try:
                _make(pipeline, part, progress)
                done.made += [row.job.target for row in part]
                done.shown += sum(row.about.settings.frames / (row.about.settings.frame_rate or 1) for row in part)
            except (UserError, NonFiniteError, MemoryError, torch.OutOfMemoryError) as error:
                alone, wrong = len(part) == 1, isinstance(error, NonFiniteError)
                for row in part:
                    row.discard(everything=alone and wrong)
                if not alone:  # one of them is wrong, or they are too many
                    groups += [[row] for row in part]
                    continue
                done.failed.append((part[0].job.target, str(error) or type(error).__name__))
                done.non_finite += [part[0].job.target] * wrong
    done.computing = time.monotonic() - began
    if jobs and len(done.failed) == len(jobs):
        raise done.failure(done.failed[0][1])
    if sheet is not None:
        shown = [row for row in rows if row.job.target.is_file()]
        contact_sheet(
            [row.thumbnails() for row in shown],
            sheet,
            [format_prompt(row.about.settings.prompts) for row in shown],
            columns=COLUMNS,
        )
    return done


def decode(pipeline: LVDMPipeline, file: Path, target: Path, scale: int | None = None,
           memory: MemoryOptions = AUTO) -> None:
    """Decode kept latents to a video again, e.g. in other tiles or enlarged otherwise.

    Raises:
        UserError: no latents were kept, or another VAE made them.
    """
    about, latents = read_latents(file)
    if about.other_parts(fingerprints(pipeline), ["vae"]):
        raise UserError(f"{file} holds latents of another VAE; give --pipeline the one that made it")
    space, settings = pipeline.vae.spatial_compression_ratio, about.settings
    plan = memory.plan(pipeline.vae, "decode", *(space * side for side in latents.shape[2:]))
    groups = pipeline.group_layout(latents.shape[1], about.given)
    with _writer(target, settings) as writer, bar(len(groups), "decode", "group") as progress:
        for frames in pipeline.decode_latents(latents[None].split(groups, dim=2), plan):
            writer.write(_enlarged(frames[0], scale or settings.scale))
            progress.update(1)


def _steps(pipeline: LVDMPipeline, rows: Sequence[PendingVideo], length: int) -> int:
    """Steps to make for rows that are made together, of which `length` latents are there."""
    about = rows[0].about
    groups = len(pipeline.group_layout(about.latents, about.given))
    before = len(pipeline.group_layout(length, about.given)) if length else 0
    scheduler = pipeline.get_scheduler(about.settings.scheduler)
    return (groups - before) * num_function_evaluations(scheduler, about.settings.steps)


def _make(pipeline: LVDMPipeline, rows: Sequence[PendingVideo], progress: Any) -> None:
    """Sample, decode and write videos that are made together."""
    kept, about = [row.begin() for row in rows], rows[0].about
    length = min(0 if latents is None else latents.shape[1] for latents in kept)
    if not rows[0].complete:  # what was kept is not made again
        progress.total -= _steps(pipeline, rows, rows[0].job.length) - _steps(pipeline, rows, length)
    for row in rows:
        if row.parts is not None:
            row.parts.truncate(length)
    initial = torch.stack([latents[:, :length] for latents in kept if latents is not None]) if length else None
    groups = pipeline.group_layout(about.latents, about.given)
    rate, long = about.settings.frame_rate or 1, len(groups) > about.settings.window + 2
    drifts = [Drift(rate) for _ in rows]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_writer(row.job.target, row.about.settings, row.about.fingerprint))
                   for row in rows]
        seen = shown = 0  # latents, frames
        for event in _events(pipeline, rows, initial, progress):
            for row, writer, drift, frames, latents in zip(rows, writers, drifts, event.frames, event.latents,
                                                           strict=True):
                if event.group and row.parts is not None:
                    row.parts.add(latents)
                writer.write(_enlarged(frames, row.about.settings.scale))
                row.thumbnail(frames, shown)
                if long:
                    drift.add(frames, join=seen >= about.given)
            seen, shown = seen + event.latents.shape[2], shown + event.frames.shape[1]
        for row, drift in zip(rows, drifts, strict=True):
            if row.parts is not None:
                row.parts.finalize()  # before the video: what has its latents is only decoded again
            if long:
                drift.write(row.job.target)
    for row in rows:
        if row.parts is not None:
            row.parts.remove()


def _events(pipeline: LVDMPipeline, rows: Sequence[PendingVideo], initial: Tensor | None,
            progress: Any) -> Iterator[VideoChunk]:
    """The pieces of the videos, those of kept latents first."""
    about, settings = rows[0].about, rows[0].about.settings
    length = 0 if initial is None else initial.shape[2]
    if initial is not None and length == about.latents:
        pieces = initial.split(pipeline.group_layout(length, about.given), dim=2)
        for latents, frames in zip(pieces, pipeline.decode_latents(pieces), strict=True):
            yield VideoChunk(0, 0, frames, latents)
        return
    events = pipeline.stream(
        [row.about.settings.prompts for row in rows], seed=[row.about.settings.seed for row in rows],
        negative_prompt=[row.about.settings.negative_prompt for row in rows], initial=initial,
        **settings.stream_arguments)
    for event in events:
        if isinstance(event, RolloutStep):
            progress.set_postfix(group=f"{event.group}/{event.groups}", refresh=False)
            progress.update(1)
        elif isinstance(event, VideoChunk):
            yield event


def _writer(target: Path, settings: VideoFileParams, made_by: str = "") -> VideoWriter:
    """`made_by`: the `LatentMetadata.fingerprint` of a video that is not to be made again; "": nothing is said."""
    return VideoWriter(target, settings.frame_rate or 1, metadata={
        "comment": json.dumps(settings.model_dump(mode="json")), "description": made_by})


def _enlarged(frames: np.ndarray, scale: int) -> np.ndarray:
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)
