"""Text-to-video pipelines of diffusers with few random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from pipelines import make_t5

HEADS = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1)
LENGTHS = {"WanPipeline": 9, "LTXPipeline": 17, "CogVideoXPipeline": 9}  # frames: three latent frames each


def make_diffusers_pipeline(kind: str) -> Any:
    text = make_t5()  # 16 channels, 8 tokens
    torch.manual_seed(0)
    pipeline = {"WanPipeline": _wan, "LTXPipeline": _ltx, "CogVideoXPipeline": _cogvideox}[kind](
        tokenizer=text.tokenizer, text_encoder=text.model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_diffusers_pipeline(kind: str, folder: Path) -> Path:
    make_diffusers_pipeline(kind).save_pretrained(folder)
    return folder


def _wan(**text: Any) -> Any:
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer = WanTransformer3DModel(**HEADS, text_dim=16, freq_dim=32, ffn_dim=32, rope_max_seq_len=32)
    return WanPipeline(**text, vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def _ltx(**text: Any) -> Any:
    vae = AutoencoderKLLTXVideo(latent_channels=8, block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
                                decoder_block_out_channels=(8, 8, 8, 8), decoder_layers_per_block=(1, 1, 1, 1, 1))
    vae.latents_mean.normal_(0, 0.1)
    vae.latents_std.uniform_(0.5, 2)
    transformer = LTXVideoTransformer3DModel(in_channels=8, out_channels=8, **HEADS, cross_attention_dim=32,
                                             caption_channels=16)
    return LTXPipeline(**text, vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())


def _cogvideox(**text: Any) -> Any:
    blocks = {f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 4 for way in ("down", "up")}
    vae = AutoencoderKLCogVideoX(**blocks, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
                                 norm_num_groups=2)
    transformer = CogVideoXTransformer3DModel(in_channels=4, out_channels=4, **HEADS, time_embed_dim=4,
                                              text_embed_dim=16, sample_height=4, sample_width=4, sample_frames=9,
                                              max_text_seq_length=226)
    return CogVideoXPipeline(**text, vae=vae, transformer=transformer, scheduler=CogVideoXDDIMScheduler())
