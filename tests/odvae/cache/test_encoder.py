"""Any autoencoder of diffusers in a build; clips too long for one piece; models without a posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLWan, VQModel
from tiny_cache import SHAPE, tiny_vae, write_noise

from odvae.cache import LatentCache, build_cache
from odvae.cache.build import shard_encoder
from odvae.cache.build.builder import make_header
from odvae.cache.build.decode_pool import DecodePool
from odvae.cache.build.settings import BuildSettings
from odvae.cache.cli import vae_of
from odvae.cache.encoder import LatentEncoder
from odvae.cache.format import read_header, write_header
from odvae.cli import main, parser
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import VideoError, read_clip
from odvae.inference.adapters import AutoencoderAdapter
from odvae.inference.fingerprint import vae_fingerprint
from odvae.inference.loading import load_vae
from odvae.inference.streaming import encode_groups
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import UserError
from odvae.utils.storage import LocalStorage
from odvae.weights import DEMO_VAE, NATURAL_VAE


def image_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                         up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, layers_per_block=1).eval()


def wan() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, attn_scales=[],
                            temperal_downsample=[False, True, True]).eval()


def deep_compression() -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(encoder_block_types="ResBlock", decoder_block_types="ResBlock", latent_channels=4,
                         encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                         encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
                         encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ())).eval()


def vector_quantized() -> VQModel:
    torch.manual_seed(0)
    return VQModel(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                   up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, num_vq_embeddings=16).eval()


@pytest.mark.parametrize(("make", "shape"), [(image_vae, [4, 5, 8, 8]), (wan, [4, 2, 2, 2])])
def test_any_autoencoder(make: Any, shape: list[int], tmp_path: Path) -> None:
    """Of an image VAE each frame has its latent; mean and log-variance where asked."""
    write_noise(tmp_path / "v" / "clip.mp4")
    vae = make()
    summary = build_cache(tmp_path / "v", tmp_path / "cache", vae, store="moments", dtype="float32", **SHAPE)
    assert summary.done == 1 and summary.psnr is not None
    cache = LatentCache(tmp_path / "cache", make())
    x = to_tensor(resize_crop(read_clip(tmp_path / "v/clip.mp4", 0, 5, 8.0), 16, 16))[None]
    with torch.inference_mode():
        if make is image_vae:
            said = vae.encode(x[0].transpose(0, 1)).latent_dist
            mean, logvar = said.mean.transpose(0, 1), said.logvar.transpose(0, 1)
        else:
            said = vae.encode(x).latent_dist
            mean, logvar = said.mean[0], said.logvar[0]
    assert list(cache.entry(0).shape) == list(cache.shapes[0]) == shape
    assert torch.allclose(cache.entry(0), mean, atol=1e-5)
    assert torch.allclose(cache.stored(0), torch.cat([mean, logvar]), atol=1e-4)
    assert LatentEncoder(vae).decode(cache.entry(0), 5, 16, 16).shape == (1, 3, 5, 16, 16)
    with pytest.raises(UserError, match=r"vae\.kind"):
        LatentCache(tmp_path / "cache", tiny_vae())


def test_sizes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_noise(tmp_path / "v" / "clip.mp4")
    with pytest.raises(UserError, match="the next that does is 9 frames of 16x16"):
        build_cache(tmp_path / "v", tmp_path / "cache", wan(), **SHAPE | {"frames": [6]})


@pytest.mark.parametrize("make", [image_vae, wan])
def test_chunks_of_a_long_clip_give_the_latents_of_the_whole(make: Any) -> None:
    video = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = LatentEncoder(make(), "moments")
    whole = encoder.encode(video)
    assert whole.shape[1] == 8
    assert torch.allclose(encoder.encode_chunks(video.split([4, 4, 1], 2)), whole, atol=1e-5)


@pytest.mark.parametrize("make", [deep_compression, vector_quantized])
def test_a_model_without_a_posterior_stores_its_latents_as_they_are(make: Any, tmp_path: Path) -> None:
    write_noise(tmp_path / "v" / "clip.mp4")
    vae = make()
    assert build_cache(tmp_path / "v", tmp_path / "cache", vae, dtype="float32", **SHAPE).done == 1
    cache = LatentCache(tmp_path / "cache", vae)
    assert cache.entry(0).shape[:2] == (4, 5) and cache.entry(0).std() > 0
    with pytest.raises(UserError, match="has no posterior; store its latents with --store mean"):
        build_cache(tmp_path / "v", tmp_path / "moments", vae, store="moments", **SHAPE)


def test_a_model_whose_latents_have_no_known_width_is_refused() -> None:
    vae = image_vae()
    vae.register_to_config(latent_channels=None)
    with pytest.raises(UserError, match="AutoencoderKL has neither latent_channels nor z_dim"):
        LatentEncoder(vae)


@pytest.fixture
def two_videos(tmp_path: Path) -> Path:
    write_noise(tmp_path / "v" / "good.mp4", 0, 5)
    write_noise(tmp_path / "v" / "long.mp4", 1, 18)
    return tmp_path / "v"


def test_a_long_clip_that_fails_midway_is_set_aside(two_videos: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is stored, and the build goes on."""
    decode_frames = DecodePool.decode_frames

    def failing(self: DecodePool, ref: Any, *, start: float, **arguments: Any) -> Any:
        if start > 1:
            raise VideoError(f"{ref} cannot be decoded beyond frame 9", "encode it again", "corrupt")
        return decode_frames(self, ref, start=start, **arguments)

    monkeypatch.setattr(DecodePool, "decode_frames", failing)
    monkeypatch.setattr(shard_encoder, "LONG_BYTES", 12 * 10 * 16 * 16)
    monkeypatch.setattr(shard_encoder, "CHUNK_BYTES", 3 * 4 * 16 * 16)
    summary = build_cache(two_videos, tmp_path / "cache", image_vae(), clips="whole", **SHAPE)
    assert [(entry.path, entry.kind) for entry in summary.set_aside] == [("long.mp4", "corrupt")]
    assert summary.done == 1 and LatentCache(tmp_path / "cache").column("path").to_pylist() == ["good.mp4"]


def test_a_length_that_the_model_does_not_take_is_set_aside(two_videos: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of whole files are not known before; a model that works in tiles takes only some."""
    padded_size = AutoencoderAdapter.padded_size
    monkeypatch.setattr(AutoencoderAdapter, "padded_size", lambda self, frames, height, width: padded_size(
        self, 24 if frames > 5 else frames, height, width))
    summary = build_cache(two_videos, tmp_path / "cache", image_vae(), clips="whole", **SHAPE)
    assert summary.done == 1
    (entry,) = summary.set_aside
    assert entry.kind == "size" and "long.mp4: 18 frames of 16x16 do not fit AutoencoderKL" in entry.reason


@pytest.mark.parametrize("stored", ["mean", "moments"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_long_clip_is_streamed_or_by_a_vae_that_is_not_causal_tiled_in_time(causal, stored):
    torch.manual_seed(0)
    public = {} if causal else {"norm": "clip", "upsample": "trilinear"}
    vae = AutoencoderKLODVAE(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, patch_size=2,
                             **public).eval()
    assert vae.causal is causal
    encoder, video = LatentEncoder(vae, stored), torch.rand(1, 3, 61, 16, 16)
    latents = encoder.encode_chunks(video.split(7, dim=2))
    expected = encoder.encode(video) if causal else encode_groups(vae, video, group=29, moments=stored == "moments")
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)


def test_a_cache_has_one_precision_which_auto_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("odvae.utils.precision.cpu_supports", lambda dtype: True)
    vae, source, cache = tiny_vae(), tmp_path / "source", tmp_path / "cache"
    vae.save_pretrained(tmp_path / "vae")
    source.mkdir()
    write_noise(source / "a.mp4")

    def build(*more: str) -> tuple[int, str]:
        status = main(["cache", "build", str(source), str(cache), "--vae", str(tmp_path / "vae"), "--frames", "5",
                       "--size", "16", "16", "--workers", "1", *more])
        return status, "".join(capsys.readouterr())

    status, said = build("--dtype", "bfloat16")
    assert status == 0 and "warning: the VAE reconstructs these videos at" in said
    header = read_header(cache)
    assert (header.vae.precision, header.vae.fingerprint) == ("bfloat16", vae_fingerprint(vae)), "of float32 weights"
    write_noise(source / "b.mp4", 1)
    status, said = build("--dtype", "float32")
    assert status == 2 and "vae.precision: bfloat16 in the cache, float32 now" in said
    assert build()[0] == 0  # auto: as the cache is
    opened = LatentCache(cache, vae)
    assert len(opened) == 2
    x = to_tensor(resize_crop(read_clip(source / "b.mp4", 0, 5, 8.0), 16, 16))[None]
    b = opened.column("path").to_pylist().index("b.mp4")
    expected = LatentEncoder(tiny_vae(), precision="bfloat16").encode(x)[0]
    assert torch.equal(opened.entry(b), expected.to(torch.float16))
    assert main(["cache", "show", str(cache), str(tmp_path / "a.png")]) == 2
    assert "pass --vae" in capsys.readouterr().err


@pytest.mark.parametrize("folder", [NATURAL_VAE, DEMO_VAE], ids=["natural", "demo"])
def test_the_shipped_vae_of_a_cache_is_found(tmp_path: Path, folder: Path) -> None:
    arguments = parser().parse_args(["cache", "build", "videos", str(tmp_path)])
    assert vae_of(arguments) == str(NATURAL_VAE), "of a new cache"
    write_header(LocalStorage(tmp_path), make_header(LatentEncoder(load_vae(folder)), BuildSettings()))
    assert vae_of(arguments) == vae_of(parser().parse_args(["cache", "show", str(tmp_path)])) == str(folder)
