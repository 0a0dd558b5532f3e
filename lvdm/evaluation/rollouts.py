"""Generate the videos of an evaluation, and measure what one costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from odvae.utils.profiling import profile_call

from ..sampling.outputs import RolloutStep, VideoChunk
from ..sampling.params import GenerationParams
from ..sampling.pipeline import LVDMPipeline

LONG_SECONDS = 10.0  # from this length on, the cost is measured near the start and near the end too
COST_SPAN = 5.0  # seconds of video over which such a cost is measured
LONGEST_TIMED = 545  # frames; the cost of a second does not grow after the first groups
SAMPLING = ("num_inference_steps", "guidance_scale", "history_groups", "history_noise", "history_follow", "sink_period")


def chunks(pipeline: LVDMPipeline, videos: Sequence[GenerationParams], frames: int, progress: Any,
           given: Tensor | None = None) -> Iterator[VideoChunk]:
    """Generate videos of `frames` frames together and yield them group by group; they share `SAMPLING`.
    `given`: latents (B, c, t, h, w) that they continue."""
    events = pipeline.stream([video.prompts for video in videos], seed=[video.seed for video in videos],
                             negative_prompt=[video.negative_prompt for video in videos], num_frames=frames,
                             video_latents=given, **{name: getattr(videos[0], name) for name in SAMPLING})
    for event in events:
        if isinstance(event, VideoChunk):
            yield event
        elif isinstance(event, RolloutStep):
            progress.update(len(videos))


def speed(pipeline: LVDMPipeline, video: GenerationParams, frames: int, progress: Any) -> dict[str, Any]:
    """Measure what one video costs, sampled and decoded: `peak_mib` of the process (or of the accelerator),
    `real_time_factor`, which is seconds of computing per second of video, and, where the video is long, the same near
    its fifth second and over its last seconds."""
    rate = float(pipeline.transformer.config.frame_rate)

    def generate() -> list[tuple[float, int, int]]:
        marks = [(time.perf_counter(), 0, 0)]  # time, frames so far, latent frames of the group
        for chunk in chunks(pipeline, [video], frames, progress):
            marks.append((time.perf_counter(), marks[-1][1] + chunk.frames.shape[1], chunk.latents.shape[2]))
        return marks

    marks, usage = profile_call(generate)
    group_size = pipeline.transformer.config.group_size  # the first latent or a last partial group would mislead
    costs = {(begin + end) / 2 / rate: (after - before) / ((end - begin) / rate)
             for (before, begin, _), (after, end, latents) in pairwise(marks) if latents == group_size}
    figures: dict[str, Any] = {"real_time_factor": usage.seconds / (frames / rate), "peak_mib": usage.peak}
    for name, middle in ("early", 5.0), ("late", frames / rate - COST_SPAN / 2):
        near = [cost for second, cost in costs.items() if abs(second - middle) <= COST_SPAN / 2]
        long = frames / rate >= LONG_SECONDS
        figures[f"real_time_factor_{name}"] = float(np.median(near)) if near and long else None
    return figures
