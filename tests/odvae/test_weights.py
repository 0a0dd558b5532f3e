"""The shipped OD-VAE for natural footage: PSNR on rendered clips and, if available, on held-out footage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from odvae.convert.inflate import inflate
from odvae.data.synthetic import render, sample_scene
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import probe, read_clip
from odvae.inference.loading import load_vae
from odvae.metrics.psnr import psnr
from odvae.training.heldout import reconstruct
from odvae.weights import NATURAL_IMAGE_VAE, NATURAL_VAE

SHARED = Path(__file__).parents[2].parent / "shared" / "clips"
HELD_OUT = {"bikes.mp4": 28, "carphone_pristine.mp4": 28, "world.mp4": 33.5}  # dB


@pytest.fixture(scope="module")
def vae():
    return load_vae(NATURAL_VAE).eval()


def test_psnr_on_rendered_clips(vae):
    clips = torch.stack([to_tensor(render(sample_scene(99_000_000 + i), 17)) for i in range(8)])
    assert psnr(clips, reconstruct(vae, clips)).mean() > 30


@torch.inference_mode()
def test_the_shipped_image_vae_has_its_shape(vae):
    image = load_vae(NATURAL_IMAGE_VAE)
    inflated = inflate(image)
    assert {k: v.shape for k, v in inflated.state_dict().items()} == {k: v.shape for k, v in vae.state_dict().items()}
    clips = torch.stack([to_tensor(render(sample_scene(99_000_000 + i), 1)) for i in range(4)])
    assert psnr(clips, reconstruct(image, clips)).mean() > 30


@pytest.mark.skipif(not SHARED.is_dir(), reason="the natural clips are next to the checkout, not in it")
def test_psnr_on_held_out_footage_at_128x128(vae):
    for name, minimum in HELD_OUT.items():
        path = SHARED / name
        clip = to_tensor(resize_crop(read_clip(path, 0.0, 33, probe(path).frame_rate), 128, 128))[None]
        assert psnr(clip, reconstruct(vae, clip)).mean() > minimum, name
