"""A distilled decoder in place of a pipeline's VAE: the same latents, its frames, streamed group by group."""

import numpy as np
import pytest
import torch
from pipelines import SIZE, make_pipeline
from tiny_diffusers import make_diffusers_pipeline

from lvdm.generation.fingerprints import fingerprints
from lvdm.sampling.diffusers_adapter import DiffusersAdapter
from lvdm.sampling.loading import attach_decoder
from lvdm.sampling.outputs import VideoChunk
from odvae.data.transforms import to_uint8
from odvae.model.distilled_decoder import DistilledDecoder
from odvae.utils.errors import UserError


def save_decoder(folder, vae, channels):
    torch.manual_seed(0)
    decoder = DistilledDecoder(channels, widths=(8, 8, 8), blocks=(1, 1, 1)).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    decoder.save_pretrained(folder)
    return decoder


@torch.no_grad()
def test_it_decodes_what_an_lvdm_samples(tmp_path):
    pipeline = make_pipeline()
    plain = pipeline("red", seed=3, output_type="uint8", **SIZE)
    parts = fingerprints(pipeline)
    decoder = save_decoder(tmp_path, pipeline.vae, 2)
    attach_decoder(pipeline, tmp_path)
    result = pipeline("red", seed=3, output_type="uint8", **SIZE)
    assert result.latents.equal(plain.latents) and not np.array_equal(result.frames, plain.frames)
    expected = to_uint8(decoder.decode(pipeline.vae.denormalize(result.latents)).sample)
    np.testing.assert_allclose(result.frames.astype(int), expected, atol=1)  # group by group, to rounding
    chunks = [event.frames for event in pipeline.stream("red", seed=3, **SIZE) if isinstance(event, VideoChunk)]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), result.frames)
    # Files of the two decoders are not taken for each other.
    assert fingerprints(pipeline).items() - parts.items() == {("distilled decoder", fingerprints(pipeline)[
        "distilled decoder"])}
    pipeline.distilled_decoder = None
    np.testing.assert_array_equal(pipeline("red", seed=3, output_type="uint8", **SIZE).frames, plain.frames)


@torch.no_grad()
def test_it_decodes_what_a_pipeline_of_diffusers_samples(tmp_path):
    adapter = DiffusersAdapter(make_diffusers_pipeline("WanPipeline"))
    inputs = {"num_frames": 9, "height": 64, "width": 32, "num_inference_steps": 1, "seed": 3}
    plain = list(adapter.stream("red", **inputs))[-1]
    decoder = save_decoder(tmp_path, adapter.vae, adapter.vae.config.z_dim)
    attach_decoder(adapter, tmp_path)
    chunk = list(adapter.stream("red", **inputs))[-1]
    mean, std = (torch.tensor(adapter.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean",
                                                                                           "latents_std"))
    expected = to_uint8(decoder.decode(chunk.latents * std + mean).sample)
    np.testing.assert_allclose(chunk.frames.astype(int), expected, atol=1)
    assert not np.array_equal(chunk.frames, plain.frames)
    adapter.distilled_decoder = None
    np.testing.assert_array_equal(next(adapter.decode_latents([plain.latents])), plain.frames)


def test_a_decoder_of_other_latents_is_refused(tmp_path):
    pipeline = make_pipeline()
    save_decoder(tmp_path, pipeline.vae, 3)
    with pytest.raises(UserError, match="latents of 3 channels, and the VAE's have 2"):
        attach_decoder(pipeline, tmp_path)
