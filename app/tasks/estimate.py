"""Estimate the time and memory of a video from earlier measurements on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.tasks.generate import GenerateParams
from app.tasks.pipeline_spec import PipelineSpec


@dataclass(frozen=True)
class Estimate:
    """None: no measurements yet."""

    groups: int
    seconds: float | None
    bytes: int | None


def estimate(
    params: GenerateParams, spec: PipelineSpec, folder: Path | None, get_value: Callable[[str], Any],
    context_frames: int = 0,
) -> Estimate:
    """Estimate the cost of validated params. Times, and the memory beside the weights, grow with the pixels, times
    also with the length where a video is one group; without guidance a step evaluates the model once instead of twice.

    Args:
        get_value: of the store, which holds the measurements.
        context_frames: frames that the video continues from.
    """
    groups = spec.groups(params.num_frames or 1) - (spec.groups(context_frames) if context_frames else 0)
    pixels = (params.height or spec.height) * (params.width or spec.width)
    guidance_scale = spec.guidance_scale if params.guidance_scale is None else params.guidance_scale
    guided = spec.capabilities.passes(guidance_scale) == 2
    timings = get_value(f"measured {folder or ''}") or []
    timings = [timing for timing in timings if timing["device"] == timings[-1]["device"]]
    seconds = None
    if timings:
        sizes = [t["pixels"] * (1 if spec.group else t["frames"]) for t in timings]
        step = statistics.median(t["step"] / size / (2 if t["guided"] else 1)
                                 for t, size in zip(timings, sizes, strict=True))
        decode = statistics.median(t["decode"] / size for t, size in zip(timings, sizes, strict=True))
        size = pixels * (1 if spec.group else params.num_frames or 1)
        steps = (params.num_inference_steps or spec.num_inference_steps) * (2 if params.scheduler == "heun" else 1)
        seconds = groups * size * (steps * step * (2 if guided else 1) + decode)
    need = get_value(f"memory {folder or ''}")
    peak = None
    if need:
        share = pixels / need["pixels"]
        peak = int(need["weights"] + share * (need["history"] * (1 if guided else 0.5) + need["decoding"]))
    return Estimate(groups, seconds, peak)
