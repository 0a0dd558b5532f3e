"""Checks of what `LVDMTransformer3DModel` is called with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from odvae.utils.errors import UserError


def check_inputs(model: Any, latents: Tensor, timestep: Tensor, target_timestep: Tensor | None,
                 guidance: Tensor | None, text: Tensor | None, class_labels: Tensor | None) -> None:
    """Raise UserError for shapes that do not fit the model's config, a missing condition, or an argument that the model
    does not take."""
    config = model.config
    b, _, t, height, width = _check_latents(config, latents)
    if timestep.shape != (b, t):
        raise UserError(f"timestep must be (B, T) = {(b, t)}, one per latent frame; got {tuple(timestep.shape)}")
    for name, value, flag, shape in (("target_timestep", target_timestep, "flow_map", (b, t)),
                                     ("guidance", guidance, "guidance_embeds", (b,))):
        if value is not None and not config[flag]:
            raise UserError(f"the transformer was made without {flag}: leave {name} out")
        if value is not None and value.shape != shape:
            raise UserError(f"{name} must be {shape}, got {tuple(value.shape)}")
    for name, value, required in (("text", text, config.text_dim), ("class_labels", class_labels, model.no_class)):
        if (value is None) == bool(required):
            raise UserError(f"the transformer was made {'for' if required else 'without'} {name}: "
                            f"{'pass it' if required else 'leave it out'}")
        if value is not None and len(value) != b:
            raise UserError(f"{name} has {len(value)} samples, latents have {b}")
    if model._parallel_config is not None:
        processes = model._parallel_config.context_parallel_config.ulysses_degree
        if height * width // config.patch_size**2 % processes:
            raise UserError(f"a latent frame of {height}x{width} has {height * width // config.patch_size**2} tokens, "
                            f"which cannot be divided over {processes} processes (context parallelism)")


def _check_latents(config: Any, latents: Tensor) -> tuple[int, ...]:
    """The shape of the latents, which fits the config."""
    if latents.ndim != 5 or not latents.numel():
        raise UserError(f"latents must be (B, c, T, h, w), at least one of each, got {tuple(latents.shape)}")
    if latents.shape[1] != config.in_channels:
        raise UserError(f"latents have {latents.shape[1]} channels, the transformer was made for {config.in_channels}")
    for name, side in zip(("height", "width"), latents.shape[3:], strict=True):
        if side < config.patch_size or side % config.patch_size:
            raise UserError(f"latent {name} {side} is not a multiple of the patch size {config.patch_size}; "
                            f"the nearest is {nearest_multiple(side, config.patch_size)}")
    return tuple(latents.shape)


def nearest_multiple(size: int, multiple: int) -> int:
    """Return the multiple, at least one time, that is nearest to a size."""
    return max(multiple, round(size / multiple) * multiple)
