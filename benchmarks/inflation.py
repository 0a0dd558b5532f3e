"""Which initialization of the 3D kernels is best, and which variant? Held-out PSNR by step in short trainings.

The shipped image VAE is inflated (tail, average, center, random; variant 4), then by tail into variants 1 to 4, and
each is trained on the same batches of rendered clips. Writes docs/inflation.png, docs/variants.png and a table.
`python benchmarks/inflation.py [STEPS] [WORK]`, 150 steps in outputs/inflation by default: ten minutes on two cores.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from common import interleaved, record, table

from odvae.cli import main as odvae
from odvae.inference.loading import load_vae
from odvae.utils.plots import curves
from odvae.weights import DEMO_IMAGE_VAE

DOCS = Path(__file__).parents[1] / "docs"
INITS, VARIANTS = ("tail", "average", "center", "random"), (1, 2, 3, 4)


def train(folder: Path, clips: Path, steps: int, init: str, variant: int) -> dict[int, float]:
    """Train; return held-out PSNR by step."""
    shutil.rmtree(folder, ignore_errors=True)
    status = odvae(["train", f"output={folder}", f"data.folder={clips}", "data.frames=9", "data.held_out=8",
                    f"model.init_from={DEMO_IMAGE_VAE}", f"model.init={init}", f"model.variant={variant}",
                    "loss.l1=0.5", "loss.l2=2", f"loop.steps={steps}", "loop.micro_batch_size=2", "loop.ema_decay=0.9",
                    f"loop.evaluate_every={max(1, steps // 6)}", "loop.optimizer.name=muon",
                    "loop.optimizer.learning_rate=1e-3", "loop.optimizer.warmup=10"])
    if status:
        sys.exit(status)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {int(line["step"]): line["psnr_heldout"] for line in lines if "psnr_heldout" in line}


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    work = Path(sys.argv[2] if len(sys.argv) > 2 else "outputs/inflation")
    odvae(["render", str(work / "clips"), "--count", "64", "--frames", "33"])
    runs, seconds = {}, {}
    for name, init, variant in [*((init, init, 4) for init in INITS), *((f"variant {n}", "tail", n) for n in VARIANTS)]:
        if name == "variant 4":
            runs[name], seconds[name] = runs["tail"], seconds["tail"]
            continue
        began = time.perf_counter()
        runs[name] = train(work / name.replace(" ", "-"), work / "clips", steps, init, variant)
        seconds[name] = time.perf_counter() - began
    for file, title, names in (("inflation", "held-out PSNR after inflation", INITS),
                               ("variants", "held-out PSNR of the variants", [f"variant {n}" for n in VARIANTS])):
        curves({name: (list(runs[name]), list(runs[name].values())) for name in names}, DOCS / f"{file}.png", title,
               "step", "dB")
    x = torch.rand(1, 3, 33, 64, 64) * 2 - 1
    vaes = {f"variant {n}": load_vae(work / ("tail" if n == 4 else f"variant-{n}") / "vae").eval() for n in VARIANTS}
    with torch.inference_mode():
        speed = interleaved({name: lambda vae=vae: vae.encode(x) for name, vae in vaes.items()})
    rows = [[name, *(run[step] for step in (0, max(run) // 2 // (max(run) // 6) * (max(run) // 6), max(run))),
             seconds[name], 33 / speed[name] if name in speed else float("nan")] for name, run in runs.items()]
    headers = ["run", "dB at 0", "dB halfway", "dB at the end", "training s", "encoded frames a second"]
    table(headers, rows)
    record("initializations and variants", {"steps": steps, "size": 64},
           [dict(zip(headers, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
