"""Is a training's noise, drawn on the CPU while the step before computes, ever waited for? The preset 1.4b, 480p."""

from __future__ import annotations

import statistics
import time

import torch
from common import record, table

from lvdm.model.transformer import LVDMTransformer3DModel
from odvae.utils.seeding import generator

LATENTS = (21, 60, 104)  # of 81 frames of 480x832 pixels
FLOPS = .4 * 989e12  # a second: 40 % of an H100's peak in bfloat16


def main() -> None:
    torch.set_num_threads(1)
    times = []
    for step in range(50):
        start = time.perf_counter()
        torch.randn((4, *LATENTS), generator=generator(0, "flow", step))
        times.append(time.perf_counter() - start)
    with torch.device("meta"):
        model = LVDMTransformer3DModel.from_preset("1.4b", text_dim=4096)
    drawn, step_time = statistics.median(times), 3 * model.flops(1, *LATENTS, 512) / FLOPS
    table(["a sample's noise, ms", "its part of a step on an H100, s", "share"],
          [[f"{1e3 * drawn:.1f}", f"{step_time:.2f}", f"{drawn / step_time:.2%}"]])
    record("noise", {"latents": LATENTS}, {"noise_seconds": drawn, "step_seconds": step_time})


if __name__ == "__main__":
    main()
