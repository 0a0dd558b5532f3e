"""Latents of the pipelines of diffusers, decoded here as their own calls decode them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLMochi,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
)

from lvdm.sampling.latent_decoder import Tile, decode, decoder_tile, latents_of
from odvae.utils.errors import NonFiniteError, UserError

TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}


def hunyuan() -> tuple[Any, dict[str, Any]]:
    vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
                                    norm_num_groups=4)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4))
    pipeline = HunyuanVideoPipeline(**TEXT, text_encoder_2=None, tokenizer_2=None, vae=vae, transformer=transformer,
                                    scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0))
    return pipeline, {"prompt_embeds": torch.randn(1, 4, 16), "prompt_attention_mask": torch.ones(1, 4),
                      "pooled_prompt_embeds": torch.randn(1, 8), "num_frames": 9, "height": 16, "width": 32}


def mochi(normalized: bool) -> tuple[Any, dict[str, Any]]:
    statistics: dict[str, Any] = {} if normalized else {"latents_mean": None, "latents_std": None}
    vae = AutoencoderKLMochi(latent_channels=12, encoder_block_out_channels=(32, 32, 32, 32),
                             decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
                             scaling_factor=0.7, **statistics)
    transformer = MochiTransformer3DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=12,
                                          pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=4,
                                          max_sequence_length=16)
    pipeline = MochiPipeline(**TEXT, vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    return pipeline, {"prompt_embeds": torch.randn(1, 16, 16), "prompt_attention_mask": torch.ones(1, 16),
                      "guidance_scale": 1.0, "num_frames": 7, "height": 16, "width": 32}


def allegro() -> tuple[Any, dict[str, Any]]:
    vae = AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
    vae.kernel, vae.stride = (24, 64, 64), (16, 40, 40)
    vae.enable_tiling()  # as the pipeline's documentation asks for
    transformer = AllegroTransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=1,
                                            cross_attention_dim=24, caption_channels=16, sample_width=8,
                                            sample_height=8, sample_frames=6)
    pipeline = AllegroPipeline(**TEXT, vae=vae, transformer=transformer, scheduler=DDIMScheduler())
    return pipeline, {"prompt_embeds": torch.randn(1, 4, 16), "prompt_attention_mask": torch.ones(1, 4),
                      "guidance_scale": 1.0, "num_frames": 24, "height": 64, "width": 64}


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "hunyuan": hunyuan, "mochi": lambda: mochi(True), "mochi without statistics": lambda: mochi(False),
    "allegro": allegro}


@pytest.mark.parametrize("name", PIPELINES)
def test_frames_are_those_of_the_pipelines_own_call(name: str) -> None:
    torch.manual_seed(0)
    pipeline, arguments = PIPELINES[name]()
    pipeline.vae.eval()  # Allegro's has dropout
    pipeline.set_progress_bar_config(disable=True)

    def call(output_type: str) -> Any:
        return pipeline(**arguments, num_inference_steps=2, output_type=output_type,
                        generator=torch.Generator().manual_seed(1)).frames

    sampled, video = call("latent"), call("np")
    latents = latents_of(pipeline, sampled, sampled.shape[2], arguments["height"], arguments["width"])
    frames = decode(pipeline, latents)
    assert frames.shape == (1, arguments["num_frames"], arguments["height"], arguments["width"], 3)
    assert np.abs(frames - video * 255).max() < 0.51 and frames.std() > 1
    with pytest.raises(NonFiniteError, match="the VAE's decoder gave NaN or infinity"):
        decode(pipeline, torch.full_like(latents, torch.nan))


@pytest.mark.parametrize("name", ["hunyuan", "allegro"])
def test_tiles_are_set_for_one_decoding(name: str) -> None:
    """Allegro decodes in tiles of its own size only, whichever are asked for."""
    torch.manual_seed(0)
    pipeline, arguments = PIPELINES[name]()
    vae = pipeline.vae
    vae.use_tiling = False
    before = {key: value for key, value in vars(vae).items() if key.startswith(("tile_", "use_"))}
    latents = torch.randn(1, 4, arguments["num_frames"] // 4 + (name == "hunyuan"), arguments["height"] // 8,
                          arguments["width"] // 8)
    frames = decode(pipeline, latents, Tile(16, 16, 8))
    assert frames.shape == (1, arguments["num_frames"], arguments["height"], arguments["width"], 3)
    assert {key: value for key, value in vars(vae).items() if key in before} == before


def test_tiles_that_a_vae_cannot_have_are_refused_with_the_nearest() -> None:
    assert decoder_tile(8, 64, 32) == Tile(64, 32, 8)
    with pytest.raises(UserError, match=r"tiles of 60x8 pixels: .* multiples of 8 from 16 on; the nearest is 64x16"):
        decoder_tile(8, 60, 8)
