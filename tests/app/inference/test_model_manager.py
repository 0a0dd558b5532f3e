"""The worker's models: adapters are exchanged in a loaded pipeline, and memory fallbacks keep models where they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import hooks
from pipelines import SIZE, make_pipeline
from tiny_adapters import save_adapter

from app.inference.model_manager import MemoryFallback, ModelManager
from app.storage.store import JobStore
from lvdm.adapter_files import LoraFile
from lvdm.generation.fingerprints import fingerprints
from lvdm.sampling.loading import load_pipeline
from lvdm.sampling.lora import load_adapters
from odvae.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_pipeline().save_pretrained(folder / "pipeline")
    for seed, name in enumerate(("a", "b")):
        save_adapter(make_pipeline().transformer, folder / name, seed)
    return folder


@pytest.fixture
def manager(tmp_path, folder):
    loaded = []

    def load(path):
        loaded.append(path)
        return load_pipeline(path, to_device=False)

    manager = ModelManager(JobStore(tmp_path / "jobs.sqlite3"), load)
    manager.loaded = loaded
    return manager


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """Take cpu:0 for the accelerator that models are offloaded from. A copy to it would be no parameter any more, as
    its name differs from the device's."""
    before = hooks.set_module_tensor_to_device
    monkeypatch.setattr(hooks, "set_module_tensor_to_device", lambda module, name, device, **options: before(
        module, name, "cpu" if str(device) == "cpu:0" else device, **options))


def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("red", seed=0, output_type="latent", **SIZE).latents


@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_adapters_are_exchanged_in_the_loaded_pipeline(manager, folder, offload):
    path, a, b = folder / "pipeline", LoraFile(folder / "a", 0.5), LoraFile(folder / "b")
    results, parts = {}, {}
    for name, files in {"plain": [], "a": [a], "a and b": [a, b], "b": [b], "strong": [LoraFile(folder / "a", 2.0)],
                        "plain again": [], "a again": [a]}.items():
        pipeline = manager.pipeline(path, files)
        manager.place(pipeline, MemoryFallback("", offload=offload))
        results[name], parts[name] = sample(pipeline), manager.parts()
        fresh = load_pipeline(path)
        load_adapters(fresh, files)
        assert manager.parts() == fingerprints(fresh), name
        torch.testing.assert_close(results[name], sample(fresh), atol=1e-5, rtol=0)
    assert manager.loaded == [path], "it is loaded once"
    for name in ("plain", "a"):
        assert torch.equal(results[f"{name} again"], results[name]) and parts[f"{name} again"] == parts[name]
    assert len({str(value) for value in parts.values()}) == 5
    assert (results["a"] - results["strong"]).abs().max() > 0.01


def test_a_lora_that_cannot_be_loaded_leaves_no_trace(manager, folder, tmp_path):
    path = folder / "pipeline"
    plain, parts = sample(manager.pipeline(path)), manager.parts()
    with pytest.raises(UserError, match="there is no LoRA"):
        manager.pipeline(path, [LoraFile(folder / "a"), LoraFile(tmp_path / "gone.safetensors")])
    assert torch.equal(sample(manager.pipeline(path)), plain) and manager.parts() == parts


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_a_vae_on_the_cpu_is_never_brought_to_the_accelerator(manager, folder, monkeypatch, offload):
    brought = []
    before = hooks.CpuOffload.pre_forward
    monkeypatch.setattr(hooks.CpuOffload, "pre_forward", lambda hook, module, *args, **kwargs: (
        brought.append(module), before(hook, module, *args, **kwargs))[1])
    pipeline = manager.pipeline(folder / "pipeline")
    manager.place(pipeline, MemoryFallback("", offload="model"))
    expected = pipeline("red", seed=0, **SIZE).frames
    assert pipeline.vae in brought, "the accelerator decodes"
    manager.place(pipeline, MemoryFallback("", offload=offload, decode_on_cpu=True))
    brought.clear()
    for _ in range(2):  # diffusers sets the hooks again after every video
        assert (pipeline("red", seed=0, **SIZE).frames == expected).all()
        pipeline.encode_video((expected[0] * 255).astype("uint8"))
        assert pipeline.vae not in brought and not hasattr(pipeline.vae, "_hf_hook")
        assert pipeline._vae_device == torch.device("cpu") and pipeline._execution_device == torch.device("cpu:0")
    manager.place(pipeline, MemoryFallback("", offload="model"))
    assert (pipeline("red", seed=0, **SIZE).frames == expected).all() and pipeline.vae in brought


@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_fallbacks_need_less_and_less_memory(manager, monkeypatch, offload):
    monkeypatch.setattr(ModelManager, "device", torch.device("cuda"))
    manager._store.set_value("options", {"offload": offload})
    fallbacks = manager.memory_fallbacks(256, 256)
    order = ["none", "model", "sequential"]
    placements = [order.index(fallback.offload) for fallback in fallbacks]
    assert placements == sorted(placements) and placements[0] == order.index(offload)
    assert len({fallback.effect for fallback in fallbacks}) == len(fallbacks)
    assert fallbacks[-1].decode_on_cpu and fallbacks[-1].offload == "sequential" and fallbacks[-1].memory.tile
