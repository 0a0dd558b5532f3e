"""Latents held to those of an earlier VAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import random_video, tiny_vae
from diffusers import AutoencoderKL

from odvae.losses.anchor import Anchor
from odvae.runtime.errors import UserError
from odvae.train import load_vae, make_anchor, train

from .test_train import config


def test_only_clips_of_its_folder_are_held(tmp_path):
    earlier, later = tiny_vae(seed=0), tiny_vae(seed=1)
    x = random_video(5, 3, 16)
    mean = later.encode(x).latent_dist.mean
    paths = [tmp_path / "held/a.mp4", tmp_path / "free/b.mp4", tmp_path / "held/sub/c.mp4"]
    distance = Anchor(earlier, tmp_path / "held")(x, paths, later, mean)
    expected = (mean - earlier.encode(x).latent_dist.mean)[[0, 2]].square().mean()  # its statistics are 0 and 1
    torch.testing.assert_close(distance, expected)
    assert Anchor(earlier, None)(x, paths, earlier, earlier.encode(x).latent_dist.mean) < 1e-10
    assert Anchor(later, tmp_path / "free")(x[:1], paths[:1], later, mean[:1]) == 0


def test_an_image_vae_is_held_frame_by_frame():
    earlier = tiny_vae(seed=0)
    image = AutoencoderKL(latent_channels=earlier.latent_channels, block_out_channels=(8, 8), norm_num_groups=4,
                          down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    x = random_video(3, 2, 16)
    frames = x.movedim(2, 1).flatten(0, 1)
    latents = earlier.encode(frames[:, :, None]).latent_dist.mean.squeeze(2)
    assert Anchor(earlier, None)(x, [Path("a"), Path("b")], image, latents) < 1e-10
    shifted = Anchor(earlier, None)(x, [Path("a"), Path("b")], image, latents + 2)
    assert float(shifted) == pytest.approx(4, rel=1e-4)


def test_training_with_an_anchor_keeps_the_language_of_the_earlier_vae(clips, tmp_path):
    steps = ["loop.steps=40", "loop.evaluate_every=100", "loop.save_every=100", "loop.ema_decay=0.5"]
    train(config(tmp_path / "earlier", clips, "loop.steps=4", "loop.seed=1"))
    earlier = load_vae(tmp_path / "earlier/vae")
    anchor = [f"loss.anchor.vae={tmp_path}/earlier/vae", "loss.anchor.weight=3"]
    x = random_video(5, 1, 32, 32)

    def far(run: str) -> float:
        vae = load_vae(tmp_path / run / "vae")
        a, b = (earlier.normalize(one.encode(x).latent_dist.mean) for one in (vae, earlier))
        return float((a - b).square().mean())

    train(config(tmp_path / "free", clips, *steps))
    train(config(tmp_path / "held", clips, *steps, *anchor))
    assert far("held") < .5 * far("free")
    held = load_vae(tmp_path / "held/vae").config
    assert (held.latents_mean, held.latents_std) == (earlier.config.latents_mean, earlier.config.latents_std)


def test_an_anchor_that_cannot_hold_is_refused(clips, tmp_path):
    settings = config(tmp_path / "run", clips, "loss.anchor.weight=1")
    with pytest.raises(UserError, match=r"loss\.anchor\.vae a folder"):
        make_anchor(settings.loss.anchor, tiny_vae())
    tiny_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    settings = config(tmp_path / "run", clips, "loss.anchor.weight=1", f"loss.anchor.vae={tmp_path}/vae")
    with pytest.raises(UserError, match="other channels or ratios"):
        make_anchor(settings.loss.anchor, tiny_vae(latent_channels=4))
