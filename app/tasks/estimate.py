"""What a video will take of time and memory, from what this machine was measured to take."""

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
    """None: nothing was measured here yet."""

    groups: int
    seconds: float | None
    bytes: int | None


def estimate(
    params: GenerateParams, card: PipelineSpec, folder: Path | None, get_value: Callable[[str], Any], given: int = 0
) -> Estimate:
    """Of settled params. Times and the memory beside the weights grow with the pixels; without guidance a step asks the
    model once instead of twice.

    Args:
        get_value: of the store, where the measurements are.
        given: frames that are gone on from.
    """
    groups = card.groups(params.frames or 1) - (card.groups(given) if given else 0)
    pixels, guided = (params.height or card.height) * (params.width or card.width), params.guidance_scale != 1
    figures = get_value(f"measured {folder or ''}") or []
    figures = [one for one in figures if one["device"] == figures[-1]["device"]]
    seconds = None
    if figures:
        step = statistics.median(one["step"] / one["pixels"] / (2 if one["guided"] else 1) for one in figures)
        decode = statistics.median(one["decode"] / one["pixels"] for one in figures)
        steps = params.steps * (2 if params.scheduler == "heun" else 1)
        seconds = groups * pixels * (steps * step * (2 if guided else 1) + decode)
    need = get_value(f"memory {folder or ''}")
    most = None
    if need:
        share = pixels / need["pixels"]
        most = int(need["weights"] + share * (need["history"] * (1 if guided else 0.5) + need["decoding"]))
    return Estimate(groups, seconds, most)
