"""The evaluation of a VAE in training: its reconstructions of held-out clips, spread over the processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..data.transforms import to_uint8
from ..losses.perceptual import PerceptualLoss
from ..metrics.psnr import psnr
from ..metrics.ssim import TAPS, ssim
from ..model import AutoencoderKLODVAE
from ..model.shapes import patchify, unpatchify
from ..trainer.distributed import is_main_process
from ..trainer.evaluation import EvaluationGroup, evenly
from ..utils.plots import contact_sheet, side_by_side

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BATCH = 4  # clips that are decoded together
SHOWN = 6  # clips in the contact sheet


def evaluate_heldout(model: AutoencoderKLODVAE | AutoencoderKL, originals: Tensor, perceptual: PerceptualLoss | None,
                     path: Path, group: EvaluationGroup) -> dict[str, float]:
    """Reconstruct clips (B, 3, T, H, W) in [-1, 1]; return the mean metrics, and write a contact sheet to `path`. The
    budget of `group` may leave clips out."""
    batches = originals.split(BATCH)

    def evaluate(i: int) -> tuple[dict[str, Tensor], list[np.ndarray]]:
        decoded = reconstruct(model, batches[i])
        shown = batches[i][: max(0, SHOWN - BATCH * i)]
        return heldout_metrics(batches[i], decoded, perceptual), [
            side_by_side(a, b) for a, b in zip(to_uint8(shown), to_uint8(decoded[: len(shown)]), strict=True)]

    results = group.evaluate("batches of held-out clips", len(batches), lambda some: [evaluate(i) for i in some],
                             lambda limit: evenly(limit, len(batches))).values()
    if is_main_process():
        contact_sheet([sheet for _, shown in results for sheet in shown], path, None, scale=1)
    every = [metrics for metrics, _ in results]
    return {name: float(torch.cat([each[name] for each in every]).mean()) for name in every[0]}


@torch.inference_mode()
def heldout_metrics(originals: Tensor, decoded: Tensor, perceptual: PerceptualLoss | None) -> dict[str, Tensor]:
    """Return metrics of two sets of videos (B, 3, T, H, W) in [-1, 1], of which the mean is to be taken: of each frame,
    the perceptual distance of each video."""
    device = originals.device if perceptual is None else next(perceptual.parameters(), originals).device
    with torch.autocast(device.type, enabled=False):
        metrics = {"psnr_heldout": psnr(originals, decoded).flatten()}
        if min(originals.shape[3:]) >= TAPS:
            metrics["ssim_heldout"] = ssim(originals, decoded).flatten()
        if perceptual is not None:
            metrics["perceptual_heldout"] = torch.stack([perceptual(a[None].to(device), b[None].to(device)).cpu()
                                                         for a, b in zip(originals, decoded, strict=True)])
    return metrics


@torch.inference_mode()
def reconstruct(model: AutoencoderKLODVAE | AutoencoderKL, x: Tensor) -> Tensor:
    """Decode the posterior's mean: (B, 3, T, H, W) in [-1, 1] -> the same shape."""
    x = x.to(next(model.parameters()).device)
    if isinstance(model, AutoencoderKLODVAE):
        return model(x).sample.float().cpu()
    return as_video(model, model(as_images(model, x)).sample, len(x)).float().cpu()


def as_images(model: AutoencoderKL, x: Tensor) -> Tensor:
    """Turn a video (B, 3, T, H, W) into B*T images, with pixels folded if the image VAE has more than 3 channels."""
    return rearrange(patchify(x, math.isqrt(model.config.in_channels // 3)), "b c t h w -> (b t) c h w")


def as_video(model: AutoencoderKL, images: Tensor, batch: int) -> Tensor:
    """The inverse of `as_images`, for a batch of `batch` videos."""
    frames = rearrange(images, "(b t) c h w -> b c t h w", b=batch)
    return unpatchify(frames, math.isqrt(model.config.in_channels // 3))
