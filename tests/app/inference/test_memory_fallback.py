"""What the app falls back to where memory runs out, and where the weights lie then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from app.inference import model_manager
from app.inference.model_manager import MIN_TILE, MemoryFallback, ModelManager
from odvae.inference.memory import AUTO, MemoryOptions


class Pipeline(Mock):
    """Records what is done with it; in float32."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.transformer = SimpleNamespace(dtype=torch.float32)
        self.vae = Mock(dtype=torch.float32)

    def done(self) -> list[str]:
        names = [name for name, _, _ in self.mock_calls]
        self.reset_mock()
        return names


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_manager, "best_device", lambda: torch.device("cuda"))


def manager(**options: Any) -> ModelManager:
    store: Any = SimpleNamespace(get_value=lambda name: options)
    return ModelManager(store)


def test_on_a_cpu_only_tiles_need_less_memory() -> None:
    cpu = manager(device="cpu", offload="model")
    requested, tiles = cpu.memory_fallbacks(256, 448)
    assert (requested.memory, requested.offload, requested.helps) == (AUTO, "none", frozenset())
    assert (tiles.memory, tiles.helps) == (MemoryOptions(tile=(128, 128)), {"decoding"})
    assert len(cpu.memory_fallbacks(MIN_TILE, MIN_TILE)) == 1  # too small for tiles
    assert [fallback.memory.tile for fallback in cpu.memory_fallbacks(512, 512, tile=256)] == [(256, 256), (128, 128)]


@pytest.mark.parametrize(("offload", "expected"), [
    ("none", ["none", "none", "model", "model", "sequential", "sequential"]),
    ("model", ["model", "model", "model", "sequential", "sequential"]), ("sequential", ["sequential"] * 3)])
def test_on_an_accelerator_each_fallback_keeps_the_tiles(on_gpu: None, offload: str, expected: list[str]) -> None:
    fallbacks = manager(offload=offload).memory_fallbacks(256, 256)
    assert [fallback.offload for fallback in fallbacks] == expected
    assert {fallback.memory.tile for fallback in fallbacks[1:]} == {(128, 128)}
    assert all(fallback.helps for fallback in fallbacks[1:])
    assert fallbacks[-1].decode_on_cpu and not fallbacks[0].decode_on_cpu


def test_weights_are_moved_only_where_the_placement_changes(on_gpu: None) -> None:
    models, pipeline = manager(precision="float32"), Pipeline()
    whole, model = MemoryFallback("whole"), MemoryFallback("model", offload="model")
    sequential = MemoryFallback("sequential", offload="sequential")
    models.place(pipeline, whole)
    assert "to" in pipeline.done()
    models.place(pipeline, whole)
    assert pipeline.done() == []
    models.place(pipeline, model)
    assert pipeline.done() == ["remove_all_hooks", "enable_model_cpu_offload"]
    models.place(pipeline, sequential)
    assert pipeline.done() == ["remove_all_hooks", "enable_sequential_cpu_offload"]
    models.place(pipeline, MemoryFallback("decode", offload="model", decode_on_cpu=True))
    assert pipeline.done() == ["remove_all_hooks", "enable_model_cpu_offload"] and pipeline.decode_on_cpu
    models.place(pipeline, whole)
    assert "remove_all_hooks" in pipeline.done()
