"""Autoencoder adapters, metrics with known values, and `odvae evaluate`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from odvae.cli import main
from odvae.data.video.reader import probe
from odvae.evaluate import evaluate, label_models, quality
from odvae.inference.adapters import AutoencoderAdapter, load_autoencoder
from odvae.inference.loading import load_vae
from odvae.metrics.feature_extractors import FeatureExtractors
from odvae.model import AutoencoderKLODVAE
from odvae.utils.errors import UserError

# name: class, config, (time, space), chunk
TINY = {
    "image": ("AutoencoderKL", {"down_block_types": ["DownEncoderBlock2D"] * 3, "latent_channels": 4,
                                "up_block_types": ["UpDecoderBlock2D"] * 3, "block_out_channels": [4, 4, 8],
                                "norm_num_groups": 2}, (1, 4), 0),
    "folded": ("AutoencoderKL", {"block_out_channels": [4], "norm_num_groups": 2, "in_channels": 12,
                                 "out_channels": 12}, (1, 2), 0),
    "temporal": ("AutoencoderKLTemporalDecoder", {"down_block_types": ["DownEncoderBlock2D"] * 2,
                                                  "block_out_channels": [32, 32], "latent_channels": 4}, (1, 2), 0),
    "cogvideox": ("AutoencoderKLCogVideoX", {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4,
                                             "layers_per_block": 1, "norm_num_groups": 2}, (4, 8), 8),
    "wan": ("AutoencoderKLWan", {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
                                 "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, (4, 8), 4),
    "ltx": ("AutoencoderKLLTXVideo", {"latent_channels": 8, "block_out_channels": [8, 8, 8, 8],
                                      "decoder_block_out_channels": [8, 8, 8, 8], "layers_per_block": [1] * 5,
                                      "decoder_layers_per_block": [1] * 5}, (8, 32), 8),
    "hunyuan": ("AutoencoderKLHunyuanVideo", {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8],
                                              "layers_per_block": 1, "norm_num_groups": 2}, (4, 8), 12),
    "mochi": ("AutoencoderKLMochi", {"latent_channels": 4, "encoder_block_out_channels": [32] * 4,
                                     "decoder_block_out_channels": [32] * 4, "layers_per_block": [1] * 5,
                                     "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, (6, 8), 6),
    "allegro": ("AutoencoderKLAllegro", {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8],
                                         "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 128}, (4, 8), 16),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model of TINY with random weights, saved."""
    root = tmp_path_factory.mktemp("autoencoders")
    for name, (cls, config, *_) in TINY.items():
        torch.manual_seed(0)
        getattr(diffusers, cls)(**config).save_pretrained(root / name)
    return {name: root / name for name in TINY}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "allegro")) for name in TINY])
def test_any_autoencoder_takes_any_video(name, folders):
    cls, _, ratios, chunk = TINY[name]
    adapter = load_autoencoder(str(folders[name]))
    assert type(adapter.model).__name__ == cls
    assert ((adapter.temporal_compression, adapter.spatial_compression), adapter.chunk) == (ratios, chunk)
    for size in ((1, 32, 32), (14, 34, 46)):
        video = torch.rand(1, 3, *size) * 2 - 1
        latents = adapter.encode(video)
        decoded = adapter.decode(latents, *size)
        assert decoded.shape == video.shape and decoded.isfinite().all()
        frames, height, width = adapter.padded_size(*size)
        assert frames >= size[0] and height >= size[1] and width >= size[2]
        assert latents.shape[-2:] == (height // adapter.spatial_compression, width // adapter.spatial_compression)
        assert adapter.padded_size(frames, height, width) == (frames, height, width)


def test_the_adapter_of_an_od_vae_equals_the_model(vae_folder):
    adapter = load_autoencoder(str(vae_folder))
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(adapter.decode(adapter.encode(video), 9, 32, 32), adapter.model(video).sample, atol=1e-6)
    assert adapter.chunk_starts(9) == [1, 5]  # its groups: 0 | 1 2 3 4 | 5 6 7 8


def test_chunk_starts_follow_the_loops_of_diffusers(folders):
    """CogVideoX's first chunk takes the remainder, HunyuanVideo's tiles start every 12 frames."""
    adapter = load_autoencoder(str(folders["cogvideox"]))
    assert adapter.chunk_starts(33) == [9, 17, 25] and adapter.chunk_starts(21) == [13]
    assert adapter.chunk_starts(5) == []
    assert load_autoencoder(str(folders["hunyuan"])).chunk_starts(33) == [12, 24]
    assert load_autoencoder(str(folders["wan"])).chunk_starts(13) == [1, 5, 9]
    assert load_autoencoder(str(folders["image"])).chunk_starts(33) == []


def test_psnr_at_chunk_boundaries_and_elsewhere(vae_folder):
    """Errors of .1 of the peak on both sides of each boundary, .2 elsewhere, and in the first frame: 20, 14 and 40 dB.
    """
    ours = load_autoencoder(str(vae_folder))
    original = torch.zeros(1, 3, 9, 16, 16)
    decoded = original + .4
    decoded[:, :, [1, 4, 5]] = .2  # the boundaries are at 1 and 5: frames 0, 1, 4, 5
    decoded[:, :, 0] = .02
    metrics = quality(original, decoded, ours)
    assert metrics["psnr_joins"] == pytest.approx((40 + 3 * 20) / 4, abs=1e-3)
    assert metrics["psnr_elsewhere"] == pytest.approx(-20 * np.log10(.2), abs=1e-3)
    far = -20 * np.log10(.2)
    assert metrics["psnr_by_position"] == pytest.approx([40, 20, far, far, (20 + far) / 2], abs=1e-3)
    assert quality(original, decoded, AutoencoderAdapter(diffusers.AutoencoderKL()))["psnr_joins"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_metrics_on_an_accelerator_equal_those_on_a_cpu(vae_folder):
    ours = load_autoencoder(str(vae_folder))
    original, decoded = (torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1
                         for i in range(2))
    judges, there = FeatureExtractors(), FeatureExtractors(device="cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        one = quality(original, decoded, ours) | judges.compare(original, decoded)
        other = quality(original.cuda(), decoded.cuda(), ours) | there.compare(original.cuda(), decoded.cuda())
    assert one.keys() == other.keys()
    assert all(other[key] == pytest.approx(value, rel=1e-3) for key, value in one.items())


def test_labels_of_models():
    assert label_models(["a/vae", "b/vae", "c=x/y", "d/e/"]) == {"a/vae": "a/vae", "b/vae": "b/vae", "c": "x/y",
                                                                "e": "d/e/"}
    with pytest.raises(UserError, match="two models are called e"):
        label_models(["x/e", "y/e"])


def test_the_command_measures_each_model_and_shows_them(clips, vae_folder, folders, tmp_path, capsys):
    out, broken = tmp_path / "out", tmp_path / "clips"
    broken.mkdir()
    for path in sorted(clips.glob("*.mp4"))[:2]:
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless/config.json").write_bytes((folders["image"] / "config.json").read_bytes())
    assert main(["evaluate", str(broken), "--model", f"ours={vae_folder}", "--model", str(folders["image"]),
                 "--model", f"lost={tmp_path / 'weightless'}", "--out", str(out), "--frames", "9"]) == 0
    stdout = capsys.readouterr().out
    assert "2 clips, 1 set aside, 2 models" in stdout and "set aside: " in stdout and "not measured: lost" in stdout
    assert stdout.splitlines()[0].split()[:3] == ["model", "PSNR", "dB"]
    report = json.loads((out / "evaluation.json").read_text())
    ours, image = report["models"]["ours"], report["models"]["image"]
    assert ours["class"] == AutoencoderKLODVAE.__name__ and ours["rate"] == "4x8x8" and image["rate"] == "1x4x4"
    assert ours["compression"] == pytest.approx(9 * 3 * 32**2 / (3 * 4 * 4**2))
    assert image["compression"] == pytest.approx(3 * 32**2 / (4 * 8**2))
    for metrics in (ours, image):
        assert 0 < metrics["ssim"] < 1 and 0 < metrics["psnr"] < 40
        assert metrics["encode_fps"] > 0 and metrics["decode_fps"] > 0 and metrics["decode_peak_mib"] >= 0
    assert ours["psnr_joins"] and len(ours["psnr_by_position"]) == 5 and "psnr_joins" not in image
    assert ("perceptual (EfficientNet-Lite0)" in ours) != ("no perceptual distance" in stdout)  # if it is installed
    info = probe(out / "side_by_side.mp4")
    assert (info.frames, info.height, info.width) == (9, 48, 3 * 32 + 4)
    assert (out / "contact_sheet.png").is_file()


def test_a_model_with_non_finite_outputs_is_not_measured(clips, vae_folder, tmp_path, capsys):
    broken = load_vae(vae_folder)
    with torch.no_grad():
        broken.decoder.conv_out.bias[0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    command = ["evaluate", str(clips), "--limit", "1", "--frames", "5", "--out", str(tmp_path / "out"),
               "--model", f"bad={tmp_path / 'broken'}"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "the decoder of bad gave NaN" in error and "conv_out.bias is not finite" in error
    assert not list((tmp_path / "out").iterdir())
    assert main([*command, "--model", f"good={vae_folder}"]) == 0
    assert "not measured: bad: the decoder of bad gave NaN" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "message"), [
    (["--model", "{empty}"], "holds neither config.json"),
    (["--model", "{empty}/nowhere"], "is not a folder, and the hub"),
    (["--model", "{foreign}"], "neither ours nor an autoencoder of diffusers"),
    (["--model", "a={vae}", "--model", "a={vae}"], "two models are called a"),
    (["--model", "{vae}", "--frames", "0"], "at least 1 frame"),
    (["--model", "{vae}", "--size", "31", "32"], "even sides"),
    (["--model", "{vae}", "--frames", "500"], "no video could be used"),
])
def test_user_errors_have_no_traceback(more, message, clips, vae_folder, tmp_path, capsys):
    for name in ("empty", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign/config.json").write_text('{"_class_name": "UNet2DModel"}')
    filled = [a.format(vae=vae_folder, empty=tmp_path / "empty", foreign=tmp_path / "foreign") for a in more]
    assert main(["evaluate", str(clips), "--out", str(tmp_path / "out"), *filled]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_the_vae_of_a_pipeline_is_found(folders, tmp_path):
    (tmp_path / "vae").symlink_to(folders["image"])
    assert load_autoencoder(str(tmp_path)).is_image_model


def test_profile_call_measures_the_growth_of_memory():
    from odvae.utils.profiling import MIB, profile_call

    held = torch.ones(16 * MIB)  # 64 MiB
    for _ in range(2):  # memory that the first run freed counts again
        _, usage = profile_call(lambda: (torch.ones(8 * MIB) + 1).sum())  # 32 MiB and 32 MiB
        assert usage.growth is None or 60 < usage.growth < 90, held.shape


def test_evaluate_limits_its_clips(clips, vae_folder, tmp_path):
    result = evaluate(clips, [str(vae_folder)], tmp_path, frames=5, limit=1)
    assert result.clips == 1 and next(iter(result.models.values()))["psnr"] > 0
