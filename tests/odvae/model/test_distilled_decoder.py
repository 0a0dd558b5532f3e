"""The distilled decoder: streams as it decodes whole, causal, one frame for the first latent, saved and loaded."""

import pytest
import torch

from odvae import decode_stream
from odvae.inference.loading import load_decoder
from odvae.model.distilled_decoder import DistilledDecoder
from odvae.utils.errors import UserError

TINY = {"latent_channels": 4, "widths": (16, 12, 8), "blocks": (1, 1, 2), "latents_mean": [0.5, 0, -1, 2],
        "latents_std": [1, 2, 0.5, 3]}


def make_decoder(**config) -> DistilledDecoder:
    """A decoder with random weights everywhere: new ones leave the blocks out."""
    torch.manual_seed(0)
    decoder = DistilledDecoder(**TINY | config).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return decoder


@pytest.mark.parametrize(("config", "time", "space"), [
    ({}, 4, 8), ({"time_growth": (1, 4), "space_growth": (2, 2)}, 4, 8),
    ({"temporal_compression": 6, "spatial_compression": 16, "time_growth": (3, 2), "space_growth": (2, 2)}, 6, 16)])
@torch.no_grad()
def test_streams_as_it_decodes_whole(config, time, space):
    decoder, z = make_decoder(**config), torch.randn(2, 4, 7, 3, 4)
    whole = decoder.decode_chunk(z)[0]
    assert whole.shape == (2, 3, 1 + 6 * time, 3 * space, 4 * space)
    assert torch.allclose(decoder.decode(z).sample, whole, atol=1e-5)
    for cuts in ((1, 6), (3, 1, 3), (1,) * 7):
        for frames in (None, 2):
            parts = list(decode_stream(decoder, z.split(cuts, dim=2), frames=frames))
            assert torch.allclose(torch.cat(parts, dim=2), whole, atol=1e-5)
            assert parts[0].shape[2] == 1 + time * ((min(cuts[0], frames or 9)) - 1)
    assert torch.allclose(decoder.decode(z[:, :, :1]).sample, whole[:, :, :1], atol=1e-5)  # alone, it is one frame
    assert torch.allclose(decoder.decode(z[:, :, :3]).sample, whole[:, :, :1 + 2 * time], atol=1e-5)  # causal
    assert not torch.allclose(decoder.decode(z.flip(2)).sample[:, :, -1], whole[:, :, 0], atol=1e-2)  # has a memory


def test_gradients_reach_every_parameter_and_the_values_are_those_of_inference():
    decoder, z = make_decoder(), torch.randn(1, 4, 3, 2, 2)
    video = decoder(z)
    video.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in decoder.parameters())
    with torch.inference_mode():
        assert torch.allclose(decoder.decode(z, return_dict=False)[0], video, atol=1e-6)


@torch.no_grad()
def test_saved_and_loaded_it_decodes_the_same(tmp_path, vae_folder):
    decoder, z = make_decoder(), torch.randn(1, 4, 3, 2, 2)
    decoder.save_pretrained(tmp_path / "decoder")
    assert [path.name for path in (tmp_path / "decoder").glob("*.safetensors")]
    for folder in (tmp_path, tmp_path / "decoder"):  # the run's, or its own
        assert load_decoder(folder).decode(z).sample.equal(decoder.decode(z).sample)
    with pytest.raises(UserError, match="no distilled decoder"):
        load_decoder(vae_folder)


@pytest.mark.parametrize(("config", "message"), [
    ({"blocks": (1, 2)}, "3 values with 3 levels"), ({"time_growth": (2, 3)}, "temporal compression, 4"),
    ({"space_growth": (3, 1)}, "divisor of the VAE's spatial compression, 8")])
def test_levels_that_do_not_fit_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        DistilledDecoder(**TINY | config)
    with pytest.raises(UserError, match=r"expected latents \(B, 4"):
        make_decoder().decode(torch.randn(1, 3, 1, 2, 2))
