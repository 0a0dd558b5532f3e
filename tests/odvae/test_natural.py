"""The OD-VAE for natural footage: rendered clips, and footage that it has never seen where there is some."""

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
from odvae.training.train import reconstruct
from odvae.weights import NATURAL_IMAGE_VAE, NATURAL_VAE

SHARED = Path(__file__).parents[2].parent / "shared" / "clips"
UNSEEN = {"bikes.mp4": 28, "carphone_pristine.mp4": 28, "world.mp4": 33.5}  # dB; held out


@pytest.fixture(scope="module")
def vae():
    return load_vae(NATURAL_VAE).eval()


def test_it_still_knows_rendered_clips(vae):
    clips = torch.stack([to_tensor(render(sample_scene(99_000_000 + i), 17)) for i in range(8)])
    assert psnr(clips, reconstruct(vae, clips)).mean() > 30


@torch.inference_mode()
def test_it_was_inflated_from_an_image_vae_of_the_same_shape(vae):
    image = load_vae(NATURAL_IMAGE_VAE)
    inflated = inflate(image)
    assert {k: v.shape for k, v in inflated.state_dict().items()} == {k: v.shape for k, v in vae.state_dict().items()}
    clips = torch.stack([to_tensor(render(sample_scene(99_000_000 + i), 1)) for i in range(4)])
    assert psnr(clips, reconstruct(image, clips)).mean() > 30


@pytest.mark.skipif(not SHARED.is_dir(), reason="the natural clips lie beside the checkout; a fresh machine has none")
def test_natural_footage_it_has_never_seen_at_128x128(vae):
    for name, least in UNSEEN.items():
        path = SHARED / name
        clip = to_tensor(resize_crop(read_clip(path, 0.0, 33, probe(path).frame_rate), 128, 128))[None]
        assert psnr(clip, reconstruct(vae, clip)).mean() > least, name
