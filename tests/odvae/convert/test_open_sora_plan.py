"""Checkpoints of the public code: the same outputs, every key accounted for, exact round trips."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from odvae import AutoencoderKLODVAE
from odvae.cli import main
from odvae.convert.open_sora_plan import export_checkpoint, import_checkpoint
from odvae.utils.errors import UserError

REFERENCE = Path(os.environ.get("ODVAE_REFERENCE", Path(__file__).parents[4] / "shared/reference-checkpoints"))
FOLDERS = ["causalvae-v1.1-tiny", "causalvae-v1.2-tiny"]


@pytest.fixture(params=FOLDERS)
def reference(request):
    folder = REFERENCE / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder


@torch.no_grad()
def test_outputs_equal_the_public_codes(reference):
    vae, io = import_checkpoint(reference), load_file(reference / "io.safetensors")
    posterior = vae.encode(io["x"]).latent_dist
    for ours, theirs in ((posterior.mean, io["mean"]), (posterior.logvar, io["logvar"]),
                         (vae.decode(io["z"]).sample, io["y"])):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (vae.double().decode(io["z"].double()).sample - io["y"]).abs().max() < 1e-5  # without our own rounding
    torch.testing.assert_close(vae.normalize(io["z"]), io["z"] * 0.18215)


def model(**options) -> AutoencoderKLODVAE:
    torch.manual_seed(0)
    return AutoencoderKLODVAE(block_out_channels=(32, 64, 32, 32), layers_per_block=1,
                              **dict(norm="clip", upsample="trilinear") | options).eval()


@pytest.mark.parametrize("options", [{}, {"time_sampling": "residual"}, {"variant": 3}, {"latent_channels": 8},
                                     {"variant": {"encoder": ["2d", "3d", "3d", "3d"], "decoder": ["3d"] * 4}}],
                         ids=str)
def test_export_and_import_round_trip(options, tmp_path):
    vae = model(**options)
    export_checkpoint(vae, tmp_path / "out")
    again = import_checkpoint(tmp_path / "out")
    assert again.config.variant == vae.config.variant and again.config.time_sampling == vae.config.time_sampling
    assert again.state_dict().keys() == vae.state_dict().keys()
    assert all(again.state_dict()[key].equal(value) for key, value in vae.state_dict().items())


def test_an_export_has_the_public_keys_and_shapes(reference, tmp_path):
    """Exporting an imported model writes what was read, key by key and value by value."""
    export_checkpoint(import_checkpoint(reference), tmp_path / "out")
    written = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    files = [p for p in reference.iterdir() if p.suffix == ".ckpt" or p.name.startswith("diffusion")]
    read = (load_file(files[0]) if files[0].suffix == ".safetensors"
            else torch.load(files[0], weights_only=True)["state_dict"]["gen_model"])
    assert written.keys() == read.keys()
    assert all(written[key].equal(read[key].float()) for key in read)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", reference))
    assert ours == theirs


def test_the_commands_round_trip(tmp_path):
    export_checkpoint(model(), tmp_path / "public")
    assert main(["import", str(tmp_path / "public"), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "public" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_ema_weights_of_a_training_checkpoint_are_preferred_and_loss_keys_left_out(tmp_path):
    export_checkpoint(model(), tmp_path / "a")
    weights = load_file(tmp_path / "a/diffusion_pytorch_model.safetensors")
    (tmp_path / "a/diffusion_pytorch_model.safetensors").unlink()
    ema = {f"module.{key}": tensor + 1 for key, tensor in weights.items()}
    other = {"loss.discriminator.weight": torch.zeros(3)}
    torch.save({"ema_state_dict": ema, "state_dict": {"gen_model": weights | other}}, tmp_path / "a/checkpoint.ckpt")
    assert import_checkpoint(tmp_path / "a").quant_conv.bias.equal(weights["quant_conv.conv.bias"] + 1)
    torch.save({"ema_state_dict": {}, "state_dict": {"gen_model": weights | other}}, tmp_path / "a/checkpoint.ckpt")
    assert import_checkpoint(tmp_path / "a").quant_conv.bias.equal(weights["quant_conv.conv.bias"])


def change(**fields):
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
    return apply


def reweight(edit):
    def apply(folder: Path) -> None:
        file = folder / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        edit(weights)
        save_file(weights, file)
    return apply


@pytest.mark.parametrize(("spoil", "message"), [
    (change(encoder_attention="AttnBlock3D"), "v1.0"),
    (change(hidden_size="gone"), "lacks hidden_size"),
    (change(flux_capacitor=3), "unknown fields: flux_capacitor"),
    (change(decoder_mid_resnet="ResnetBlock2D"), "decoder_mid_resnet is 'ResnetBlock2D'"),
    (change(encoder_spatial_downsample=["Downsample"] * 3 + ["Pool"]), "encoder_spatial_downsample is .*'Pool'"),
    (change(_class_name="WFVAEModel"), "describes a WFVAEModel"),
    (reweight(lambda w: w.pop("quant_conv.conv.bias")), "missing keys quant_conv.conv.bias"),
    (reweight(lambda w: w.update(extra=torch.zeros(1))), "unexpected keys extra"),
    (reweight(lambda w: w.update({"quant_conv.conv.bias": torch.zeros(3)})), r"shape \(3,\)"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"junk"), "cannot be read"),
    (lambda folder: shutil.move(folder / "diffusion_pytorch_model.safetensors", folder / "x.ckpt"), "x.ckpt"),
])
def test_a_broken_or_unknown_checkpoint_is_refused_by_name(spoil, message, tmp_path):
    export_checkpoint(model(), tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        import_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(("options", "message"), [({"norm": "frame"}, "norm='frame'"), ({"variant": 2}, "variant=2"),
                                                  ({"upsample": "nearest"}, "upsample='nearest'")])
def test_a_vae_the_public_code_does_not_support_is_not_exported(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export_checkpoint(model(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()
