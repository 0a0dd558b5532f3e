"""`odvae train --dry-run`: the estimated memory is that of a real step, within 15 %."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from odvae.cli import main
from odvae.trainer.checkpointing import enable_checkpointing
from odvae.trainer.memory import MemoryEstimator, settle_checkpointing
from odvae.trainer.optim import make_optimizers
from odvae.training.train import AutoencoderObjective, TrainConfig, make_model
from odvae.utils.config import load_config
from odvae.utils.live_memory import LiveMemory

SMALL = ["model.block_out_channels=[8,16]", "model.time_compression=2", "model.layers_per_block=1",
         "model.norm_num_groups=4", "loop.micro_batch_size=2"]
CLIPS = ["data.frames=9", "data.height=32", "data.width=32", *SMALL]
TINY = [*CLIPS, "model.block_out_channels=[8]", "model.time_compression=1"]
CRITIC = ["loss.adversarial.weight=1", "loss.adversarial.critic.width=8"]


def make_objective(options: list[str]) -> AutoencoderObjective:
    config = load_config(TrainConfig, None, options)
    torch.manual_seed(0)
    return AutoencoderObjective(make_model(config.model), config)


def live_peak(options: list[str], mode: str) -> int:
    """Bytes of live tensors at the peak of two real steps, with everything that a training holds."""
    loop = load_config(TrainConfig, None, options).loop
    with LiveMemory() as live:
        objective = make_objective(options)
        enable_checkpointing(objective.model, mode)
        learners = [objective, *([] if objective.critic is None else [objective.critic])]
        made = live.live
        example, = objective.examples()
        batch = live.live - made
        average = EMAModel(objective.model.parameters())
        optimizers = [each for learner in learners for each in make_optimizers(
            learner.model, learner.optimizer or loop.optimizer, non_muon_pattern=learner.non_muon_pattern)]
        for _ in range(2):
            inputs = example.batch
            for learner in learners:
                losses = learner(inputs, example.step, 0)
                inputs = losses.pop("critic_batch", None)
                losses.pop("loss").backward()
            del losses, inputs
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.step(objective.model.parameters())
    return live.peak - batch


@pytest.mark.parametrize("mode, options", [("none", [*CLIPS, *CRITIC]), ("full", CLIPS),
                                           ("full", [*CLIPS, "model.kind=image", "model.patch_size=2"])])
def test_the_estimate_is_near_the_live_tensors(mode, options):
    objective, loop = make_objective(options), load_config(TrainConfig, None, options).loop
    estimated = MemoryEstimator(objective, loop, "no", critic=objective.critic).estimate(mode)
    assert estimated.total(mode) == pytest.approx(live_peak(options, mode), rel=0.15)
    example, = objective.examples()
    assert estimated.peak[mode] < objective.activation_bound(example.batch)


def test_the_flops_are_those_of_the_mean_step(monkeypatch):
    """Of two equal stages, one on images, one on clips of nine frames."""
    monkeypatch.setattr("odvae.model.conv.ONEDNN", False)  # the counter does not know oneDNN's operator
    options = ["loop.steps=2", "stages=[{steps: 1, data: {frames: 1}}, {steps: 1}]", *TINY]
    objective, loop = make_objective(options), load_config(TrainConfig, None, options).loop
    counted = []
    for step, frames in enumerate((1, 9)):
        with FlopCounterMode(display=False) as counter:
            example = make_objective([*TINY, f"data.frames={frames}"]).examples()[0]
            objective(example.batch, step, 0)["loss"].backward()
        counted.append(counter.get_total_flops())
    assert MemoryEstimator(objective, loop, "no").flops() == pytest.approx(sum(counted) / 2)


def test_auto_checkpoints_what_does_not_fit():
    objective, loop = make_objective(TINY), load_config(TrainConfig, None, TINY).loop
    needed = MemoryEstimator(objective, loop, "no").estimate("none", "full")
    for free, expected in ((2**40, "none"), (1.2 * needed.total("none"), "none"), (1, "full")):
        assert settle_checkpointing(objective, loop, int(free)).gradient_checkpointing == expected


def test_dry_run(tmp_path, capsys):
    arguments = ["train", f"output={tmp_path / 'run'}", "data.folder=none", *CLIPS, "loop.steps=1000"]
    assert main([*arguments, "--dry-run", "--flops", "1e12", "--processes", "2", "--samples", "4000"]) == 0
    out = capsys.readouterr().out
    assert "gradient_checkpointing=full: activations" in out and "a step of 4 samples: 36 frames, " in out
    assert "4000 samples: " in out and "1 TFLOP/s a process (given)" in out
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--dry-run", "--flops", "-1"]) == 2
