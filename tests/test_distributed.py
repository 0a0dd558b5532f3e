"""`accelerate launch` with two processes on one machine."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from safetensors.torch import load_file


def launch(*command: object) -> None:
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
            *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_both_trainers_run_in_two_processes(clips, cache, vae_folder, tmp_path):
    loop = ["loop.steps=4", "loop.batch=2", "loop.log_every=1", "loop.evaluate_every=4"]
    launch("-m", "odvae", "train", *loop, f"data.folder={clips}", "data.frames=5", "data.height=32", "data.width=32",
           "data.held_out=2", f"model.init_from={vae_folder}", f"output={tmp_path / 'vae'}")
    assert (tmp_path / "vae/vae/config.json").is_file()

    launch("-m", "lvdm", "train", *loop, f"windows.cache={cache}", f"vae={vae_folder}", "windows.held_out=2",
           "model.hidden_size=24", "model.num_layers=1", "model.num_attention_heads=2", "sample.count=1",
           "sample.steps=1", f"output={tmp_path / 'lvdm'}")
    assert (tmp_path / "lvdm/pipeline/model_index.json").is_file()
    lines = [json.loads(line) for line in (tmp_path / "lvdm/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]  # one process writes the log
    weights = load_file(tmp_path / "lvdm/checkpoints/step-00000004/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
