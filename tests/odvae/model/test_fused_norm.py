"""The fused group norm and SiLU: equal to the plain one in every type and layout, and chosen on CUDA alone."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from builders import random_video, tiny_vae
from triton_stand_in import modules

from odvae.model import fused_norm
from odvae.model.conv import CausalConv3d
from odvae.model.norm import ClipNorm, FrameNorm, norm_silu_pad

NAME = "odvae.model.norm_kernels"


@pytest.fixture(scope="module")
def kernels():
    """The kernels in Triton's interpreter, where the environment asks for it, else in the stand-in's."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") != "1":
            for name, module in modules().items():
                patch.setitem(sys.modules, name, module)
        yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture
def on_cuda(kernels, monkeypatch):
    """As on CUDA, but for the device."""
    monkeypatch.setattr(fused_norm, "_kernels", lambda: kernels)
    monkeypatch.setattr(fused_norm, "is_usable", lambda norm, x: not fused_norm._off)
    monkeypatch.setattr("odvae.model.norm.is_usable", lambda norm, x: not fused_norm._off)


def exact(x: torch.Tensor, norm: torch.nn.GroupNorm, per_frame: bool) -> torch.Tensor:
    frames = x.double().transpose(1, 2).flatten(0, 1) if per_frame else x.double()
    y = F.group_norm(frames, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return y.unflatten(0, (len(x), x.shape[2])).transpose(1, 2) if per_frame else y


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["channels last", "plain"])
# Triton's interpreter rounds to bfloat16 towards zero, a GPU to the nearest.
@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 4e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-11)], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("per_frame", "silu", "shape", "groups"), [
    (True, True, (2, 12, 3, 7, 5), 4),  # odd sides, channels that are no power of two
    (False, True, (2, 12, 3, 7, 5), 4),
    (True, False, (1, 160, 1, 3, 3), 32),  # two blocks of channels
])
@torch.no_grad()
def test_the_kernel_equals_the_exact_norm(kernels, layout, dtype, tolerance, per_frame, silu, shape, groups):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(groups, shape[1], eps=1e-6)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (torch.randn(shape) + 9).to(dtype).contiguous(memory_format=layout)  # far from zero: cancellation would show
    padded = torch.full((shape[0], shape[1], shape[2] + 2, *shape[3:]), 5.0, dtype=dtype)
    padded = padded.contiguous(memory_format=torch.channels_last_3d)
    kernels.group_norm(x, padded[:, :, 2:], norm.weight, norm.bias, groups, 1e-6, per_frame=per_frame, silu=silu)
    expected = exact(x, norm, per_frame)
    expected = F.silu(expected) if silu else expected
    torch.testing.assert_close(padded[:, :, 2:].double(), expected, rtol=tolerance, atol=3 * tolerance)
    assert (padded[:, :, :2] == 5).all(), "what is beside the output is untouched"


@torch.no_grad()
def test_a_frame_larger_than_a_program_and_a_stream_round_as_the_whole(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "MAX_SPLITS", 3)
    torch.manual_seed(0)
    norm, x = torch.nn.GroupNorm(2, 8, eps=1e-6), torch.randn(1, 8, 2, 9, 11)

    def run(part):
        out = torch.empty_like(part)
        kernels.group_norm(part, out, norm.weight, norm.bias, 2, 1e-6, per_frame=True, silu=True)
        return out

    whole = run(x)
    torch.testing.assert_close(whole.double(), F.silu(exact(x, norm, True)), rtol=1e-5, atol=1e-5)
    assert torch.equal(whole, torch.cat([run(frame) for frame in x.split(1, 2)], 2))


@pytest.mark.parametrize("kind", ["frame", "clip"])
@torch.no_grad()
def test_a_model_with_the_kernel_equals_the_plain_one(on_cuda, kind):
    vae = tiny_vae(norm=kind).eval()
    video = random_video(5)
    moments = vae.encode(video).latent_dist.parameters
    with fused_norm.plain_norms():
        torch.testing.assert_close(moments, vae.encode(video).latent_dist.parameters, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_kernel_that_fails_leaves_the_plain_norm_with_one_warning(on_cuda, kernels, monkeypatch, caplog):
    monkeypatch.setattr(fused_norm, "_off", [])
    monkeypatch.setattr(kernels, "group_norm", lambda *_, **__: 1 / 0)
    norm, conv, x = FrameNorm(2, 4), CausalConv3d(4, 4, 3, time_kernel=3), torch.randn(1, 4, 3, 4, 4)
    with caplog.at_level(logging.WARNING):
        first, again = (norm_silu_pad(norm, conv, x, None)[0] for _ in range(2))
    [record] = caplog.records
    assert torch.equal(first, again) and record.message.endswith("slower: ZeroDivisionError: division by zero")


def test_the_kernel_is_for_inference_on_cuda_only(monkeypatch, caplog):
    x = torch.randn(1, 4, 1, 4, 4)
    norm = ClipNorm(2, 4)
    with torch.no_grad():
        assert not fused_norm.is_usable(norm, x)
    monkeypatch.setitem(sys.modules, NAME, None)  # as where its import fails
    fused_norm._kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert fused_norm._kernels() is None is fused_norm._kernels()
    fused_norm._kernels.cache_clear()
    assert len(caplog.records) == 1 and "needs Triton" in caplog.text
