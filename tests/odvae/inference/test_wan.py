"""Wan's VAE with the interface of an OD-VAE: streamed in chunks it equals what diffusers computes."""

from __future__ import annotations

import diffusers
import pytest
import torch
from builders import random_video

from odvae.inference.fingerprint import vae_fingerprint
from odvae.inference.memory import memory_estimate
from odvae.inference.streaming import decode_stream, encode_stream
from odvae.inference.wan import AutoencoderKLWan, load_causal_vae
from odvae.utils.errors import UserError

TINY = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan")
    diffusers.AutoencoderKLWan(**TINY).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_streamed_is_what_diffusers_computes(folder):
    theirs, vae, x = diffusers.AutoencoderKLWan.from_pretrained(folder), load_causal_vae(folder), random_video(13)
    assert type(vae) is AutoencoderKLWan and vae_fingerprint(vae) == vae_fingerprint(theirs)
    expected = theirs.encode(x).latent_dist.mean
    z = torch.cat(list(encode_stream(vae, x.split([3, 6, 4], 2), frames=4)), 2)
    torch.testing.assert_close(z, expected)
    video = torch.cat(list(decode_stream(vae, z.split([1, 2, 1], 2))), 2)
    torch.testing.assert_close(video, theirs.decode(z).sample)
    torch.testing.assert_close(vae.denormalize(vae.normalize(z)), z)
    assert vae.latent_frames(13) == z.shape[2] == 4 and vae.spatial_compression_ratio == 8


def test_memory_is_estimated_and_tiles_are_refused(folder):
    vae = load_causal_vae(folder)
    assert memory_estimate(vae, "decode", 64, 64) > 64 * 64 * 3 * 4
    with pytest.raises(UserError, match="cannot stream in tiles"):
        vae.enable_tiling(64, 64)
