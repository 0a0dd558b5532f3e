"""Distill a small causal decoder from any video VAE, so that its latents are decoded several times as fast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ..data.dataset import DataConfig, VideoBatch
from ..data.transforms import to_uint8
from ..inference.fingerprint import vae_fingerprint
from ..losses.perceptual import PerceptualConfig, make_perceptual
from ..metrics.psnr import psnr
from ..model.distilled_decoder import DistilledDecoder
from ..trainer.distributed import is_main_process
from ..trainer.evaluation import EvaluationGroup, evenly
from ..trainer.metrics import sample_path
from ..trainer.trainer import LoopConfig, Objective, fit, start_run
from ..utils.config import Config, OutputPath
from ..utils.errors import UserError
from ..utils.files import atomic_folder
from ..utils.plots import contact_sheet, curves, side_by_side
from .distill_data import (
    CacheData,
    DistillationData,
    LatentBatch,
    Sample,
    Teacher,
    VideoData,
    latent_statistics,
    sample_of,
)

SHOWN = 6  # clips in the contact sheet


class DecoderConfig(Config):
    """See `DistilledDecoder`. The defaults of the growths are for a VAE that compresses 4x in time and 8x in space."""

    widths: tuple[int, ...] = (64, 48, 48)
    blocks: tuple[int, ...] = (2, 1, 2)
    time_growth: tuple[int, ...] = (2, 2)
    space_growth: tuple[int, ...] = (1, 2)


class DistillationLossConfig(Config):
    """The loss is the sum, over the targets with a weight, of weight (l1 |x - y| + l2 (x - y)^2), each a mean over all
    values, and of the perceptual distances to the same targets."""

    teacher: float = Field(1.0, ge=0)  # weight of the error against the VAE's own frames; costs their decoding
    source: float = Field(0.0, ge=0)  # weight of the error against the footage; needs video files
    l1: float = Field(0.5, ge=0)
    l2: float = Field(2.0, ge=0)
    perceptual: PerceptualConfig = PerceptualConfig()


class DistillConfig(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"output", "save_dtype"})

    vae: str  # a folder or hub name: ours, imported, or diffusers'
    output: OutputPath = Path("outputs/distilled")
    cache: Path | None = None  # a latent cache of the VAE, instead of `data`'s videos; `data.frames` of each clip
    data: DataConfig = DataConfig()
    decoder: DecoderConfig = DecoderConfig()
    loss: DistillationLossConfig = DistillationLossConfig()
    loop: LoopConfig = LoopConfig()
    save_dtype: Literal["float32", "float16"] = "float32"


class DistillationObjective(Objective):
    """The decoder's error against what the teacher decodes, and against the footage."""

    non_muon_pattern = r"conv_in|conv_out"
    uses_every_parameter = True
    can_be_sharded = False  # half a million parameters, beside a whole teacher in every process

    model: DistilledDecoder

    def __init__(self, model: DistilledDecoder, teacher: Teacher, loss: DistillationLossConfig) -> None:
        super().__init__()
        self.model, self.teacher, self.loss = model, teacher, loss
        self.perceptual = make_perceptual(loss.perceptual) if loss.perceptual.weight > 0 else None

    def forward(self, batch: VideoBatch | LatentBatch, step: int, micro_batch: int) -> dict[str, Tensor]:
        with torch.no_grad():
            latents, source = sample_of(batch, self.teacher, next(self.teacher.parameters()).device)
            targets = {"teacher": self.teacher.decode(latents) if self.loss.teacher else None,
                       "source": source if self.loss.source else None}
        decoded = self.model(latents)
        losses = {"loss": decoded.new_zeros((), dtype=torch.float32)}
        for name, target in targets.items():
            if target is not None:
                losses |= self._errors(name, decoded, target, step)
                losses["loss"] = losses["loss"] + getattr(self.loss, name) * losses[f"{name}_error"]
        return losses

    def _errors(self, name: str, decoded: Tensor, target: Tensor, step: int) -> dict[str, Tensor]:
        error = decoded.float() - target
        l1, l2 = error.abs().mean(), error.square().mean()
        losses = {f"{name}_l1": l1, f"{name}_l2": l2, f"{name}_error": self.loss.l1 * l1 + self.loss.l2 * l2}
        weight = self.loss.perceptual.weight_at(step)
        if weight and self.perceptual is not None:
            losses[f"{name}_perceptual"] = self.perceptual(target, decoded)
            losses[f"{name}_error"] = losses[f"{name}_error"] + weight * losses[f"{name}_perceptual"]
        return losses


def make_data(config: DistillConfig, teacher: Teacher) -> DistillationData:
    """Open what the config says to train on. Raises UserError where the loss needs footage and there are latents only.
    """
    if not config.loss.teacher and not config.loss.source:
        raise UserError("loss.teacher and loss.source are both 0, so there is nothing to learn from")
    if config.cache is None:
        return VideoData(config.data, teacher, config.loop.micro_batch_size, config.loop.seed)
    if config.loss.source:
        raise UserError(f"loss.source={config.loss.source:g} needs the footage, and {config.cache} holds latents only; "
                        f"set loss.source=0, or train on video files (data.folder)")
    return CacheData(config.cache, teacher, frames=config.data.frames, held_out=config.data.held_out,
                     batch=config.loop.micro_batch_size, seed=config.loop.seed)


def distill(config: DistillConfig, change_schedule: bool = False) -> Path:
    """Start or resume a distillation; returns the folder of the decoder, `output`/decoder. `change_schedule`: see
    `start_run`."""
    teacher = Teacher(config.vae)
    data = make_data(config, teacher)
    start_run(config.output, config, change_schedule)
    mean, std = latent_statistics(data, teacher)
    torch.manual_seed(config.loop.seed)  # only for the initial weights
    decoder = DistilledDecoder(
        latent_channels=len(mean), temporal_compression=teacher.time, spatial_compression=teacher.space,
        latents_mean=mean, latents_std=std, vae_fingerprint=vae_fingerprint(teacher.model),
        **config.decoder.model_dump())
    objective, clips = DistillationObjective(decoder, teacher, config.loss), data.held_out()

    def evaluate(step: int, group: EvaluationGroup) -> dict[str, float]:
        return evaluate_decoder(decoder, teacher, clips, sample_path(config.output, step), group)

    log = fit(config.output, config.loop, objective, data.batch, evaluate)
    folder = config.output / "decoder"
    if is_main_process():
        draw_curves(log, config.output)
        nn.Module.to(decoder.eval(), getattr(torch, config.save_dtype))
        with atomic_folder(folder, replace=True) as temporary:
            decoder.save_pretrained(temporary)
    return folder


@torch.inference_mode()
def evaluate_decoder(decoder: DistilledDecoder, teacher: Teacher, clips: Sequence[Sample], path: Path,
                     group: EvaluationGroup) -> dict[str, float]:
    """Decode held-out latents; return the mean PSNR of a frame against the teacher's, and against the footage where it
    is there, that of the teacher too. Writes a contact sheet to `path`: the teacher's frames above the decoder's."""
    device = next(decoder.parameters()).device

    def evaluate(i: int) -> tuple[dict[str, float], list[np.ndarray]]:
        latents, source = clips[i]
        latents = latents.to(device)
        decoded, expected = (video.float().cpu() for video in (decoder(latents), teacher.decode(latents)))
        metrics = {"psnr_teacher_heldout": float(psnr(expected, decoded).mean())}
        if source is not None:
            metrics |= {"psnr_heldout": float(psnr(source, decoded).mean()),
                        "teacher_psnr_heldout": float(psnr(source, expected).mean())}
        return metrics, [side_by_side(to_uint8(expected)[0], to_uint8(decoded)[0])] if i < SHOWN else []

    results = group.evaluate("held-out clips", len(clips), lambda some: [evaluate(i) for i in some],
                             lambda limit: evenly(limit, len(clips))).values()
    if is_main_process():
        contact_sheet([sheet for _, shown in results for sheet in shown], path, None, scale=1)
    every = [metrics for metrics, _ in results]
    return {name: sum(metrics[name] for metrics in every) / len(every) for name in every[0]}


def draw_curves(log: list[dict[str, float]], folder: Path) -> None:
    """Write psnr.png and losses.png."""
    def series(names: list[str]) -> dict[str, tuple[list[float], list[float]]]:
        return {name: ([line["step"] for line in log if name in line], [line[name] for line in log if name in line])
                for name in names if any(name in line for line in log)}

    curves(series(["psnr_teacher_heldout", "psnr_heldout", "teacher_psnr_heldout"]), folder / "psnr.png",
           "held-out PSNR", "step", "dB")
    curves(series([f"{target}_{term}" for target in ("teacher", "source") for term in ("l1", "l2", "perceptual")]),
           folder / "losses.png", "loss terms", "step", "unweighted")
