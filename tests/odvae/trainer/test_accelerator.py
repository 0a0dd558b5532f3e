"""What only an accelerator needs, as far as a CPU can show it: synchronisations, determinism, implementations."""

import logging

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_training import LOOP, Flow, samples, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from odvae.trainer.determinism import WORKSPACE, use_deterministic_algorithms
from odvae.trainer.distributed import make_accelerator
from odvae.trainer.optim import OptimizerConfig, keep_implementation, make_optimizers
from odvae.trainer.trainer import LoopConfig, Trainer
from odvae.utils import devices


class Fetches(TorchDispatchMode):
    """Counts the scalars that are read from tensors, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_its_device_once(tmp_path):
    """However many losses and micro-batches there are: the values are stacked, and read together."""
    AcceleratorState._reset_state()
    loop = LoopConfig.model_validate(LOOP | {"gradient_accumulation_steps": 2})
    trainer = Trainer(tmp_path, loop, Flow(tiny_model()), None, None)
    trainer.learners[0].step = lambda apply: None  # AdamW reads its own count of steps, which lies on the CPU
    batches, read, reads = [samples(0, range(1)), samples(0, range(1, 2))], torch.Tensor.tolist, []
    with pytest.MonkeyPatch.context() as patch, Fetches() as fetches:
        patch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or read(tensor))
        losses = trainer.forward_backward(0, batches)
        assert not reads and all(loss.ndim == 0 for loss in losses.values())
        trainer.optimizer_step(0, batches, losses, 0.0, False)
    assert fetches.count == 0 and len(reads) == 1


def test_ddp_searches_unused_parameters_only_where_there_are_some():
    for every in (False, True):
        AcceleratorState._reset_state()
        handler = make_accelerator(every_parameter=every).ddp_handler
        assert handler.find_unused_parameters is not every and handler.gradient_as_bucket_view
    AcceleratorState._reset_state()


def test_a_state_of_another_device_keeps_the_optimizers_own_implementation():
    model = nn.Linear(2, 2)
    optimizer, = make_optimizers(model, OptimizerConfig(), non_muon_pattern="")
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = True
    keep_implementation(optimizer, state)
    optimizer.load_state_dict(state)
    assert not any(group["fused"] for group in optimizer.param_groups)


def test_deterministic_algorithms(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    try:
        use_deterministic_algorithms()
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_a_gpu_that_torch_cannot_use_is_reported(monkeypatch, tmp_path, caplog):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01\n")
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "version")
    for cuda, warned in ((None, False), ("12.8", True)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        devices.warn_if_driver_too_old.cache_clear()
        with caplog.at_level(logging.WARNING, "odvae"):
            devices.warn_if_driver_too_old()
        assert ("THE GPU IS NOT USED" in caplog.text and "470.82.01" in caplog.text) is warned
    devices.warn_if_driver_too_old.cache_clear()
