"""Training with loop.compile computes the same steps. Separate from test_train, because it needs a compiler."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from odvae.data.dataset import VideoClipDataset
from odvae.training.train import TrainConfig, train
from odvae.utils.config import load_config

SETTINGS = [
    "data.held_out=2",
    "data.buckets=[{frames: 1, height: 16, width: 16}, {frames: 5, height: 16, width: 16}]",
    "model.block_out_channels=[8]",
    "model.time_compression=1",
    "model.layers_per_block=1",
    "model.norm_num_groups=4",
    "model.patch_size=2",
    "loop.micro_batch_size=2",
    "loop.steps=3",
    "loop.log_every=1",
    "loop.evaluate_every=3",
    "loop.optimizer.warmup=0",
]


def trained(run: Path, clips: Path, *more: str) -> tuple[list[float], torch.Tensor]:
    """Train; return the losses, and all weights concatenated."""
    train(load_config(TrainConfig, None, [f"output={run}", f"data.folder={clips}", *SETTINGS, *more]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = load_file(run / "checkpoints/step-00000003/model.safetensors")
    return [line["loss"] for line in lines if "loss" in line], torch.cat([state[k].flatten() for k in sorted(state)])


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_steps_equal_eager_steps(clips, tmp_path):
    """In two buckets; without vector instructions, which only cost compile time."""
    data = load_config(TrainConfig, None, [f"data.folder={clips}", *SETTINGS]).data
    assert {VideoClipDataset(data).bucket(step, 0).frames for step in range(3)} == {1, 5}
    plain = trained(tmp_path / "plain", clips)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        compiled = trained(tmp_path / "compiled", clips, "loop.compile=true")
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # one a bucket: the blocks are alike
    assert compiled[0] == pytest.approx(plain[0], rel=1e-4)
    # Over all weights together: where a gradient is only rounding error, AdamW follows its sign.
    assert (compiled[1] - plain[1]).square().mean().sqrt() < 1e-4
