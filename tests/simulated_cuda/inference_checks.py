"""Inference on the simulated device: values as on the CPU, weights where they are said to be, no needless waiting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import random_video, tiny_vae
from pipelines import SIZE, make_pipeline, make_t5
from tiny_open_sora import make_open_sora_pipeline
from transformers import T5EncoderModel

from app.inference.model_manager import MemoryFallback, ModelManager
from app.storage.store import JobStore
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.sampling.outputs import RolloutStep
from lvdm.sampling.rollout import rollout
from lvdm.text import on_accelerator
from odvae.cache.encoder import LatentEncoder
from odvae.inference.memory import free_memory
from odvae.inference.streaming import decode_stream, encode_stream
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import NonFiniteError
from simulated_cuda.device import synchronisations
from simulated_cuda.support import ComponentDevices, assert_close, assert_within, on_cpu

DECODED = 5e-6  # group norm of channels-last frames sums in another order than on the CPU
FIRST = np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), np.uint8)
CASES: dict[str, dict[str, Any]] = {
    "text": {"guidance_rescale": 0.5}, "unguided": {"guidance_scale": 1.0}, "image": {"image": FIRST[0]},
    "video": {"video": FIRST, "num_frames": 17}}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline(scratch: Path) -> None:
    """Generation, image and video conditioning give the CPU's videos in float32, and nearly so in half precision."""
    model = quiet(make_pipeline())
    with on_cpu():
        expected = {name: model("red", seed=0, **SIZE | case) for name, case in CASES.items()}
    model.to("cuda")
    for name, case in CASES.items():
        actual = model("red", seed=0, **SIZE | case)
        assert actual.latents.device.type == "cuda", name
        assert_close(actual.latents, expected[name].latents, DECODED if "i" in name else 0)
        assert np.abs(actual.frames - expected[name].frames).max() <= DECODED, name
        streamed = [event.frames for event in model.stream("red", seed=0, **SIZE | case) if hasattr(event, "frames")]
        assert np.abs(np.concatenate(streamed, 1) - 255 * actual.frames).max() < 0.51, name
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        actual = model("red", seed=0, **SIZE)
        assert {p.dtype for p in (*model.transformer.parameters(), *model.vae.parameters())} == {dtype}
        assert np.abs(actual.frames - expected["text"].frames).mean() < 0.02, dtype


def history(scratch: Path) -> None:
    """A rollout with cached history equals one without, on the device too."""
    from lvdm.condition import Condition

    transformer = make_pipeline(text_dim=0).transformer

    def latents(use_cache: bool) -> torch.Tensor:
        events = rollout(transformer, Condition(), Condition(), latents=7, height=4, width=2, seeds=[0, 1],
                         num_inference_steps=2, history_groups=2, use_cache=use_cache)
        return torch.cat([event.latents for event in events if not isinstance(event, RolloutStep)], 2)

    with on_cpu():
        expected = latents(True)
    transformer.to("cuda")
    assert_close(latents(True), expected)
    assert_close(latents(False), expected, 1e-5)


def denoising_steps(scratch: Path) -> None:
    """No step but a group's first waits for the device; NaN is found at the end of the group all the same."""
    own, open_sora = quiet(make_pipeline(num_layers=1)).to("cuda"), quiet(make_open_sora_pipeline()).to("cuda")
    for model, options, budget in (
            (own, {"num_frames": 17, "scheduler": "euler"}, 0), (own, {"scheduler": "heun"}, 0),
            (own, {"scheduler": "dpm"}, 0), (own, {"scheduler": "unipc"}, 1),  # torch.linalg.solve of its corrector
            (open_sora, {"scheduler": "ddim"}, 0), (open_sora, {"scheduler": "unipc"}, 1)):
        size = SIZE | {"num_inference_steps": 3, "height": 16, "width": 16} | options
        events = model.stream("red", seed=0, **size)
        while True:
            with synchronisations() as seen:
                event = next(events, None)
            if event is None:
                break
            if isinstance(event, RolloutStep) and event.step > 1:
                assert_within(budget, seen, f"step {event.step} of {type(model).__name__}, {size}")
    for model in (own, open_sora):
        with torch.no_grad():
            next(model.transformer.parameters()).fill_(float("nan"))
        try:
            list(model.stream("red", seed=0, **SIZE))
        except NonFiniteError as error:
            assert "the transformer" in str(error) and "is not finite: load undamaged weights" in str(error)
        else:
            raise AssertionError("NaN was not found")


def offload(scratch: Path) -> None:
    """Every memory fallback computes where it says, also for the second video, and gives the same video."""
    manager = ModelManager(JobStore(scratch / "jobs.sqlite3"),
                           lambda folder: quiet(make_pipeline(make_t5(), num_layers=1)))
    manager._store.set_value("options", {"precision": "float32"})
    model = manager.pipeline(None)
    arguments = dict(prompt="red", seed=0, **SIZE | CASES["video"] | {"num_inference_steps": 1})
    with on_cpu():
        expected = model(**arguments).frames
    whole, *others = manager.memory_fallbacks(16, 16)
    assert (whole.offload, [f.offload for f in others]) == ("none", ["model", "model", "sequential", "sequential"])
    methods = ((LVDMTransformer3DModel, "forward"), (T5EncoderModel, "forward"), (AutoencoderKLODVAE, "encode_chunk"),
               (AutoencoderKLODVAE, "decode_chunk"))
    with ComponentDevices(*methods) as seen:
        for fallback in (whole, *others, whole, MemoryFallback("", offload="model", decode_on_cpu=True), others[0]):
            # After every video diffusers sets the hooks again.
            for _ in range(2 if fallback in (others[1], others[3]) else 1):
                seen.devices.clear()
                manager.place(model, fallback)
                frames = model(**arguments).frames
                decoding = "cpu" if fallback.decode_on_cpu else "cuda"
                assert seen.devices == {"LVDMTransformer3DModel": {"cuda"}, "T5EncoderModel": {"cuda"},
                                        "AutoencoderKLODVAE": {decoding}}, (fallback, dict(seen.devices))
                assert np.abs(frames - expected).max() <= DECODED, fallback
                parts = {"vae": model.vae, "others": torch.nn.ModuleList([model.transformer, model.text_encoder])}
                left = {name: {p.device.type for p in part.parameters()} for name, part in parts.items()}
                resting = {"none": "cuda", "model": "cpu", "sequential": "meta"}[fallback.offload]
                assert left == {"vae": {decoding if fallback.decode_on_cpu else resting}, "others": {resting}}, fallback


def autoencoder(scratch: Path) -> None:
    """Whole, streamed and tiled, plain and fused, in float32 and half precision, and under autocast."""
    vae, video = tiny_vae(), random_video(9, height=32, width=32)

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
            out = [latents, vae.decode(latents).sample, vae(x).sample]
            out.append(torch.cat(list(encode_stream(vae, x.split(4, dim=2))), 2))
            out.append(torch.cat(list(decode_stream(vae, latents.split(1, dim=2))), 2))
            vae.enable_tiling(16, 16)
            out += [vae.encode(x).latent_dist.mean, vae.decode(latents).sample]
            vae.disable_tiling()
        return out

    plain = results(video)
    vae.to("cuda")
    for fuse in (False, True):
        if fuse:
            vae.fuse()
        for actual, expected in zip(results(video.to("cuda")), plain, strict=True):
            assert actual.device.type == "cuda"
            assert_close(actual, expected, 2e-5)
    vae.unfuse()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            for actual, expected in zip(results(video.to("cuda")), plain, strict=True):
                assert_close(actual, expected, 0.15)
            trained = vae(video.to("cuda")).sample
        assert_close(trained, plain[2], 0.15)
        half = tiny_vae().to("cuda", dtype)
        assert_close(half(video.to("cuda", dtype)).sample, plain[2], 0.15)


def encoders(scratch: Path) -> None:
    """A cache's encoder, and a text encoder that is on the device only while it embeds."""
    video, vae, text = random_video(17, height=16, width=16), tiny_vae(), make_t5()
    with on_cpu():
        expected = LatentEncoder(vae, "moments").encode(video)
        streamed = LatentEncoder(vae).encode_chunks(video.split(4, dim=2))
        vectors, _ = text.encode(["red blue", ""])
    vae.to("cuda")
    assert_close(LatentEncoder(vae, "moments").encode(video), expected, DECODED)
    encoder = LatentEncoder(vae)
    latents = encoder.encode_chunks(video.split(4, dim=2))
    assert_close(latents, streamed, DECODED)
    assert encoder.decode(latents[0], 17, 16, 16).shape == video.shape
    for _ in range(2):
        with on_accelerator(text), ComponentDevices((T5EncoderModel, "forward")) as seen:
            embedded, mask = text.encode(["red blue", ""])
        assert seen.devices == {"T5EncoderModel": {"cuda"}} and embedded.device == mask.device
        assert text.model.device.type == "cpu"
        assert_close(embedded, vectors)


def memory(scratch: Path) -> None:
    """What torch's allocator holds unused is free."""
    cuda = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = free_memory(cuda)
    taken = torch.empty(2**28, dtype=torch.uint8, device=cuda)
    assert free_memory(cuda) == before - 2**28
    del taken
    assert torch.cuda.mem_get_info(cuda)[0] <= before - 2**28 and free_memory(cuda) == before


CHECKS: dict[str, Callable[[Path], None]] = {
    check.__name__: check for check in (pipeline, history, denoising_steps, offload, autoencoder, encoders, memory)}
