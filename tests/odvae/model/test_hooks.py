"""Hooks of diffusers and accelerate on the VAE: its fast paths step aside, and the values stay."""

import pytest
import torch
from accelerate import cpu_offload
from builders import random_video, tiny_vae

from odvae import AutoencoderKLODVAE
from odvae.utils.errors import UserError

CPU = torch.device("cpu")
OFFLOADS = {
    "sequential": lambda vae, folder: cpu_offload(vae, CPU, offload_buffers=True),
    "leaves": lambda vae, folder: vae.enable_group_offload(CPU),
    "leaves on disk": lambda vae, folder: vae.enable_group_offload(CPU, offload_to_disk_path=str(folder)),
}


def code(vae, video):
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mean
        return latents, vae.decode(latents).sample


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("time_sampling", ["joint", "residual"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_keeps_the_values(offload, time_sampling, tmp_path, monkeypatch):
    monkeypatch.setattr("odvae.model.norm.LARGE_FRAME", 64)  # norms read their weights
    vae, video = tiny_vae(time_sampling=time_sampling), random_video(9)
    vae.fuse()
    expected = code(vae, video)
    OFFLOADS[offload](vae, tmp_path)
    for _ in range(2):
        assert_same(code(vae, video), expected)


def test_a_part_on_disk(tmp_path):
    vae, video = tiny_vae(), random_video(9)
    vae.save_pretrained(tmp_path)
    size = sum(parameter.nbytes for parameter in vae.parameters())
    loaded = AutoencoderKLODVAE.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": size // 2},
                                                offload_folder=str(tmp_path))
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert_same(code(loaded, video), code(vae, video))


def test_layerwise_casting():
    """Convs are stored in half precision and compute in single precision."""
    vae, expected, video = tiny_vae(), tiny_vae(), random_video(5)
    vae.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    stored = {name for name, parameter in vae.named_parameters() if parameter.dtype == torch.float16}
    assert "decoder.conv_out.weight" in stored and not any("norm" in name for name in stored)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name in stored:
                parameter.copy_(parameter.half())
    assert vae.dtype == torch.float32
    assert_same(code(vae, video), code(expected, video))


def test_offloading_by_block_is_refused():
    with pytest.raises(UserError, match=r"leaf_level.* only; leave it out"):
        tiny_vae().enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
