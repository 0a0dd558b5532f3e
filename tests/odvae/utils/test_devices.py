"""Which accelerator is used, and Apple's own functions where it is that one. CUDA's: tests/simulated_cuda."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from accelerate.utils import is_mps_available

from odvae.inference.memory import free_memory
from odvae.trainer.distributed import best_device, local_device
from odvae.trainer.throughput import matmul_rate
from odvae.utils.devices import empty_cache
from odvae.utils.profiling import profile_call

MIB = 2**20


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for torch.mps."""
    module = Mock()
    monkeypatch.setattr(torch, "mps", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, name, lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return module


def test_the_device_is_the_one_that_accelerate_trains_on(mps: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_device() == local_device() == torch.device("mps")
    assert is_mps_available(), "accelerate trains on it"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (best_device(), local_device()) == (torch.device("cuda"), torch.device("cuda", 1))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert best_device() == local_device() == torch.device("cpu")


def test_times_on_mps_are_taken_after_it_has_done_its_work(mps: Mock) -> None:
    result, usage = profile_call(lambda: mps.synchronize.call_count)
    assert (result, mps.synchronize.call_count) == (1, 2) and usage.seconds >= 0
    matmul_rate(torch.device("cpu"), torch.float32, seconds=0)
    assert mps.synchronize.call_count == 2, "another device is not waited for"
    empty_cache()
    mps.empty_cache.assert_called_once_with()


def test_free_memory_on_mps_counts_what_the_allocator_holds_unused(mps: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Mock(available=100 * MIB))
    mps.current_allocated_memory.return_value, mps.driver_allocated_memory.return_value = 10 * MIB, 30 * MIB
    mps.recommended_max_memory.return_value = 1000 * MIB
    assert free_memory(torch.device("mps")) == 120 * MIB
    mps.recommended_max_memory.return_value = 50 * MIB
    assert free_memory(torch.device("mps")) == 40 * MIB
