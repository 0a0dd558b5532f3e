"""The training loop: throughput in its log, memory after evaluations, optimizers and schedules."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import types
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_training import LOOP, Flow, tiny_model, training
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from odvae.trainer.metrics import MetricsLogger
from odvae.trainer.optim import OptimizerConfig, learning_rate, make_optimizers
from odvae.trainer.throughput import ThroughputMeter, matmul_rate
from odvae.utils.errors import UserError


def test_the_log_has_tokens_per_second_and_mfu(tmp_path):
    training(tmp_path, {"steps": 4, "log_every": 2})
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    peak = json.loads((tmp_path / "peak.json").read_text())
    assert [line["step"] for line in lines] == [2, 4] and peak["dtype"] == "float32"
    per_token = tiny_model().flops(1, 3, 4, 4) / 12
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(4 * line["frames_per_second"], rel=1e-3)
        mfu = 3 * per_token * line["tokens_per_second"] / peak["flops_per_second"]
        assert line["mfu"] == pytest.approx(mfu, rel=2e-3) and 0 < line["mfu"] < 1
    (tmp_path / "peak.json").write_text(json.dumps(peak | {"flops_per_second": 1.0}))
    training(tmp_path, {"steps": 5})  # resumed: not measured again
    assert json.loads((tmp_path / "peak.json").read_text())["flops_per_second"] == 1.0


def test_throughput_excludes_evaluations(monkeypatch):
    clock = iter([0.0, 10.0, 16.0, 20.0])  # start; an evaluation from 10 to 16; the end
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = ThroughputMeter(processes=2, peak=100.0)
    meter.add(7.0, {"frames": 28.0, "flops": 700.0})
    with meter.exclude():
        pass
    assert meter.metrics() == {"steps_per_second": 1 / 14, "data_wait": 0.5, "frames_per_second": 2.0,
                               "mfu": 3 * 700 / 14 / 2 / 100}


def test_the_measured_matmul_rate_is_plausible_and_leaves_the_random_state():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32, seconds=0.05) < 1e15
    assert torch.get_rng_state().equal(state)


def live_bytes() -> int:
    """Bytes of all tensors, each storage once; garbage counts."""
    sizes = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and not isinstance(each, FakeTensor):  # those of other tests have no storage
            storage = each.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def test_memory_after_an_evaluation_is_as_before(tmp_path):
    seen: dict[int, int] = {}

    class Measured(Flow):
        def forward(self, batch, step, micro_batch):
            if torch.is_grad_enabled() and step in (3, 4):
                seen[step] = live_bytes()
            return super().forward(batch, step, micro_batch)

    def litter(objective):
        cycle = [torch.zeros(2_000_000)]
        cycle.append(cycle)  # only a collection finds it
        return {}

    gc.collect()
    training(tmp_path, {"steps": 5, "evaluate_every": 4, "save_every": 5}, evaluate=litter, objective_of=Measured)
    assert len(seen) == 2
    assert abs(seen[4] - seen[3]) < 10_000  # an evaluation lies between them; the weights are 150 kB


def test_a_frozen_model_is_refused(tmp_path):
    training(tmp_path, {"error": "there is nothing to train"}, model=tiny_model().requires_grad_(False))


def test_limits_of_sharding_are_checked_in_one_process_too(tmp_path):
    training(tmp_path / "a", {"sharding": "full", "optimizer": {"name": "muon"}, "error": "muon computes its steps"})

    class Whole(Flow):
        can_be_sharded = False

    training(tmp_path / "b", {"sharding": "full", "error": "Whole needs full copies"}, objective_of=Whole)
    one, other = (training(tmp_path / name, {"steps": 2, "sharding": name})[-2:] for name in ("full", "none"))
    assert one == other  # in one process there is nothing to shard


@pytest.mark.parametrize(("decay", "half"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_learning_rate_warms_up_and_decays(decay, half):
    config = OptimizerConfig(learning_rate=1.0, warmup=10, decay=decay, final=0.1)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[10] == 1.0
    assert rates[60] == pytest.approx(half) and rates[110] == pytest.approx(1.0 if decay == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_eight_bits_come_from_bitsandbytes(monkeypatch):
    config = OptimizerConfig(name="adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        make_optimizers(nn.Linear(2, 2), config, non_muon_pattern="norm")
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    standing_in = types.ModuleType("bitsandbytes.optim")
    standing_in.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", standing_in)
    (optimizer,) = make_optimizers(nn.Linear(2, 2), config, non_muon_pattern="norm")
    assert type(optimizer).__name__ == "AdamW8bit"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_eight_bits_resume_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed, nor needed")
    settings = {"steps": 4, "save_every": 2, "optimizer": {"name": "adamw8bit"}}

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))  # from 4096 values on state has 8 bits

    class Folding(Flow):
        def forward(self, batch, step, micro_batch):
            return {"loss": (self.model(batch.clean[:, :, 0].flatten(1)) - 1).square().mean()}

        def flops(self, batch):
            return 1

    whole = training(tmp_path / "whole", settings, model=model(), objective_of=Folding)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000004")
    assert training(tmp_path / "cut", settings, model=model(), objective_of=Folding) == whole
    one, other = (load_file(tmp_path / run / "checkpoints/step-00000004/optimizer0.safetensors")
                  for run in ("whole", "cut"))
    assert one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())
    assert torch.uint8 in {tensor.dtype for tensor in one.values()}


def test_micro_batches_are_numbered_as_processes_are(tmp_path):
    calls = []

    class Recorded(Flow):
        def forward(self, batch, step, micro_batch):
            if torch.is_grad_enabled():
                calls.append((step, micro_batch, batch.names))
            return super().forward(batch, step, micro_batch)

    training(tmp_path, {"steps": 1, "micro_batch_size": 2, "gradient_accumulation_steps": 2}, objective_of=Recorded)
    assert calls == [(0, 0, ("0", "1")), (0, 1, ("2", "3"))]
    assert LOOP["micro_batch_size"] == 4


@pytest.mark.parametrize(("start", "kept"), [(0, []), (4, [0, 4]), (9, [0, 4, 5])])
def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path, start, kept):
    """Without a checkpoint also the line of step 0, which is evaluated again."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 4, 5)))
    MetricsLogger(tmp_path, start, {}, Accelerator())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == kept
