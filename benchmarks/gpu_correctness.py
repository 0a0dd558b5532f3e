"""Parts of `gpu.py` that check values: the accelerator against the CPU, and each way against the plain one."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_results import Part, Result
from safetensors.torch import load_file
from torch import Tensor, nn

from app.inference.model_manager import ModelManager
from app.storage.store import JobStore
from lvdm.condition import Condition
from lvdm.sampling.loading import default_pipeline
from lvdm.sampling.rollout import rollout
from odvae.cache import build_cache
from odvae.data.synthetic import write_rendered
from odvae.inference.adapters import load_autoencoder
from odvae.inference.streaming import decode_stream, encode_stream
from odvae.metrics.psnr import psnr
from odvae.weights import DEMO_VAE, NATURAL_VAE

BACKENDS = ("native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn", "flex", "flash",
            "_flash_3", "sage")
PROMPT = "a red circle moving right over a striped background"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products in float32, not in TF32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value of `b`."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def _video(side: int, frames: int = 17) -> Tensor:
    """A rendered clip (1, 3, t, H, W) in [-1, 1]."""
    from odvae.data.transforms import resize_crop, to_tensor
    from odvae.data.video.reader import read_clip

    with tempfile.TemporaryDirectory() as folder:
        path = write_rendered(Path(folder), 1, frames=frames, size=side, seed=7)[0]
        return to_tensor(resize_crop(read_clip(path, 0, frames, 8.0), side, side))[None]


def _quality(video: Tensor, decoded: Tensor) -> float:
    """The mean PSNR in dB."""
    return float(psnr(video, decoded.float().cpu()).mean())


@torch.no_grad()
def check_vae(device: torch.device) -> Iterator[Result]:
    """CPU and device in float32; streamed and whole; bfloat16 and autocast by their PSNR."""
    on_cpu = load_autoencoder(NATURAL_VAE).model.eval()
    video = _video(64 if device.type == "cpu" else 256)
    vae, x = copy.deepcopy(on_cpu).to(device), video.to(device)
    with exact_float32():
        latents = on_cpu.encode(video).latent_dist.mean
        decoded = on_cpu.decode(latents).sample
        yield Result("encode: CPU and device", deviation(vae.encode(x).latent_dist.mean, latents), limit=1e-3)
        yield Result("decode: CPU and device", deviation(vae.decode(latents.to(device)).sample, decoded), limit=1e-3)
        chunks = torch.cat(list(encode_stream(vae, x.split(8, dim=2))), 2)
        yield Result("encode: streamed and whole", deviation(chunks, vae.encode(x).latent_dist.mean), limit=1e-3)
        frames = torch.cat(list(decode_stream(vae, chunks.split(1, dim=2))), 2)
        yield Result("decode: streamed and whole", deviation(frames, vae.decode(chunks).sample), limit=1e-3)
    reference = _quality(video, decoded)
    half = copy.deepcopy(on_cpu).to(device, torch.bfloat16)
    in_bf16 = half.decode(half.encode(x.bfloat16()).latent_dist.mean).sample
    yield Result("bfloat16 reconstruction", reference - _quality(video, in_bf16), "dB lost", .05)
    pieces = torch.cat(list(decode_stream(half, half.encode(x.bfloat16()).latent_dist.mean.split(1, dim=2))), 2)
    yield Result("bfloat16: streamed and whole", deviation(pieces, in_bf16), limit=.05)
    with torch.autocast(device.type, torch.bfloat16):
        cast = vae.decode(vae.encode(x).latent_dist.mean).sample
    yield Result("autocast reconstruction", reference - _quality(video, cast), "dB lost", .05)


@torch.no_grad()
def check_transformer(device: torch.device) -> Iterator[Result]:
    """CPU and device in float32, then each attention backend that works here, in bfloat16."""
    from lvdm import LVDMTransformer3DModel

    torch.manual_seed(0)
    on_cpu = LVDMTransformer3DModel(hidden_size=256, num_layers=4, num_attention_heads=4, text_dim=64).eval()
    for parameter in on_cpu.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=.02)
    side = 16 if device.type == "cpu" else 32
    inputs = {"latents": torch.randn(1, 4, 5, side, side), "timestep": torch.rand(1, 5), "text": torch.randn(1, 9, 64)}
    expected = on_cpu(**inputs).sample
    model = copy.deepcopy(on_cpu).to(device)
    there = {name: value.to(device) for name, value in inputs.items()}
    with exact_float32():
        yield Result("CPU and device", deviation(model(**there).sample, expected), limit=1e-3)
    model = model.to(torch.bfloat16)
    there = {name: value if name == "timestep" else value.bfloat16() for name, value in there.items()}
    for backend in (None, *BACKENDS):
        try:
            if backend is not None:
                model.set_attention_backend(backend)
            value = deviation(model(**there).sample, expected)
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            yield Result(f"{backend} is not available: {' '.join(str(error).split()[:8])} ...", None)
            continue
        yield Result(f"bfloat16, {backend or 'default'}", value, limit=.05)
    model.set_attention_backend("native")  # diffusers keeps the last choice for all models


@torch.no_grad()
def check_rollout(device: torch.device) -> Iterator[Result]:
    """The pipeline's frames on CPU and device, and the rollout with and without its cache."""
    size: dict[str, Any] = dict(num_frames=17, num_inference_steps=4, height=64, width=64, seed=3, output_type="pt")
    pipeline = default_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    with exact_float32():
        expected = pipeline.to("cpu")(PROMPT, **size).frames
        frames = pipeline.to(device)(PROMPT, **size).frames
        yield Result("frames: CPU and device", deviation(frames, expected), limit=.02)
        texts = [Condition(*pipeline.text_encoder.encode([text])).to(device) for text in (PROMPT, "")]

        def latents(use_cache: bool) -> Tensor:
            steps = list(rollout(pipeline.transformer, *texts, latents=5, height=8, width=8, seeds=[0],
                                 num_inference_steps=4, use_cache=use_cache))
            return torch.cat([event.latents for event in steps if type(event).__name__ == "RolloutGroup"], 2)

        yield Result("with and without KV cache", deviation(latents(True), latents(False)), limit=1e-3)
    if device.type == "cuda":
        yield from _check_synchronizations(lambda: rollout(pipeline.transformer, *texts, latents=5, height=8, width=8,
                                                           seeds=[0], num_inference_steps=4))


def _check_synchronizations(make_rollout: Callable[[], Any]) -> Iterator[Result]:
    """No denoising step waits for the device: torch raises where one does."""
    list(make_rollout())  # warm-up: caches of tables
    run = make_rollout()
    first = run.prefill()
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(run.denoise_group(1, first))
        yield Result("no synchronization in a denoising step", None, ok=True)
    except RuntimeError as error:
        yield Result(f"synchronization in a denoising step: {error}".splitlines()[0], None, ok=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def check_memory_fallbacks(device: torch.device) -> Iterator[Result]:
    """Every fallback of the app gives the same video, and each part computes where the fallback says."""
    size: dict[str, Any] = dict(num_frames=9, num_inference_steps=2, height=128, width=128, seed=3, output_type="pt")
    with tempfile.TemporaryDirectory() as folder:
        manager = ModelManager(JobStore(Path(folder) / "jobs.sqlite3"))
        pipeline = manager.pipeline(None)
        pipeline.set_progress_bar_config(disable=True)
        expected = None
        for fallback in manager.memory_fallbacks(size["height"], size["width"]):
            manager.place(pipeline, fallback)
            seen: set[str] = set()
            hook = pipeline.vae.decoder.conv_out.register_forward_pre_hook(
                lambda module, args, seen=seen: seen.add(args[0].device.type))
            frames = pipeline(PROMPT, memory=fallback.memory, **size).frames
            hook.remove()
            expected = frames if expected is None else expected
            where = "cpu" if fallback.decode_on_cpu else device.type
            # Tiles are not exact; elsewhere only the device differs.
            limit = .5 if fallback.memory.tile else .02
            yield Result(f"frames, {fallback.effect}", deviation(frames, expected), limit=limit)
            yield Result(f"decodes on {where}, {fallback.effect}", None, ok=seen == {where})


TRAIN = ("windows.held_out=2", "model.hidden_size=48", "model.num_layers=2", "model.num_attention_heads=2",
         "sample.count=1", "sample.steps=2", "loop.micro_batch_size=2", "loop.save_every=2", "loop.log_every=1",
         "loop.evaluate_every=4", "windows.frames=9")


def check_training(device: torch.device) -> Iterator[Result]:
    """A training resumes bit for bit where it is deterministic; one rank in shards trains alike; bf16 stays finite."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rendered(root / "clips", 8, frames=17, size=32, seed=5)
        vae = load_autoencoder(DEMO_VAE).model.to(device)
        build_cache(root / "clips", root / "cache", vae, frames=[17], sizes=[(32, 32)], psnr_clips=0)

        def train(name: str, *settings: str) -> dict[str, Tensor]:
            """Train in a process of its own, as a user would; return the weights."""
            command = [sys.executable, "-m", "lvdm", "train", f"output={root / name}",
                       f"windows.cache={root / 'cache'}", *TRAIN, *settings]
            rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": "29511"} if "loop.sharding=full" in settings else {}
            cpu = {"ACCELERATE_USE_CPU": "1"} if device.type == "cpu" else {}
            done = subprocess.run(command, env={**os.environ, **rank, **cpu}, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"lvdm train failed: {done.stderr.strip().splitlines()[-1]}")
            return load_file(next((root / name / "pipeline" / "transformer").glob("*.safetensors")))

        exact = ("loop.steps=4", "loop.deterministic=true")
        whole = train("whole", *exact)
        shutil.rmtree(root / "whole" / "checkpoints" / "step-00000004")
        shutil.rmtree(root / "whole" / "pipeline")
        resumed = train("whole", *exact)
        yield Result("resumed is uninterrupted, bit for bit", None, ok=all(whole[k].equal(resumed[k]) for k in whole))
        sharded = train("sharded", "loop.steps=4", "loop.sharding=full", "loop.optimizer.name=adamw")
        plain = train("plain", "loop.steps=4", "loop.optimizer.name=adamw")
        worst = max(deviation(sharded[key], plain[key]) for key in plain)
        yield Result("one rank in shards, and without", worst, limit=1e-3)
        half = train("half", "loop.steps=4", "loop.mixed_precision=bf16")
        yield Result("bf16 weights are finite", None, ok=all(bool(x.isfinite().all()) for x in half.values()))


PARTS = (Part("vae", check_vae), Part("transformer", check_transformer), Part("rollout", check_rollout),
         Part("memory", check_memory_fallbacks), Part("training", check_training))
