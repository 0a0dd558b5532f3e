"""Parts of `gpu.py` that measure speed and memory, beside models of diffusers in the same shape."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from gpu_results import Part, Result, peak_gib, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lvdm import LVDMTransformer3DModel
from lvdm.condition import Condition
from lvdm.model.presets import PRESETS
from lvdm.sampling.rollout import rollout
from odvae import AutoencoderKLODVAE
from odvae.cache import build_cache
from odvae.data.synthetic import write_rendered
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import read_clip
from odvae.inference.adapters import load_autoencoder
from odvae.model.compilation import compile_vae
from odvae.trainer.throughput import matmul_rate
from odvae.weights import NATURAL_VAE

TEXT = 77, 768  # tokens and width of the text
CHANNELS = 16  # of the latents
HALF = torch.bfloat16


def _rate(device: torch.device) -> float:
    """The measured FLOPs per second of a bfloat16 matrix product (float32 on a CPU)."""
    return matmul_rate(device, HALF if device.type != "cpu" else torch.float32)


def _ours(preset: str) -> nn.Module:
    return LVDMTransformer3DModel.from_preset(preset, in_channels=CHANNELS, text_dim=TEXT[1])


def _wan(preset: str) -> nn.Module:
    """Wan's transformer of the same width, depth and heads."""
    width, depth, heads = PRESETS[preset].values()
    return WanTransformer3DModel(in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT[1], num_layers=depth,
                                 num_attention_heads=heads, attention_head_dim=width // heads, ffn_dim=4 * width)


def _training_step(model: nn.Module, z: Tensor) -> Callable[[], None]:
    """Return a step on latents (B, c, t, h, w): forward, backward and the optimizer's."""
    text = torch.randn(z.shape[0], *TEXT, device=z.device)
    frames = (z.shape[2],) if isinstance(model, LVDMTransformer3DModel) else ()  # it has a timestep for each
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=z.device.type == "cuda")

    def step() -> None:
        timestep = torch.rand(z.shape[0], *frames, device=z.device)
        with torch.autocast(z.device.type, HALF, enabled=z.device.type != "cpu"):
            loss = (model(z, timestep, text).sample.float() - z).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_training(device: torch.device) -> Iterator[Result]:
    """Training steps of each preset, beside Wan's transformer in the same shape and on the same latents."""
    rate = _rate(device)
    yield Result("matrix product", rate / 1e12, "TFLOP/s")
    shapes = {"130m": (4, 21, 32, 32), "400m": (2, 21, 32, 32), "1.4b": (1, 21, 60, 104)}
    if device.type == "cpu":
        shapes = {"5m": (1, 3, 8, 8)}
    for preset, (batch, frames, height, width) in shapes.items():
        tokens = batch * frames * height * width // 4
        for name, make in ("ours", _ours), ("Wan", _wan):
            with torch.device(device):
                model = make(preset).train()
            if preset == "1.4b":
                model.enable_gradient_checkpointing()
            step = _training_step(model, torch.randn(batch, CHANNELS, frames, height, width, device=device))
            peak, duration = peak_gib(step, device), seconds(step, device)
            label = f"{preset}, {tokens} tokens, {name}"
            yield Result(label, tokens / duration, "tokens/s")
            if isinstance(model, LVDMTransformer3DModel):
                flops = 3 * model.flops(batch, frames, height, width, TEXT[0])
                yield Result(f"{label}, MFU", flops / duration / rate, "of the product")
            if peak is not None:
                yield Result(f"{label}, peak", peak, "GiB")
            del model, step


def _flops(call: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return int(counter.get_total_flops())


@torch.no_grad()
def measure_vae(device: torch.device) -> Iterator[Result]:
    """Frames a second of the VAE at the paper's width, plain, fused, and on a GPU compiled too, beside Wan's; in
    bfloat16."""
    dtype = HALF if device.type != "cpu" else torch.float32
    rate, small = _rate(device), device.type == "cpu"
    with torch.device(device):
        ours = AutoencoderKLODVAE(**({"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4} if small else {}))
        wan = AutoencoderKLWan(**({"base_dim": 8, "dim_mult": [1, 1, 2, 2]} if small else {}))
    ours, wan = ours.eval().to(dtype), wan.eval().to(dtype)
    sizes = [(32, 32)] if small else [(256, 256), (512, 512), (720, 1280)]
    frames = 5 if small else 17
    variants: dict[str, Callable[[], None]] = {"": ours.unfuse, ", fused": ours.fuse}
    if not small:
        variants[", compiled"] = lambda: compile_vae(ours)
    for variant, change in variants.items():
        change()
        for height, width in sizes:
            x = torch.rand(1, 3, frames, height, width, device=device, dtype=dtype) * 2 - 1
            z = torch.randn(1, 4, (frames + 3) // 4, height // 8, width // 8, device=device, dtype=dtype)
            for name, call in (("encode", lambda x=x: ours.encode(x).latent_dist.mean),
                               ("decode", lambda z=z: ours.decode(z).sample)):
                label = f"{name} {height}x{width}{variant}"
                time_, peak = seconds(call, device), peak_gib(call, device)
                yield Result(label, frames / time_, "frames/s")
                if not variant:  # fused layers skip products that the plain ones compute
                    yield Result(f"{label}, of the matrix product", _flops(call) / time_ / rate, "")
                if peak is not None:
                    yield Result(f"{label}, peak", peak, "GiB")
    for height, width in sizes:
        x = torch.rand(1, 3, frames, height, width, device=device, dtype=dtype) * 2 - 1
        z = torch.randn(1, wan.config.z_dim, (frames + 3) // 4, height // 8, width // 8, device=device, dtype=dtype)
        for name, call in (("encode", lambda x=x: wan.encode(x)), ("decode", lambda z=z: wan.decode(z))):
            yield Result(f"Wan: {name} {height}x{width}", frames / seconds(call, device), "frames/s")


@torch.no_grad()
def measure_rollout(device: torch.device) -> Iterator[Result]:
    """Video seconds a second of the 130m preset at 64x64 pixels, 20 steps with guidance."""
    preset, latents, steps = ("5m", 3, 2) if device.type == "cpu" else ("130m", 11, 20)
    with torch.device(device):
        model = LVDMTransformer3DModel.from_preset(preset, in_channels=CHANNELS, text_dim=TEXT[1])
    model = model.eval().to(HALF if device.type != "cpu" else torch.float32)
    texts = [Condition(torch.randn(1, *TEXT, device=device, dtype=model.dtype)) for _ in range(2)]
    video = (1 + 4 * (latents - 1)) / model.config.frame_rate

    def sample(use_cache: bool) -> None:
        list(rollout(model, *texts, latents=latents, height=8, width=8, seeds=[0], num_inference_steps=steps,
                     use_cache=use_cache))

    for label, use_cache in ("with KV cache", True), ("without KV cache", False):
        yield Result(f"{preset}, {label}", video / seconds(lambda c=use_cache: sample(c), device, 6),
                     "video seconds/s")
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True)
        start = time.perf_counter()
        sample(True)
        yield Result(f"{preset}, compiling", time.perf_counter() - start, "s")
        yield Result(f"{preset}, compiled", video / seconds(lambda: sample(True), device, 6), "video seconds/s")


def measure_cache(device: torch.device) -> Iterator[Result]:
    """A cache build from files, against the encoder alone on the same clips from memory."""
    clips, frames, side, batch = (4, 9, 32, 2) if device.type == "cpu" else (96, 33, 256, 8)
    vae = load_autoencoder(NATURAL_VAE).model.to(device)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "videos"
        paths = write_rendered(source, clips, frames=frames, size=side)
        videos = [resize_crop(read_clip(path, 0, frames, 8.0), side, side) for path in paths]

        @torch.inference_mode()
        def bare() -> None:
            for i in range(0, clips, batch):
                x = torch.stack([to_tensor(video) for video in videos[i : i + batch]]).to(device, vae.dtype)
                vae.encode(x).latent_dist.mean.half().cpu()

        alone = clips / seconds(bare, device)
        summary = build_cache(source, Path(folder) / "cache", vae, frames=[frames], batch=batch, sizes=[(side, side)],
                              psnr_clips=0)
        built = summary.done / summary.encode_seconds
    yield Result("encoder alone", alone * frames, "frames/s")
    yield Result("cache build", built * frames, "frames/s")
    yield Result("cache build, of the encoder's rate", built / alone, "")


PARTS = (Part("training_speed", measure_training), Part("vae_speed", measure_vae),
         Part("rollout_speed", measure_rollout), Part("cache_speed", measure_cache))
