"""A real pipeline with few random weights whose prompts script delays and failures, for the app's tests.

    slowly                  a step takes at least 0.05 s
    waits N                 no step of group N + 1 (counted from 1) before the file GATE/N exists
    no memory to decode     MemoryError until it is decoded in tiles
    no memory to sample     MemoryError always
    no numbers to sample    the transformer returns NaN from the second group on
    no numbers to decode    the VAE returns infinity from the second group on
    breaks                  an unexpected error at the second group
    crashes                 the process exits at the second group, every time
    crashes once            the process exits at the second group, unless stored latents are resumed
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvdm.sampling.loading import AnyPipeline, load_pipeline
from lvdm.sampling.outputs import DecodeProgress, RolloutStep, VideoChunk
from lvdm.sampling.pipeline import LVDMPipeline

GATE = "LVDM_TEST_GATE"  # environment variable: the folder of the gates


class ScriptedPipeline(LVDMPipeline):
    def stream(self, prompt: Any, **options: Any) -> Iterator[Any]:
        text = prompt[0][0][1]
        initial, memory = options.get("video_latents"), options.get("memory")
        before = 0 if initial is None else len(self.group_layout(initial.shape[2], initial.shape[2]))
        biases = self.transformer.project_out.bias, self.vae.decoder.conv_out.bias
        whole = [bias.detach().clone() for bias in biases]
        try:
            for event in super().stream(prompt, **options):
                if isinstance(event, RolloutStep):
                    self._step(text, before + event.group, initial)
                if isinstance(event, DecodeProgress) and "no memory to decode" in text and memory.tile is None:
                    raise MemoryError
                yield event
                if isinstance(event, VideoChunk) and "no numbers" in text:
                    index = "decode" in text
                    biases[index].data.fill_((math.nan, math.inf)[index])
        finally:
            for bias, values in zip(biases, whole, strict=True):
                bias.data.copy_(values)

    def _step(self, text: str, group: int, initial: Any) -> None:
        if "slowly" in text:
            time.sleep(0.05)
        if waits := re.search(r"waits (\d+)", text):
            gate = Path(os.environ[GATE]) / waits[1]
            while group > int(waits[1]) and not gate.exists():
                time.sleep(0.01)
        if "no memory to sample" in text:
            raise MemoryError
        if group == 2 and "breaks" in text:
            raise KeyError("weights")
        if group == 2 and "crashes" in text and (initial is None or "once" not in text):
            os._exit(9)


def load(folder: Path | None) -> AnyPipeline:
    """Load a pipeline as `app.inference.model_manager` does."""
    pipeline = load_pipeline(folder, to_device=False)
    if isinstance(pipeline, LVDMPipeline):
        pipeline.__class__ = ScriptedPipeline
    return pipeline


def save(folder: Path) -> Path:
    """Save a pipeline of few weights: 32x32 pixels, 8 frames a second, groups of 2 latent frames."""
    from pipelines import make_pipeline

    make_pipeline(sample_height=32, sample_width=32).save_pretrained(folder)
    return folder
