"""Does a second of video cost the same at any length, and what does the KV cache save? The shipped LVDM, 64x64."""

from __future__ import annotations

import time

from common import interleaved, record, table

from lvdm.condition import Condition
from lvdm.rollout import rollout
from lvdm.weights import default_pipeline

STEPS, PROMPT = 20, "a red circle moving right over a striped background"


def main() -> None:
    pipeline = default_pipeline()
    rate = pipeline.transformer.config.frame_rate
    rows = []
    for seconds in (2, 10, 40):
        frames = int(seconds * rate) // 4 * 4 + 1
        began = time.perf_counter()
        pipeline(PROMPT, frames=frames, steps=STEPS)
        spent = time.perf_counter() - began
        rows.append([seconds, frames, spent, spent / seconds])
    headers = ["seconds of video", "frames", "s", "s per second"]
    table(headers, rows)
    record("cost of a second of video", {"steps": STEPS}, [dict(zip(headers, row, strict=True)) for row in rows])

    encoder = pipeline.text_encoder
    texts = Condition(*encoder.encode([PROMPT])), Condition(*encoder.encode([""]))

    def sample(use_cache: bool) -> None:
        list(rollout(pipeline.transformer, *texts, latents=11, height=8, width=8, seeds=[0], steps=STEPS,
                     use_cache=use_cache))

    times = interleaved({"cached": lambda: sample(True), "not cached": lambda: sample(False)})
    table(["", "s"], list(times.items()))
    print(f"not cached / cached: {times['not cached'] / times['cached']:.2f}")
    record("KV cache", {"latents": 11, "steps": STEPS}, times)


if __name__ == "__main__":
    main()
