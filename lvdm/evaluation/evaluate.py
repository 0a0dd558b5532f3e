"""Compare pipelines: held-out loss, prompts, Frechet distance, drift by length, speed and memory, in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from odvae.cache.reader import LatentCache
from odvae.data.files import list_videos
from odvae.evaluate import label_models
from odvae.metrics import frechet, i3d
from odvae.trainer.distributed import best_device
from odvae.utils.config import override
from odvae.utils.errors import NonFiniteError, UserError
from odvae.utils.files import output_folder, write_json
from odvae.utils.plots import contact_sheet, curves
from odvae.utils.precision import resolve_precision
from odvae.utils.precision_names import Precision
from odvae.utils.processes import process_context
from odvae.utils.progress import bar
from odvae.utils.table import Column, table

from ..defaults import GUIDANCE_SCALE, STEPS
from ..sampling.loading import check_lvdm_pipeline
from ..sampling.params import GenerationParams, read_prompts
from ..sampling.pipeline import LVDMPipeline
from .measure import FVD, EvalConfig, EvalResult, Figures, measure
from .rollouts import SAMPLING, chunks
from .scenes import SceneAccuracy, scene_accuracy, scene_prompts
from .worlds import WORLDS

SHIPPED = "shipped"  # stands for the shipped weights in place of a folder
FRAMES = (17, 129)  # what the shipped weights were trained on, and 8 times the 16 frames after the first
MAX_SHEET_PROMPTS = 48  # in a contact sheet
LENGTH_PLOT = "quality_by_length.png"
# Of the last frames at a length: the shares that follow the prompt, and the contrast relative to the first frames'.
QUALITY: Mapping[str, Callable[[Figures], float | None]] = {
    "correct": lambda figures: figures.get("both"), "pattern": lambda figures: figures.get("background"),
    "contrast": lambda figures: figures.get("contrast_kept", figures["drift"]["contrast"])}


@dataclass(frozen=True)
class PromptAccuracy(SceneAccuracy):
    """Accuracy with the prompts and videos that were measured."""

    prompts: list[str]
    videos: np.ndarray  # uint8 (prompts, T, H, W, 3)


@dataclass
class Evaluation:
    """The result of one call."""

    folder: Path
    config: EvalConfig
    pipelines: dict[str, EvalResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # pipelines that could not be measured, and why

    def lines(self) -> list[str]:
        """The table, with a row per pipeline and length; its legend; what was skipped; where the files are."""
        lines = table("pipeline", _columns(self.config.frames[0]), dict(self._rows()))
        if any("both" in figures for _, figures in self._rows()):
            lines.append(f"correct: {WORLDS[self.config.world].correct}")
        lines += ["medians over the videos: jump where groups join (1: none); colour, contrast and sharpness of the "
                  "last second against the first",
                  "evals: of the transformer for a group, besides one for its history; s/s: seconds of computing per "
                  "second of video, one video at a time"]
        references: list[Figures] = []
        for label, result in self.pipelines.items():
            lines += [f"{label}: {reason}" for reason in result.skipped]
            if (reference := result.figures.get("reference")) and reference not in references:
                references.append(reference)
        for reference in references:
            floor = reference.get(frechet.NAME)
            lines.append(f"Frechet distance to {reference['clips']} clips ({reference['of']})"
                         + ("" if floor is None else f"; two such sets of real clips are {floor:.0f} apart")
                         + ". It is biased upwards for few clips: compare only figures of the same number of clips")
        lines += [f"not measured: {label}: {reason}" for label, reason in self.failed.items()]
        videos = "" if self.config.videos is None else f", videos in {self.config.videos}"
        curve = f", {LENGTH_PLOT}" if len(self.config.frames) > 1 else ""
        return [*lines, f"{len(self.pipelines)} pipelines, {len(self.failed)} failed; evaluation.json{curve} and "
                       f"contact_sheet.png in {self.folder}{videos}"]

    def _rows(self) -> list[tuple[str, Figures]]:
        rows = []
        for label, result in self.pipelines.items():
            of_pipeline = {name: result.figures[name] for name in ("parameters_m", "evaluations")}
            of_pipeline |= result.figures.get("loss") or {}
            for frames, figures in result.figures["lengths"].items():
                drift = {f"drift_{name}": value for name, value in figures["drift"].items()}
                rows.append((f"{label}, {frames} frames", of_pipeline | figures | drift))
                of_pipeline = {}  # reported once
        return rows

    def write(self) -> None:
        """Write evaluation.json, contact_sheet.png and, of several lengths, the plot of quality against length."""
        config = self.config
        write_json(self.folder / "evaluation.json", {
            "pipelines": {label: {**result.figures, "skipped": result.skipped}
                          for label, result in self.pipelines.items()},
            "not_measured": self.failed, "frames": config.frames, "batch": config.batch, "world": config.world,
            "given": config.given, "fvd_frames": config.fvd_frames,
            **{name: getattr(config.settings, name) for name in ("seed", *SAMPLING) if name != "num_inference_steps"},
            "files": {name: None if path is None else str(path) for name, path in (
                ("prompts", config.prompt_file), ("cache", config.cache), ("reference", config.reference),
                ("i3d", config.i3d))},
            "device": str(best_device()), "dtype": config.precision, "threads": torch.get_num_threads(),
            "made_with": {name: version(name) for name in ("torch", "diffusers")}})
        rows = {(number, frames, label): row for label, result in self.pipelines.items()
                for (number, frames), row in result.rows.items() if number < MAX_SHEET_PROMPTS}
        labels = [f"{rows[key].mark}{label}, {frames}: {rows[key].prompt}" for key in sorted(rows)
                  for _, frames, label in [key]]
        contact_sheet([rows[key].pictures for key in sorted(rows)], self.folder / "contact_sheet.png", labels)
        if len(config.frames) > 1:
            curves(self._by_length(), self.folder / LENGTH_PLOT, "quality against length", "frames", "", log_x=True)

    def _by_length(self) -> dict[str, tuple[list[float], list[float]]]:
        """Each figure of quality that a pipeline has at all lengths, as a curve."""
        series = {}
        for label, result in self.pipelines.items():
            lengths = result.figures["lengths"]
            for name, of in QUALITY.items():
                ys = [y for figures in lengths.values() if (y := of(figures)) is not None]
                if len(ys) == len(lengths):
                    series[f"{label}: {name}"] = (list(lengths), ys)
        return series


def evaluate(pipelines: Sequence[str], out: Path, *, frames: Sequence[int] = FRAMES, prompts: int | None = None,
             prompt_file: Path | None = None, cache: Path | None = None, reference: Path | None = None,
             i3d_weights: Path | None = None, batch: int = 24, steps: Sequence[int] | None = None,
             guidance_scale: float = GUIDANCE_SCALE, history: Mapping[str, float] | None = None, seed: int = 1000,
             keep_videos: bool = False, precision: Precision = "auto", world: str = "flat",
             fvd_frames: int | None = None, given: int | None = None) -> Evaluation:
    """Measure pipelines, each in a process of its own; see `measure.EvalConfig` for what is measured.

    Writes evaluation.json, a plot of quality against length, and a contact sheet of the first prompts' videos to `out`.

    Args:
        pipelines: folders, each optionally as label=folder; "shipped" stands for the shipped one.
        frames: lengths of videos, 1 + 4k: each video is generated once, at the longest, and measured at every length on
            the frames up to there, prompts on the last 17 of these. The shortest is the training length: the Frechet
            distance and the held-out loss are measured at it, and prompt accuracy at the others is compared with it.
        prompts: videos per length; None: 48, or one per prompt of `prompt_file`.
        steps: of the scheduler, per group of latents; each pipeline is measured with each of them, on the same prompts
            and seeds. None: the pipeline's own.
        history: parameters of the rollout: history_noise, history_follow, sink_period; None: the defaults.
        precision: of the computation.
        world: of `worlds.WORLDS`, whose scenes the prompts and the reference clips are; that of the training data.
        fvd_frames: of each video in the Frechet distance, from its start; None: all of the shortest length.
        given: frames of each reference video that the videos continue, 1 + 4k; in the Frechet distance they count as
            they were. None: the videos continue nothing.
        keep_videos: write those that are longer than the shortest to `out`/videos/LABEL/NUMBER-PROMPT-FRAMES.mp4.

    Raises:
        UserError: at once, for missing files and invalid numbers; at the end, if no pipeline could be measured.
        NonFiniteError: instead, if that was because a model gave NaN or infinity.
    """
    lengths = tuple(sorted(set(frames)))
    _check(lengths, prompts, batch, out, i3d_weights, fvd_frames)
    if given is not None and (reference is None or not 0 < given < lengths[0]):
        raise UserError(f"--given {given}: give fewer frames than the shortest video has ({lengths[0]}), at least 1, "
                        "and with --reference the folder of the videos that they are from")
    labelled = label_models(pipelines, "--pipeline", "pipeline")
    sources = {label: None if source == SHIPPED else source for label, source in labelled.items()}
    for source in sources.values():
        if source is not None:
            check_lvdm_pipeline(source)  # refuse a mistyped path now, not after the pipelines before it
    settings = override(GenerationParams(), {
        "seed": seed, "num_inference_steps": max(steps or (), default=None), "guidance_scale": guidance_scale,
        **(history or {})}, "the arguments")
    config = EvalConfig(lengths, prompts, batch, settings, prompt_file, cache, reference, i3d_weights,
                        out / "videos" if keep_videos else None,
                        resolve_precision(precision, best_device(), "the pipelines"), world, fvd_frames, given)
    if prompt_file is not None:
        read_prompts(prompt_file, settings, one_batch=True)
    if cache is not None:
        LatentCache(cache)
    if reference is not None:
        list_videos(reference)
    result = Evaluation(output_folder(out), config)
    _measure_all(result, _runs(sources, config, sorted(set(steps or ()))))
    result.write()
    return result


def _measure_all(result: Evaluation, runs: Iterator[tuple[str, str | None, EvalConfig]]) -> None:
    """Add each run to the result, or why it failed. Raises UserError or NonFiniteError if all did."""
    non_finite = False
    for label, source, one in runs:
        try:
            # A fresh process, so that its peak memory is this pipeline's.
            with ProcessPoolExecutor(1, mp_context=process_context("lvdm.evaluation.measure")) as pool:
                result.pipelines[label] = pool.submit(measure, source, label, one).result()
        except (ValueError, RuntimeError, NonFiniteError) as error:  # out of memory, even killed for it
            kind = "" if isinstance(error, UserError | NonFiniteError) else f"{type(error).__name__}: "
            result.failed[label] = f"{kind}{error}"
            non_finite |= isinstance(error, NonFiniteError)
    if not result.pipelines:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in result.failed.items())
        raise (NonFiniteError if non_finite else UserError)(f"no pipeline could be measured: {reasons}")


def _runs(sources: Mapping[str, str | None], config: EvalConfig,
          steps: Sequence[int]) -> Iterator[tuple[str, str | None, EvalConfig]]:
    """Every pipeline with every number of steps: label, source and what is measured. The loss is measured once."""
    for label, source in sources.items():
        for i, number in enumerate(steps or [None]):
            settings = config.settings.model_copy(update={"num_inference_steps": number})
            name = label if len(steps) < 2 else f"{label}, {number} step{'s' * (number != 1)}"
            yield name, source, replace(config, settings=settings, cache=None if i else config.cache)


def _check(lengths: Sequence[int], prompts: int | None, batch: int, out: Path, i3d_weights: Path | None,
           fvd_frames: int | None) -> None:
    """Raise UserError for invalid numbers, an output that is not a folder, and weights that cannot be loaded."""
    if not lengths or lengths[0] < 1 or batch < 1 or (prompts is not None and prompts < 1):
        raise UserError(f"lengths {lengths}, prompts={prompts} and batch={batch} must be at least 1")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder with --out, for the table, the contact sheet and the videos")
    if fvd_frames is not None and not 1 <= fvd_frames <= lengths[0]:
        raise UserError(f"--fvd-frames {fvd_frames} must be from 1 to the shortest of --frames, {lengths[0]}")
    if i3d_weights is not None:
        if (shortest := fvd_frames or lengths[0]) < i3d.MIN_FRAMES:
            raise UserError(f"{FVD} needs clips of at least {i3d.MIN_FRAMES} frames, and the shortest have "
                            f"{shortest}; request longer ones (--frames, --fvd-frames), or omit --fvd")
        i3d.load_i3d(i3d_weights)


def prompt_accuracy(pipeline: LVDMPipeline, count: int, frames: int, *, batch: int = 24, steps: int = STEPS,
                    guidance_scale: float = GUIDANCE_SCALE, seed: int = 1000) -> PromptAccuracy:
    """Generate a video for each of `count` scene prompts and measure its last 17 frames."""
    scenes = scene_prompts(count)
    settings = [
        GenerationParams(prompt=scene.prompt, seed=seed + i, num_inference_steps=steps, guidance_scale=guidance_scale)
        for i, scene in enumerate(scenes)
    ]
    with bar(None, f"generate {count} x {frames} frames", "step") as progress:
        batches = [np.concatenate([chunk.frames for chunk in chunks(pipeline, settings[first:first + batch], frames,
                                                                    progress)], axis=1)
                   for first in range(0, count, batch)]
    videos = np.concatenate(batches)
    return PromptAccuracy(**vars(scene_accuracy(videos, scenes)), prompts=[scene.prompt for scene in scenes],
                          videos=videos)


def _columns(shortest: int) -> tuple[Column, ...]:
    """The table's columns: title, key in a row, format."""
    return (("params M", "parameters_m", ".2f"), ("evals", "evaluations", ".0f"), ("loss", "loss_heldout", ".4f"),
            ("correct", "both", ".3f"), (f"against {shortest}", "against_shortest", ".3f"), ("colour", "colour", ".3f"),
            ("direction", "direction", ".3f"), ("motion", "motion", ".3f"), ("camera", "camera", ".3f"),
            ("pattern", "background", ".3f"), ("Frechet", frechet.NAME, ".0f"),
            (FVD, FVD, ".2f"), ("jump", "drift_jump", ".2f"), ("colour +-", "drift_colour", ".3f"),
            ("contrast", "drift_contrast", ".2f"), ("sharpness", "drift_sharpness", ".2f"),
            ("s/s", "real_time_factor", ".2f"), ("at 5 s", "real_time_factor_early", ".2f"),
            ("at the end", "real_time_factor_late", ".2f"), ("peak MiB", "peak_mib", ".0f"))
