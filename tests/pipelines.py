"""Pipelines small enough for tests, and requests for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from lvdm import LVDMPipeline, LVDMTransformer3DModel
from lvdm.generation.requests import GenerationRequest, build_requests
from lvdm.sampling.params import VideoFileParams
from lvdm.text import TransformersEncoder, WordHashEncoder
from odvae import AutoencoderKLODVAE

SIZE = dict(num_frames=9, num_inference_steps=2, height=16, width=16)  # groups of 1 and 2 latents


def make_pipeline(text_encoder=None, **config) -> LVDMPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLODVAE(latent_channels=2, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
                             norm_num_groups=4, latents_mean=[0.1, -0.2], latents_std=[0.5, 2.0])
    sizes = dict(num_layers=2, text_dim=16, sample_height=32, sample_width=16) | config
    transformer = LVDMTransformer3DModel(in_channels=2, hidden_size=24, num_attention_heads=2, **sizes)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    if transformer.config.text_dim and text_encoder is None:
        text_encoder = WordHashEncoder(dim=16)
    return LVDMPipeline.build(vae.eval(), transformer.eval(), text_encoder)


def make_requests(out: Path, prompts: Sequence[str] = ("red",), **params) -> list[GenerationRequest]:
    """Small videos with these prompts and the seeds 3, 4 ..."""
    return build_requests(out, [VideoFileParams(prompt=prompt, seed=3 + i, **SIZE | params)
                                for i, prompt in enumerate(prompts)])


def make_t5(dim: int = 16) -> TransformersEncoder:
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=4, d_model=dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "red": 2, "blue": 3}, unk_token="[UNK]"))
    return TransformersEncoder(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]",
                                                              unk_token="[UNK]", model_max_length=8))
