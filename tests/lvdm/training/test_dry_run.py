"""`lvdm train --dry-run`: the estimated memory is that of a real step, within 15 %."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch._subclasses.fake_tensor import FakeTensorMode

from lvdm.cli import main
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.training.batch import BatchShape
from lvdm.training.flow_matching import FlowConfig, FlowMatching
from odvae.trainer import memory
from odvae.trainer.checkpointing import enable_checkpointing
from odvae.trainer.config import LoopConfig
from odvae.trainer.memory import MemoryEstimator, TrainingMemory, settle_checkpointing
from odvae.trainer.optim import OptimizerConfig, make_optimizers
from odvae.utils.live_memory import LiveMemory


def make_objective(layers: int = 3) -> FlowMatching:
    torch.manual_seed(0)
    objective = FlowMatching(LVDMTransformer3DModel(hidden_size=48, num_layers=layers, num_attention_heads=2,
                                                    text_dim=8), FlowConfig())
    objective.largest = BatchShape(4, (1, 32, 32), 8)
    return objective


def live_peak(mode: str, precision: str) -> int:
    """Bytes of live tensors at the peak of two real steps, with everything that a training holds."""
    with LiveMemory() as live:
        objective = make_objective()
        enable_checkpointing(objective.model, mode)
        parameters, batch = list(objective.model.parameters()), objective.example()
        inputs = live.live - sum(p.nbytes for p in parameters)
        average = EMAModel(parameters)
        optimizer, = make_optimizers(objective.model, OptimizerConfig(), non_muon_pattern="")
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = objective(batch, 0, 0)["loss"]
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
            average.step(parameters)
    return live.peak - inputs


@pytest.mark.parametrize("mode, precision", [("none", "no"), ("attention", "bf16")])
def test_the_estimate_is_near_the_live_tensors(mode, precision):
    estimated = MemoryEstimator(make_objective(), LoopConfig(), precision).estimate(mode)
    assert estimated.total(mode) == pytest.approx(live_peak(mode, precision), rel=0.15)


def test_auto_takes_the_first_that_fits(monkeypatch):
    peaks = {"none": 30, "attention": 20, "full": 10}
    monkeypatch.setattr(MemoryEstimator, "estimate", lambda self, mode: TrainingMemory(1, 1, 1, 1, 0, {}, peaks))
    monkeypatch.setattr(memory, "_upper_bound", lambda model, flops: float("inf"))
    objective = make_objective(1)
    for free, expected in ((10**12, "none"), (33, "none"), (32, "attention"), (13, "full"), (1, "full")):
        settled = settle_checkpointing(objective, LoopConfig(), int(free / memory.USABLE) + 1)
        assert settled.gradient_checkpointing == expected
    assert settle_checkpointing(objective, settled, 10**12) is settled


@pytest.mark.slow
def test_the_largest_preset_fits_80_gb_at_480p():
    """81 frames of 480x832: 21 latent frames of 60x104."""
    with FakeTensorMode():
        model = LVDMTransformer3DModel.from_preset("1.4b", in_channels=16, text_dim=768)
    objective = FlowMatching(model, FlowConfig())
    objective.largest = BatchShape(1, (21, 60, 104), 256)
    estimated = MemoryEstimator(objective, LoopConfig(), "bf16", fused=True).estimate("attention")
    assert estimated.total("attention") < 40e9


def test_dry_run(cache, vae_folder, tmp_path, capsys):
    arguments = ["train", f"windows.cache={cache}", f"vae={vae_folder}", f"output={tmp_path / 'run'}",
                 "model.hidden_size=24", "model.num_layers=1", "model.num_attention_heads=2",
                 "loop.sharding=full", "loop.gradient_checkpointing=full", "loop.steps=1000"]
    assert main([*arguments, "--dry-run", "--flops", "1e12", "--processes", "2", "--samples", "4800"]) == 0
    out = capsys.readouterr().out
    assert "gradient_checkpointing=full: activations" in out and "a step of 16 samples: " in out
    assert "4800 samples: " in out and "1 TFLOP/s a process (given)" in out
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--dry-run", "--flops", "-1"]) == 2
