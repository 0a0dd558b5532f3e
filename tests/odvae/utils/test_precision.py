"""Half precision is used only on CPUs with instructions for it; Muon computes in float32 on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from torch import nn

from odvae import AutoencoderKLODVAE
from odvae.cache.encoder import LatentEncoder
from odvae.data.synthetic import render, sample_scene
from odvae.data.transforms import to_tensor
from odvae.inference.loading import load_vae
from odvae.metrics.psnr import psnr
from odvae.trainer.config import LoopConfig, start_run
from odvae.trainer.optim import Muon, orthogonalize
from odvae.utils import precision
from odvae.utils.config import Config, load_config
from odvae.utils.errors import UserError
from odvae.utils.precision import (
    compute_dtype,
    compute_precision,
    precision_of,
    resolve_precision,
    set_precision,
    upcast_unsupported,
)
from odvae.utils.precision_names import PRECISIONS
from odvae.weights import NATURAL_VAE

TINY = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture(params=[False, True], ids=["plain CPU", "CPU with half precision"])
def has_half(request, monkeypatch) -> bool:
    monkeypatch.setattr(precision, "cpu_supports", lambda dtype: request.param)
    return request.param


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_a_cpu_with_avx2_computes_in_float32():
    """The capabilities of a newer CPU are restricted by environment variables."""
    code = ("import torch; from odvae.utils.precision import *; "
            "print(compute_dtype(torch.bfloat16, 'cpu'), compute_dtype(torch.float16, 'cpu'), "
            "compute_dtype(torch.float16, 'cuda'), compute_precision('bf16', 'cpu'), compute_precision('no', 'cpu'))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert result.stdout.split() == ["torch.float32", "torch.float32", "torch.float16", "no", "no"]
    assert "bf16 training: this CPU has no instructions for bfloat16" in result.stderr


def test_half_precision_falls_back_to_float32_on_a_plain_cpu(has_half):
    half = torch.bfloat16 if has_half else torch.float32
    assert compute_dtype(torch.bfloat16, "cpu") is half
    assert compute_precision("bf16", "cpu") == ("bf16" if has_half else "no")
    assert compute_dtype(torch.bfloat16, "cuda") is torch.bfloat16
    assert compute_dtype(torch.float64, "cpu") is torch.float64


def test_auto_is_bfloat16_on_an_accelerator_and_float32_on_a_cpu(has_half):
    half = (lambda name: name) if has_half else (lambda name: "float32")
    assert [resolve_precision(name, "cpu") for name in PRECISIONS] == [
        "float32", "float32", "float32", half("bfloat16"), half("float16")]
    assert [resolve_precision(name, "cuda") for name in PRECISIONS] == ["bfloat16", *PRECISIONS[1:]]
    assert (compute_precision("auto", "cpu"), compute_precision("auto", "cuda")) == ("no", "bf16")


class Run(Config):
    loop: LoopConfig = LoopConfig()


def test_a_run_that_auto_began_in_one_precision_is_not_resumed_in_another(tmp_path, monkeypatch):
    start_run(tmp_path, Run())
    assert load_config(Run, tmp_path / "config.yaml", []).loop.mixed_precision == "no"
    monkeypatch.setattr("odvae.trainer.config.latest_checkpoint", lambda folder: folder / "step-00000001")
    start_run(tmp_path, Run())
    monkeypatch.setattr("odvae.trainer.config.best_device", lambda: torch.device("cuda"))
    with pytest.raises(UserError, match=r"loop\.mixed_precision: 'no' there, 'bf16' here"):
        start_run(tmp_path, Run())


@torch.no_grad()
def test_bfloat16_costs_the_natural_vae_at_most_a_twentieth_of_a_decibel(monkeypatch):
    monkeypatch.setattr(precision, "cpu_supports", lambda dtype: True)  # emulated where it must be
    vae, video = load_vae(NATURAL_VAE).eval(), to_tensor(render(sample_scene(99_000_000), 5))[None]
    quality = {}
    for name in "float32", "bfloat16":
        assert set_precision(vae, name) == precision_of(vae) == name
        quality[name] = float(psnr(video, vae(video.to(vae.dtype)).sample.float()).mean())
    assert quality["float32"] > 25 and abs(quality["float32"] - quality["bfloat16"]) < .05, quality


def test_weights_in_half_precision_are_upcast_on_a_plain_cpu(has_half):
    torch.manual_seed(0)
    vae = AutoencoderKLODVAE(**TINY)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    exact = LatentEncoder(AutoencoderKLODVAE.from_config(vae.config)).model
    nn.Module.to(vae, torch.bfloat16)
    exact.load_state_dict(vae.state_dict())  # the same rounded weights, in float32
    latents = LatentEncoder(vae.eval()).encode(video)
    assert latents.dtype is vae.dtype is (torch.bfloat16 if has_half else torch.float32)
    if not has_half:
        torch.testing.assert_close(latents, LatentEncoder(exact.eval()).encode(video), rtol=0, atol=0)


@pytest.mark.parametrize("by", ["model", "sequential", "groups"])
def test_offloaded_weights_keep_their_precision(has_half, by):
    """They are on the CPU, but run on an accelerator."""
    part = nn.Sequential(nn.Linear(2, 2)).to(torch.bfloat16)
    if by == "groups":
        apply_group_offloading(part, torch.device("cpu"), offload_type="leaf_level")
    else:
        {"model": cpu_offload_with_hook, "sequential": cpu_offload}[by](part, torch.device("cpu"))
    before = {tensor.dtype for tensor in part.state_dict().values()}
    upcast_unsupported([part, None, nn.ReLU()])
    assert {tensor.dtype for tensor in part.state_dict().values()} == before == {torch.bfloat16}


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (8, 8), (1, 5), (5, 1)])
def test_orthogonalize_maps_singular_values_by_muons_polynomial(shape):
    generator = torch.Generator().manual_seed(3)
    for matrix in (torch.randn(shape, generator=generator), torch.randn(shape[0], 1, generator=generator) * 1e-4
                   @ torch.randn(1, shape[1], generator=generator), torch.zeros(shape)):
        u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        values = values / values.square().sum().sqrt().clamp(min=1e-7)
        for _ in range(4):
            values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
        torch.testing.assert_close(orthogonalize(matrix, 4).double(), (u * values) @ v, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (8, 8)])
def test_muon_equals_torchs_except_for_its_bfloat16(shape):
    """On matrices, as torch's takes no others; a kernel is treated as a matrix."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(5)]
    ours, theirs = nn.Parameter(start.clone().unflatten(1, (-1, 1, 1, 2))), nn.Parameter(start.clone())
    optimizers = [Muon([ours], lr=0.02, weight_decay=0.1),
                  torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, ns_steps=4, adjust_lr_fn="match_rms_adamw")]
    for grad in grads:
        ours.grad, theirs.grad = grad.view(ours.shape).clone(), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).abs().max()
    torch.testing.assert_close(ours.detach().flatten(1), theirs.detach(), rtol=0, atol=0.02 * float(moved))
