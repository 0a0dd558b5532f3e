"""Pipelines of diffusers: the events, their frames, interruption, and what is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from tiny_diffusers import LENGTHS, make_diffusers_pipeline

from lvdm.capabilities import VideoGrid
from lvdm.sampling.diffusers_adapter import DiffusersAdapter
from lvdm.sampling.outputs import DecodeProgress, RolloutGroup, RolloutStep, VideoChunk
from odvae.inference.memory import MemoryOptions
from odvae.utils.errors import NonFiniteError, UserError

SIZE = dict(height=64, width=32, num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture(scope="module")
def adapters():
    return {kind: DiffusersAdapter(make_diffusers_pipeline(kind)) for kind in LENGTHS}


@pytest.fixture(params=LENGTHS)
def adapter(request, adapters):
    return adapters[request.param]


def arguments(adapter):
    return SIZE | {"num_frames": LENGTHS[adapter.kind]}


def test_frames_equal_those_of_the_pipelines_own_call(adapter):
    *steps, group, decoded, chunk = adapter.stream(["red", "blue"], negative_prompt=["blue", "red"], seed=[3, 4],
                                                   **arguments(adapter))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = adapter.pipeline(["red", "blue"], negative_prompt=["blue", "red"], generator=generators,
                                output_type="np", **arguments(adapter)).frames
    assert steps == [RolloutStep(1, 1, 1, 2), RolloutStep(1, 1, 2, 2)]
    assert isinstance(group, RolloutGroup) and isinstance(decoded, DecodeProgress) and isinstance(chunk, VideoChunk)
    assert group.latents.shape[2] == 3 == adapter.grid.latent_frames(LENGTHS[adapter.kind])
    np.testing.assert_array_equal(chunk.frames, np.rint(expected * 255))
    assert chunk.frames.shape == (2, LENGTHS[adapter.kind], 64, 32, 3) and len(np.unique(chunk.frames)) > 9


def test_latents_decode_to_the_same_frames_and_in_tiles_to_nearly_the_same(adapter):
    chunk = list(adapter.stream("red", seed=3, **arguments(adapter)))[-1]
    again, = adapter.decode_latents([chunk.latents])
    np.testing.assert_array_equal(again, chunk.frames)
    side = 2 * adapter.grid.spatial_compression
    tile = adapter.decode_plan(MemoryOptions(tile=(side, side)), 64, 32)
    tiled, = adapter.decode_latents([chunk.latents], tile)
    assert tiled.shape == again.shape and not adapter.vae.use_tiling
    assert adapter.kind == "LTXPipeline" or np.abs(tiled.astype(int) - again).max() > 0  # a tile of 64 is the video


def test_closing_stops_the_call_after_its_step(adapter):
    events = adapter.stream("red", **arguments(adapter) | {"num_inference_steps": 50})
    assert next(events).step == 1
    evaluated = []
    hook = adapter.transformer.register_forward_pre_hook(lambda *_: evaluated.append(1))
    events.close()
    hook.remove()
    assert len(evaluated) < 10 and not [thread for thread in threading.enumerate() if thread.name == "diffusers"]


def test_an_error_of_the_call_is_raised(adapter):
    def fail(*_):
        raise MemoryError

    hook = adapter.transformer.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        list(adapter.stream("red", **arguments(adapter)))
    hook.remove()


def test_nan_names_the_component(adapters):
    adapter = adapters["WanPipeline"]
    hook = adapter.transformer.register_forward_hook(lambda module, inputs, output: (output[0] * float("nan"),))
    with pytest.raises(NonFiniteError, match="the transformer"):
        list(adapter.stream("red", **arguments(adapter)))
    hook.remove()
    with pytest.raises(NonFiniteError, match="the VAE's decoder"):
        list(adapter.decode_latents([torch.full((1, 16, 1, 4, 4), torch.inf)]))


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_frames": 8}, r"must be 1 \+ 4k; the nearest is 9"), ({"height": 40}, "the nearest is 32x32"),
    ({"prompt": [(0.0, "red"), (1.0, "blue")]}, "sections: a WanPipeline cannot .*whole video at once"),
    ({"video_latents": torch.zeros(1)}, "cannot start from a video"), ({"image": 1}, "cannot start from an image"),
    ({"sigmas": [1.0]}, "takes no sigmas here"), ({"scheduler": "heun"}, "its own scheduler"),
    ({"shift": 3.0}, "shift"), ({"history_groups": 3}, "history_groups"),
    ({"memory": MemoryOptions(tile=(60, 60))}, "multiples of 8")])
def test_what_it_cannot_do_is_refused_at_once(adapters, changes, message):
    adapter = adapters["WanPipeline"]
    with pytest.raises(UserError, match=message):
        adapter.stream(**{"prompt": "red", **arguments(adapter), **changes})


def test_a_distilled_model_takes_no_negative_prompt(adapters, monkeypatch):
    monkeypatch.setattr(adapters["WanPipeline"], "kind", "HunyuanVideoPipeline")
    monkeypatch.setattr(DiffusersAdapter, "grid", VideoGrid(group=0))
    with pytest.raises(UserError, match=r"negative_prompt: .* distilled"):
        adapters["WanPipeline"].stream(["red"], negative_prompt=["blue"], height=64, width=64)
    adapters["WanPipeline"].stream(["red"], negative_prompt=[""], height=64, width=64).close()


def test_too_few_steps_for_a_schedule_are_refused(adapters, monkeypatch):
    monkeypatch.setattr(adapters["WanPipeline"], "kind", "MochiPipeline")
    monkeypatch.setattr(DiffusersAdapter, "grid", VideoGrid(group=0))
    with pytest.raises(UserError, match="num_inference_steps must be at least 2 with MochiPipeline, got 1"):
        adapters["WanPipeline"].stream(["red"], num_inference_steps=1, height=64, width=64)


def test_requirements_count_all_weights(adapter):
    need = adapter.requirements(64, 64)
    parts = [part for part in adapter.components.values() if isinstance(part, torch.nn.Module)]
    assert sum(need.weights.values()) == sum(x.nbytes for part in parts
                                             for x in (*part.parameters(), *part.buffers()))
    assert need.decoding < adapter.requirements(128, 128).decoding and "weights" in str(need)
