"""Train an LVDM on a latent cache: rectified flow with a noise level of its own for each group (diffusion forcing)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from odvae import AutoencoderKLODVAE
from odvae.runtime.config import Config
from odvae.runtime.distributed import is_main_process
from odvae.runtime.errors import UserError
from odvae.runtime.figures import contact_sheet, curves
from odvae.runtime.seeding import generator
from odvae.runtime.training import LoopConfig, Objective, fit, start_run
from odvae.runtime.training_log import sample_path
from odvae.train import load_vae
from odvae.weights import DEMO_VAE

from .cached_text import CachedText
from .defaults import GUIDANCE_SCALE, STEPS
from .flow import drop_condition, interpolate, noise_levels, velocity
from .model.groups import group_sizes
from .model.transformer import LVDMTransformer3DModel
from .pipeline import LVDMPipeline
from .text import load_text_encoder
from .windows import LatentWindows, WindowConfig, Windows

logger = logging.getLogger("odvae")


class ModelConfig(Config):
    init_from: Path | None = None  # a transformer's folder to go on from; its config then decides
    patch_size: int = 2
    hidden_size: int = 192
    num_layers: int = 8
    num_attention_heads: int = 6
    mlp_ratio: float = 4.0
    group_size: int = Field(2, ge=1)  # latent frames that are made together


class FlowConfig(Config):
    mean: float = 0.0  # of the logit-normal density of timesteps
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0)
    clean_prefix: float = Field(0.5, ge=0, le=1)  # share of samples with a nearly clean history
    history_noise: float = Field(0.1, ge=0, lt=1)  # its highest noise level
    first_weight: float = Field(1.0, gt=0)  # of the first latent in the loss: what it shows, the whole video keeps
    drop_condition: float = Field(0.1, ge=0, lt=1)  # share of captions left out, for guidance


class SampleConfig(Config):
    prompts: tuple[str, ...] = ()  # none: those of held-out clips
    count: int = Field(4, ge=0)
    steps: int = Field(STEPS, ge=1)
    guidance_scale: float = GUIDANCE_SCALE


class TrainConfig(Config):
    output: Path = Path("outputs/lvdm")
    vae: Path = DEMO_VAE  # the OD-VAE that made the cache
    text_encoder: str | None = None  # a transformers encoder's folder or hub name; none: the built-in one
    windows: WindowConfig = WindowConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    sample: SampleConfig = SampleConfig()
    loop: LoopConfig = LoopConfig()
    save_dtype: Literal["float32", "float16"] = "float32"


class FlowMatching(Objective):
    """E |v(x_t, t, caption) - (e - x_0)|^2 over the groups that are not history."""

    not_hidden = r"embed|adaln|modulation|norm|project_out"

    model: LVDMTransformer3DModel

    def __init__(self, model: LVDMTransformer3DModel, captions: CachedText, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.captions, self.config = model, captions, config

    def forward(self, batch: Windows, step: int, rank: int) -> dict[str, Tensor]:
        rng = generator(self.config.loop.seed, "flow", step, rank)
        return {"loss": self.loss(batch, rng)}

    def loss(self, batch: Windows, rng: torch.Generator) -> Tensor:
        flow, device = self.config.flow, next(self.model.parameters()).device
        b, _, frames = batch.latents.shape[:3]
        groups = group_sizes(frames, self.model.config.group_size)
        t = noise_levels(rng, b, groups, mean=flow.mean, std=flow.std, shift=flow.shift,
                         clean_prefix=flow.clean_prefix, history_noise=flow.history_noise)
        noise = torch.randn(batch.latents.shape, generator=rng)
        dropped = drop_condition(rng, b, flow.drop_condition).tolist()
        text, mask = self.captions(["" if drop else caption for caption, drop in
                                    zip(batch.captions, dropped, strict=True)])
        x0, noise, t, text, mask = (v.to(device) for v in (batch.latents, noise, t, text, mask))
        predicted = self.model(interpolate(x0, noise, t), t, text, mask, groups=groups,
                               positions=batch.positions).sample
        error = (predicted.float() - velocity(x0, noise)).square().mean(dim=(1, 3, 4))  # (B, T)
        weight = (t > flow.history_noise).float()  # at lower levels the noise that is asked for can hardly be seen
        weight[:, 0] *= flow.first_weight
        return (error * weight).sum() / weight.sum().clamp(min=1)


def train(config: TrainConfig) -> Path:
    """Run, or resume, a training; returns the folder of the trained pipeline, `output`/pipeline."""
    vae = load_vae(config.vae)
    if not isinstance(vae, AutoencoderKLODVAE):
        raise UserError(f"{config.vae} holds an image VAE; an LVDM trains on the latents of an OD-VAE")
    text_encoder = load_text_encoder(config.text_encoder)
    torch.manual_seed(config.loop.seed)  # for the initial weights alone
    windows = LatentWindows(config.windows, vae, config.model.group_size, config.model.patch_size, config.loop.seed,
                            config.loop.batch)
    model = make_model(config, windows, text_encoder.dim)
    start_run(config.output, config)
    captions = CachedText(text_encoder, windows.caches, config.text_encoder or "built-in")
    objective = FlowMatching(model, captions, config)
    pipeline = LVDMPipeline.build(vae, model, text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    held_out = windows.held_out_batches()
    prompts = list(config.sample.prompts or [caption for batch in held_out for caption in batch.captions])
    prompts = prompts[: config.sample.count]

    def evaluate(step: int) -> dict[str, float]:
        figures = {}
        if held_out:
            with torch.inference_mode():
                losses = [float(objective.loss(batch, generator(0, "held out", batch.numbers[0])))
                          for batch in held_out]
            figures["loss_heldout"] = sum(losses) / len(losses)
        if prompts:
            videos = pipeline(prompts, frames=config.windows.frames, steps=config.sample.steps,
                              guidance_scale=config.sample.guidance_scale, seed=list(range(len(prompts)))).frames
            contact_sheet(list(videos), sample_path(config.output, step), prompts)
        return figures

    log = fit(config.output, config.loop, objective, windows.batch, evaluate)
    folder = config.output / "pipeline"
    if not is_main_process():
        return folder
    curves({key: ([line["step"] for line in log if key in line], [line[key] for line in log if key in line])
            for key in ("loss", "loss_heldout")}, config.output / "loss.png", "rectified-flow loss", "step", "loss")
    model.eval()
    for part in (vae, model):
        nn.Module.to(part, getattr(torch, config.save_dtype))  # diffusers' own `to` warns of a list that is empty
    pipeline.save_pretrained(folder)
    return folder


def make_model(config: TrainConfig, windows: LatentWindows, text_dim: int) -> LVDMTransformer3DModel:
    """New weights of the size asked for, or those of `init_from`, which must be for such latents."""
    fixed = {"in_channels": windows.vae.latent_channels, "text_dim": text_dim, "frame_rate": windows.frame_rate}
    if config.model.init_from is not None:
        try:
            model = LVDMTransformer3DModel.from_pretrained(config.model.init_from, torch_dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load a transformer from {config.model.init_from}: {error}") from error
        different = [f"{field}: {model.config[field]} there, {value} here" for field, value in fixed.items()
                     if model.config[field] != value]
        if different:
            raise UserError(f"the transformer in {config.model.init_from} is for other data than "
                            f"{windows.caches[0].path} ({'; '.join(different)}); build a cache for it, or train anew")
        return model
    ratio = windows.vae.spatial_compression_ratio
    return LVDMTransformer3DModel(sample_height=windows.size[0] * ratio, sample_width=windows.size[1] * ratio, **fixed,
                                  **config.model.model_dump(exclude={"init_from"}))
