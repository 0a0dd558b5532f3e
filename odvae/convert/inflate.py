"""Inflate an image VAE's weights to a video VAE (OD-VAE, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..model.autoencoder import AutoencoderKLODVAE
from ..model.conv import CausalConv3d
from ..utils.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Init = Literal["tail", "average", "center", "random"]


def inflate_kernel(weight: Tensor, time_kernel: int, init: Init) -> Tensor:
    """2D kernel (O, I, k, k) -> 3D kernel (O, I, k_t, k, k).

    tail: the last tap, on the current frame, is the 2D kernel and the others are zero, so that the video model starts
    as the image model on each frame. average: every tap is the 2D kernel / k_t. center: as tail, with the middle tap,
    on the previous frame.
    """
    if init == "average":
        return weight.unsqueeze(2).repeat(1, 1, time_kernel, 1, 1) / time_kernel
    if init in ("tail", "center"):
        out = weight.new_zeros(*weight.shape[:2], time_kernel, *weight.shape[2:])
        out[:, :, -1 if init == "tail" else time_kernel // 2] = weight
        return out
    raise UserError(f"unknown init {init!r}; choose one of {', '.join(get_args(Init))}")


@torch.no_grad()
def inflate(image_vae: AutoencoderKL, variant: int | Mapping[str, Sequence[str]] = 4, init: Init = "tail",
            **options: Any) -> AutoencoderKLODVAE:
    """Build a video VAE from an image VAE's weights.

    With init "tail" it equals the image VAE: latent k is the image VAE's latent of frame 4k, and every frame decoded
    from latent k is the image VAE's decode of it. An image VAE with more than three channels (12 = 3 x 2 x 2) works on
    folded pixels: the video VAE folds them itself, by its `patch_size`. With init "random" it has the image VAE's shape
    but none of its weights. Variant 0 is the image VAE frame by frame: unless `options` say otherwise, time is not
    compressed and `normalize` multiplies by the image VAE's scaling factor.

    Args:
        options: further arguments of `AutoencoderKLODVAE`, such as time_compression, norm and upsample.

    Raises:
        UserError: the image VAE has another layout (attention in its levels, unequal blocks, unknown keys); names what
            differs.
    """
    source = image_vae.config
    _check_layout(source)
    patch_size = max(1, math.isqrt(source.in_channels // 3))
    if variant == 0:
        options = {"time_compression": 1, "scaling_factor": source.scaling_factor} | options
    video = AutoencoderKLODVAE(
        in_channels=source.in_channels // patch_size**2,
        out_channels=source.out_channels // patch_size**2,
        patch_size=patch_size,
        latent_channels=source.latent_channels,
        block_out_channels=tuple(source.block_out_channels),
        layers_per_block=source.layers_per_block,
        norm_num_groups=source.norm_num_groups,
        variant=variant,
        **options,
    )
    if init == "random":
        return video
    weights = {name: tensor.float() for name, tensor in image_vae.state_dict().items()}
    for name, module in video.named_modules():
        if isinstance(module, CausalConv3d) and weights.get(f"{name}.weight") is not None:
            key = f"{name}.weight"
            weights[key] = inflate_kernel(weights[key], module.kernel_size[0], init)
    expected = video.state_dict().keys()
    missing, unexpected = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    if missing or unexpected:
        raise UserError(f"the image VAE's layout does not match the video VAE's: missing keys {missing[:5]}, "
                        f"unexpected keys {unexpected[:5]}")
    video.load_state_dict(weights)
    return video


def _check_layout(source: object) -> None:
    expected = {"mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True, "act_fn": "silu"}
    for field, value in expected.items():
        actual = getattr(source, field, value)
        if actual != value:
            raise UserError(f"cannot inflate an image VAE with {field}={actual!r}; only {value!r} is supported")
