"""The evaluation of a VAE in training: its reconstructions of held-out clips, spread over the processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from ..data.transforms import to_uint8
from ..losses.perceptual import PerceptualLoss
from ..metrics.psnr import psnr
from ..metrics.ssim import TAPS, ssim
from ..model import AutoencoderKLODVAE
from ..model.shapes import patchify, unpatchify
from ..trainer.distributed import EvaluationGroup, is_main_process
from ..utils.plots import contact_sheet, side_by_side

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BATCH = 4  # clips that are decoded together
SHOWN = 6  # clips in the contact sheet


def evaluate_heldout(model: AutoencoderKLODVAE | AutoencoderKL, originals: Tensor, perceptual: PerceptualLoss | None,
                     path: Path, group: EvaluationGroup) -> dict[str, float]:
    """Reconstruct clips (B, 3, T, H, W) in [-1, 1]; return the mean metrics, and write a contact sheet to `path`."""
    batches = originals.split(BATCH)
    metrics, shown = {}, {}
    for i in group.share(len(batches)):
        decoded = reconstruct(model, batches[i])
        metrics[i] = heldout_metrics(batches[i], decoded, perceptual)
        if BATCH * i < SHOWN:
            shown[i] = decoded
    every, decoded = group.gather(metrics), torch.cat(group.gather(shown))
    if is_main_process():
        pairs = zip(to_uint8(originals[:SHOWN]), to_uint8(decoded[:SHOWN]), strict=True)
        contact_sheet([side_by_side(a, b) for a, b in pairs], path, None, scale=1)
    return {name: float(torch.cat([each[name] for each in every]).mean()) for name in every[0]}


@torch.inference_mode()
def heldout_metrics(originals: Tensor, decoded: Tensor, perceptual: PerceptualLoss | None) -> dict[str, Tensor]:
    """Return metrics of two sets of videos (B, 3, T, H, W) in [-1, 1], of which the mean is to be taken: of each frame,
    the perceptual distance of each video."""
    metrics = {"psnr_heldout": psnr(originals, decoded).flatten()}
    if min(originals.shape[3:]) >= TAPS:
        metrics["ssim_heldout"] = ssim(originals, decoded).flatten()
    if perceptual is not None:
        device = next(perceptual.parameters(), originals).device
        metrics["perceptual_heldout"] = torch.stack([perceptual(a[None].to(device), b[None].to(device)).cpu()
                                                     for a, b in zip(originals, decoded, strict=True)])
    return metrics


@torch.inference_mode()
def reconstruct(model: AutoencoderKLODVAE | AutoencoderKL, x: Tensor) -> Tensor:
    """Decode the posterior's mean: (B, 3, T, H, W) in [-1, 1] -> the same shape."""
    x = x.to(next(model.parameters()).device)
    if isinstance(model, AutoencoderKLODVAE):
        return model(x).sample.cpu()
    return as_video(model, model(as_images(model, x)).sample, len(x)).cpu()


def as_images(model: AutoencoderKL, x: Tensor) -> Tensor:
    """Turn a video (B, 3, T, H, W) into B*T images, with pixels folded if the image VAE has more than 3 channels."""
    return rearrange(patchify(x, math.isqrt(model.config.in_channels // 3)), "b c t h w -> (b t) c h w")


def as_video(model: AutoencoderKL, images: Tensor, batch: int) -> Tensor:
    """The inverse of `as_images`, for a batch of `batch` videos."""
    frames = rearrange(images, "(b t) c h w -> b c t h w", b=batch)
    return unpatchify(frames, math.isqrt(model.config.in_channels // 3))
