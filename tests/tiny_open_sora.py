"""A pipeline of Open-Sora-Plan with few random weights, made on the spot: 16x16 pixels, 17 frames."""

from __future__ import annotations

import torch
from pipelines import make_t5

from lvdm.model.open_sora import OpenSoraT2VTransformer3DModel
from lvdm.sampling.open_sora import OpenSoraPipeline
from odvae import AutoencoderKLODVAE


def make_open_sora_pipeline() -> OpenSoraPipeline:
    text = make_t5()
    torch.manual_seed(0)
    vae = AutoencoderKLODVAE(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    transformer = OpenSoraT2VTransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=1,
                                                caption_channels=16, sample_size=(2, 2), sample_size_t=5)
    return OpenSoraPipeline(vae.eval(), transformer.eval(), text.model, text.tokenizer)
