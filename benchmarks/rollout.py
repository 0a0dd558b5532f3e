"""Does a second of video cost the same at any position, and what does the KV cache save? The shipped LVDM, 64x64."""

from __future__ import annotations

import gc
import statistics
import time

import torch
from common import interleaved, record, table
from torch._subclasses.fake_tensor import FakeTensor

from lvdm.condition import Condition
from lvdm.sampling.loading import default_pipeline
from lvdm.sampling.outputs import VideoChunk
from lvdm.sampling.rollout import rollout

STEPS, PROMPT = 20, "a red circle moving right over a striped background"
SECONDS, RUNS = 62, 5


def live_bytes() -> int:
    """Return the bytes of all tensors that Python holds."""
    gc.collect()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects()
                if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)}
    return sum(storages.values())


def main() -> None:
    pipeline = default_pipeline()
    pipeline.vae.fuse()
    rate, ratio = pipeline.transformer.config.frame_rate, pipeline.vae.temporal_compression_ratio
    frames = int(SECONDS * rate) // ratio * ratio + 1
    groups: list[tuple[float, float, int]] = []  # end in the video (s), compute per second, live bytes
    for run in range(RUNS):
        done, start = 0, time.perf_counter()
        for event in pipeline.stream(PROMPT, num_frames=frames, num_inference_steps=STEPS, seed=run):
            if isinstance(event, VideoChunk):
                done += event.frames.shape[1]
                now = time.perf_counter()
                groups.append((done / rate, (now - start) / (event.frames.shape[1] / rate), live_bytes()))
                start = time.perf_counter()  # without the time of live_bytes
    rows = [[f"{at - 2} to {at + 2}", *(statistics.median(values) for values in zip(
        *[(cost, held / 2**20) for second, cost, held in groups if abs(second - at) <= 2], strict=True))]
        for at in (5, 15, 30, SECONDS - 2)]
    headers = ["second of the video", "s of computing a second", "MiB of live tensors"]
    table(headers, rows)
    record("cost of a second of video", {"steps": STEPS, "seconds": SECONDS, "runs": RUNS},
           [dict(zip(headers, row, strict=True)) for row in rows])

    encoder = pipeline.text_encoder
    texts = Condition(*encoder.encode([PROMPT])), Condition(*encoder.encode([""]))

    def sample(use_cache: bool) -> None:
        list(rollout(pipeline.transformer, *texts, latents=11, height=8, width=8, seeds=[0], num_inference_steps=STEPS,
                     use_cache=use_cache))

    times = interleaved({"cached": lambda: sample(True), "not cached": lambda: sample(False)})
    table(["", "s"], list(times.items()))
    print(f"not cached / cached: {times['not cached'] / times['cached']:.2f}")
    record("KV cache", {"latents": 11, "steps": STEPS}, times)


if __name__ == "__main__":
    main()
