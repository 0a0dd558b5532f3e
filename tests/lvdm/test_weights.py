"""The shipped weights do what the README says: small samples here, full counts in `make demo` and `make soak`."""

from __future__ import annotations

import pytest
import torch

from lvdm.evaluation.evaluate import prompt_accuracy
from lvdm.evaluation.scenes import scene_prompts
from lvdm.sampling.loading import default_pipeline
from lvdm.weights import DEMO_TRANSFORMER
from odvae.convert.inflate import inflate
from odvae.data.synthetic import render, sample_scene
from odvae.data.transforms import to_tensor
from odvae.inference.loading import load_decoder, load_vae
from odvae.metrics.psnr import psnr
from odvae.weights import DEMO_DECODER, DEMO_IMAGE_VAE, WEIGHTS

pytestmark = pytest.mark.xdist_group("weights")  # one process loads the weights


@pytest.fixture(scope="module")
def pipeline():
    return default_pipeline()


def test_the_shipped_weights_are_small():
    files = [*WEIGHTS.rglob("*.safetensors"), *DEMO_TRANSFORMER.glob("*.safetensors")]
    assert len(files) == 6 and sum(file.stat().st_size for file in files) < 40e6


@torch.inference_mode()
def test_the_shipped_odvae_reconstructs_unseen_clips(pipeline):
    clips = torch.stack([to_tensor(render(sample_scene(99_000_000 + i), 17)) for i in range(4)])
    assert psnr(clips, pipeline.vae(clips).sample).mean() > 30
    still = inflate(load_vae(DEMO_IMAGE_VAE)).eval()(clips[:, :, :1]).sample
    assert psnr(clips[:, :, :1], still).mean() > 30


@torch.inference_mode()
def test_the_shipped_decoder_loses_less_than_a_decibel(pipeline):
    clips = torch.stack([to_tensor(render(sample_scene(99_000_000 + i), 17)) for i in range(4)])
    latents = pipeline.vae.encode(clips).latent_dist.mode()
    decoder = load_decoder(DEMO_DECODER, pipeline.vae)
    own, fast = (float(psnr(clips, each.decode(latents).sample).mean()) for each in (pipeline.vae, decoder))
    assert fast > own - 1


def test_the_shipped_lvdm_follows_prompts(pipeline):
    """With a quarter of the default steps, which costs a quarter of the time."""
    assert prompt_accuracy(pipeline, 12, 17, steps=5).both >= 0.8
    assert prompt_accuracy(pipeline, 4, 81, steps=5).both >= 0.7


def test_48_scene_prompts_have_every_colour_in_every_direction():
    assert len({(colour, direction) for _, colour, direction, _ in scene_prompts(48)}) == 48


@pytest.mark.slow
def test_the_shipped_lvdm_follows_prompts_at_full_counts(pipeline):
    short = prompt_accuracy(pipeline, 48, 17).both
    assert short >= 0.9
    assert prompt_accuracy(pipeline, 48, 129).both >= 0.9 * short  # 8 times the training length
    long = prompt_accuracy(pipeline, 24, 81)
    assert long.both >= 0.85
    assert long.background >= 0.85 and long.contrast_kept == pytest.approx(1, abs=0.15)  # neither fades nor grows
