"""Long clips to latents, chunk by chunk."""

import pytest
import torch

from odvae import AutoencoderKLODVAE
from odvae.cache.encoder import LatentEncoder
from odvae.inference.streaming import encode_groups


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
