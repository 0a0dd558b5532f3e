"""Train an OD-VAE on a folder of videos; or, with model.kind = image, the image VAE that it is inflated from."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from .data.transforms import to_uint8
from .data.windows import Clips, DataConfig
from .inflate import Init, inflate
from .losses.reconstruction import LossConfig, reconstruction_loss
from .metrics.psnr import psnr
from .model import AutoencoderKLODVAE
from .model.autoencoder import patchify, unpatchify
from .runtime.config import Config
from .runtime.distributed import is_main_process
from .runtime.errors import UserError
from .runtime.figures import contact_sheet, curves, side_by_side
from .runtime.seeding import generator
from .runtime.training import LoopConfig, Objective, fit, start_run

logger = logging.getLogger("odvae")


class ModelConfig(Config):
    kind: Literal["video", "image"] = "video"  # image: diffusers' AutoencoderKL, on single frames
    init_from: Path | None = None  # a folder: an image VAE, to inflate, or a VAE of this kind, to go on from
    init: Init = "tail"
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    variant: int = 4
    patch_size: int = 1


class TrainConfig(Config):
    output: Path = Path("outputs/odvae")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    loop: LoopConfig = LoopConfig()
    save_dtype: Literal["float32", "float16"] = "float32"


class Autoencoding(Objective):
    """Reconstruction of a posterior sample. A video (B, 3, T, H, W) is T images for an image VAE."""

    not_hidden = r"conv_in|encoder\.conv_out|decoder\.conv_out|quant_conv|norm"

    model: AutoencoderKLODVAE | AutoencoderKL

    def __init__(self, model: AutoencoderKLODVAE | AutoencoderKL, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: Tensor, step: int, rank: int) -> dict[str, Tensor]:
        x = batch.to(next(self.model.parameters()).device)
        if isinstance(self.model, AutoencoderKL):
            x = as_images(self.model, x)
        (posterior,) = self.model.encode(x, return_dict=False)
        noise = torch.randn(posterior.mean.shape, generator=generator(self.config.loop.seed, "posterior", step, rank))
        (decoded,) = self.model.decode(posterior.mean + posterior.std * noise.to(x.device), return_dict=False)
        return reconstruction_loss(x, decoded, posterior.mean, posterior.logvar, self.config.loss)


def make_model(config: ModelConfig) -> AutoencoderKLODVAE | AutoencoderKL:
    """New weights, or those of `init_from`, inflated where they are an image VAE's and a video VAE is asked for."""
    if config.init_from is not None:
        source = load_vae(config.init_from)
        if config.kind == "video" and isinstance(source, AutoencoderKL):
            return inflate(source, config.variant, config.init)
        if isinstance(source, AutoencoderKLODVAE) != (config.kind == "video"):
            raise UserError(f"{config.init_from} holds a video VAE, and model.kind is image")
        return source
    shape = {"latent_channels": config.latent_channels, "block_out_channels": config.block_out_channels,
             "layers_per_block": config.layers_per_block, "norm_num_groups": config.norm_num_groups}
    if config.kind == "video":
        return AutoencoderKLODVAE(variant=config.variant, patch_size=config.patch_size, **shape)
    levels, channels = len(config.block_out_channels), 3 * config.patch_size**2
    return AutoencoderKL(in_channels=channels, out_channels=channels,
                         down_block_types=("DownEncoderBlock2D",) * levels,
                         up_block_types=("UpDecoderBlock2D",) * levels, **shape)


def load_vae(folder: Path | str) -> AutoencoderKLODVAE | AutoencoderKL:
    """A video VAE or an image VAE from a folder that `save_pretrained` wrote, in float32."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a VAE's folder: it has no config.json. Give a folder written by "
                        f"`odvae train` (its `vae`) or by save_pretrained")
    name = AutoencoderKLODVAE.load_config(path).get("_class_name")
    classes = {"AutoencoderKLODVAE": AutoencoderKLODVAE, "AutoencoderKL": AutoencoderKL}
    if name not in classes:
        raise UserError(f"{path}/config.json describes a {name}; expected one of {sorted(classes)}")
    try:
        return classes[name].from_pretrained(path, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the VAE in {path}: {error}") from error


def train(config: TrainConfig) -> Path:
    """Run, or resume, a training; returns the folder of the trained VAE, `output`/vae."""
    torch.manual_seed(config.loop.seed)  # for the initial weights alone
    model = make_model(config.model)
    start_run(config.output, config)
    clips = Clips(config.data)
    shown = torch.stack(clips.held_out()) if config.data.held_out else clips.batch(0, 0, 4, config.loop.seed)

    def evaluate(step: int) -> dict[str, float]:
        decoded = torch.cat([reconstruct(model, x) for x in shown.split(4)])
        pictures = [side_by_side(a, b) for a, b in zip(to_uint8(shown[:6]), to_uint8(decoded[:6]), strict=True)]
        contact_sheet(pictures, config.output / "samples" / f"step-{step:06d}.png", None, scale=1)
        return {"psnr_heldout": float(psnr(shown, decoded).mean())}

    log = fit(config.output, config.loop, Autoencoding(model, config),
              lambda step, rank, _: clips.batch(step, rank, config.loop.batch, config.loop.seed), evaluate)
    folder = config.output / "vae"
    if not is_main_process():
        return folder
    curves({key: ([line["step"] for line in log if key in line], [line[key] for line in log if key in line])
            for key in ("psnr_heldout",)}, config.output / "psnr.png", "held-out PSNR", "step", "dB")
    model.eval()
    if isinstance(model, AutoencoderKLODVAE):
        mean, std = latent_statistics(model, clips, config)
        model.register_to_config(latents_mean=mean, latents_std=std)
    nn.Module.to(model, getattr(torch, config.save_dtype))  # diffusers' own `to` warns of a list that is empty
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def reconstruct(model: AutoencoderKLODVAE | AutoencoderKL, x: Tensor) -> Tensor:
    """Decode the posterior's mean: (B, 3, T, H, W) in [-1, 1] -> the same shape."""
    x = x.to(next(model.parameters()).device)
    if isinstance(model, AutoencoderKLODVAE):
        return model(x).sample.cpu()
    frames = rearrange(model(as_images(model, x)).sample, "(b t) c h w -> b c t h w", b=len(x))
    return unpatchify(frames, math.isqrt(model.config.in_channels // 3)).cpu()


def as_images(model: AutoencoderKL, x: Tensor) -> Tensor:
    """A video (B, 3, T, H, W) as B*T images of an image VAE's channels, pixels folded where it has more than 3."""
    return rearrange(patchify(x, math.isqrt(model.config.in_channels // 3)), "b c t h w -> (b t) c h w")


@torch.inference_mode()
def latent_statistics(model: AutoencoderKLODVAE, clips: Clips, config: TrainConfig,
                      batches: int = 16) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the encoder's means over random training windows."""
    device = next(model.parameters()).device
    moments = torch.cat([model.encode_piece(clips.batch(i, 0, config.loop.batch, -1).to(device))[0].cpu()
                         for i in range(batches)])
    means = moments[:, : model.latent_channels]
    return means.mean(dim=(0, 2, 3, 4)).tolist(), means.std(dim=(0, 2, 3, 4)).tolist()
