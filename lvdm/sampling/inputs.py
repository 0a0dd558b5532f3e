"""Checks of the pipeline's inputs, before anything is computed. Each raises UserError and names what would fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import UserError

from ..model.transformer import LVDMTransformer3DModel


def one_per_prompt(negative_prompt: str | Sequence[str], seed: int | Sequence[int],
                   count: int) -> tuple[list[str], list[int]]:
    """Negative prompts (one, or one per prompt) and seeds (one per prompt) for `count` prompts."""
    negative_prompts = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + i for i in range(count)]
    for name, given, allowed in (("seeds", len(seeds), {count}),
                                 ("negative prompts", len(negative_prompts), {1, count})):
        if given not in allowed:
            raise UserError(f"{given} {name} for {count} prompts; give one per prompt")
    return negative_prompts, seeds


def context_video(image: np.ndarray | None, video: np.ndarray | None, initial: Tensor | None) -> np.ndarray | None:
    """The frames to continue, uint8 (T, H, W, 3), of which an image is one."""
    if sum(value is not None for value in (image, video, initial)) > 1:
        raise UserError("give only one of image, video and initial latents to continue from")
    context = image[None] if image is not None else video
    if context is not None and (context.dtype != np.uint8 or context.ndim != 4 or context.shape[3] != 3
                                or not len(context)):
        raise UserError("an image must be uint8 (H, W, 3) and a video uint8 (T, H, W, 3), "
                        f"got {context.dtype} with {context.shape} as a video's shape")
    return context


def output_size(vae: AutoencoderKLODVAE, transformer: LVDMTransformer3DModel, height: int | None, width: int | None,
                context: np.ndarray | None, initial: Tensor | None) -> tuple[int, int]:
    """Pixels of the result: those requested, else those of what it continues, else the transformer's own."""
    sides = [transformer.config.sample_height, transformer.config.sample_width]
    if context is not None:
        sides = list(context.shape[1:3])
    elif initial is not None:
        sides = [vae.spatial_compression_ratio * side for side in initial.shape[-2:]]
    fixed = context is not None or initial is not None
    for i, (name, requested) in enumerate((("height", height), ("width", width))):
        if requested is not None and fixed and requested != sides[i]:
            raise UserError(f"{name}={requested} was requested, but the video to continue has {sides[i]}; "
                            "resize it first (odvae.data.transforms.resize_crop)")
        sides[i] = sides[i] if requested is None else requested
    check_size(vae, transformer, *sides)
    return sides[0], sides[1]


def check_size(vae: AutoencoderKLODVAE, transformer: LVDMTransformer3DModel, height: int, width: int) -> None:
    """Sides are multiples of a token's side in pixels."""
    multiple = vae.spatial_compression_ratio * transformer.config.patch_size
    if height < multiple or width < multiple or height % multiple or width % multiple:
        near = [max(multiple, multiple * round(side / multiple)) for side in (height, width)]
        raise UserError(f"{height}x{width} pixels: sides must be multiples of {multiple}; "
                        f"the nearest is {near[0]}x{near[1]}")


def latent_lengths(vae: AutoencoderKLODVAE, frames: int, context: np.ndarray | None,
                   initial: Tensor | None) -> tuple[int, int]:
    """Latent frames of the whole result, and of what it continues."""
    total, given = vae.latent_frames(frames), 0
    if initial is not None:
        given = initial.shape[2]
    elif context is not None:
        given = vae.latent_frames(len(context))
    if total <= given:
        ratio = vae.temporal_compression_ratio
        raise UserError(f"frames={frames} is the length of the whole result and must exceed the "
                        f"{1 + ratio * (given - 1)} frames it continues; the next is {1 + ratio * given}")
    return total, given
