"""Train an OD-VAE on a folder of videos or, with model.kind = image, the image VAE that it is inflated from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import model_validator
from torch import Tensor, nn

from ..convert.inflate import Init, inflate
from ..data.dataset import DataConfig, VideoBatch, VideoClipDataset
from ..data.probing import ProbeResults
from ..data.transforms import to_float
from ..inference.loading import load_vae
from ..inference.memory import free_memory
from ..losses.adversarial import DiscriminatorObjective, adaptive_weight
from ..losses.latents import LATENT_TERMS
from ..losses.perceptual import make_perceptual
from ..losses.reconstruction import LossConfig, reconstruction_loss
from ..losses.terms import TermConfig
from ..model import AutoencoderKLODVAE
from ..model.norm import NormKind
from ..model.resample import UpsampleMode
from ..trainer.distributed import best_device, is_main_process
from ..trainer.evaluation import EvaluationGroup
from ..trainer.memory import settle_checkpointing
from ..trainer.metrics import sample_path
from ..trainer.objective import Example
from ..trainer.trainer import LoopConfig, Objective, fit, start_run
from ..utils.config import Config, OutputPath
from ..utils.errors import UserError
from ..utils.files import atomic_folder
from ..utils.finite import is_finite, non_finite
from ..utils.plots import curves
from ..utils.seeding import generator
from .heldout import as_images, as_video, evaluate_heldout
from .latent_terms import weighted_latent_losses
from .stages import Stage, StageConfig, first_step, resolve_stages

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

logger = logging.getLogger("odvae")

OTHER_NETWORKS = 4096  # values a pixel that a perceptual loss and a critic keep at most


class ModelConfig(Config):
    kind: Literal["video", "image"] = "video"  # image: diffusers' AutoencoderKL, on single frames
    init_from: Path | None = None  # the folder of an image VAE to inflate, or of a VAE of this kind to continue from
    init: Init = "tail"
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    variant: int | dict[str, tuple[str, ...]] = 4  # see odvae.model.variants
    patch_size: int = 1
    time_compression: int = 4
    norm: NormKind = "frame"
    upsample: UpsampleMode = "nearest"

    def video_options(self) -> dict[str, Any]:
        """Return the arguments that only a video VAE has."""
        return {"variant": self.variant, "time_compression": self.time_compression, "norm": self.norm,
                "upsample": self.upsample}


class TrainConfig(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"output", "save_dtype"})

    output: OutputPath = Path("outputs/odvae")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    freeze_encoder: bool = False  # train only the decoder: latents and caches stay valid
    loop: LoopConfig = LoopConfig()
    stages: tuple[StageConfig, ...] = ()  # in sequence; their steps add up to loop.steps
    save_dtype: Literal["float32", "float16"] = "float32"

    @model_validator(mode="after")
    def _stages_fit(self) -> TrainConfig:
        self.resolved_stages()
        return self

    def resolved_stages(self) -> list[Stage]:
        return resolve_stages(self.stages, self.loop.steps, self.data, self.loss, self.freeze_encoder)


class AutoencoderObjective(Objective):
    """Reconstruction of a posterior sample, with optional perceptual and adversarial terms.

    An image VAE takes a video (B, 3, T, H, W) as B*T images; the losses are those of the video.
    """

    non_muon_pattern = r"conv_in|encoder\.conv_out|decoder\.conv_out|quant_conv|norm"
    checkpointing_modes = ("none", "full")  # its attention is a small part
    can_be_sharded = False  # stages freeze parts of the model, and it is called by encode and decode

    model: AutoencoderKLODVAE | AutoencoderKL

    def __init__(self, model: AutoencoderKLODVAE | AutoencoderKL, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.seed, self.stages = model, config.loop.seed, config.resolved_stages()
        self.micro_batch_size = config.loop.micro_batch_size
        terms = ("perceptual", "adversarial", *LATENT_TERMS)
        self._term_starts = {term: first_step(self.stages, term) for term in terms}
        if self._term_starts["future_dropping"] is not None and not getattr(model, "causal", False):
            raise UserError("loss.future_dropping needs a causal video VAE (model.kind=video, model.norm=frame, "
                            "model.upsample=nearest): in another, latents know the frames that follow")
        has_perceptual = self._term_starts["perceptual"] is not None
        self.perceptual = make_perceptual(self.stages[0].loss.perceptual) if has_perceptual else None
        self._critic = (self._make_critic(),)  # in a tuple, so that it is no submodule

    @property
    def critic(self) -> DiscriminatorObjective | None:
        return self._critic[0]

    def _make_critic(self) -> DiscriminatorObjective | None:
        begin = self._term_starts["adversarial"]
        if begin is None:
            return None
        starts = (max(stage.begin, begin + stage.loss.adversarial.start) for stage in self.stages
                  if stage.loss.adversarial.weight > 0 and begin + stage.loss.adversarial.start < stage.end)
        return DiscriminatorObjective(self.stages[0].loss.adversarial.critic, start_step=min(starts, default=0))

    def stage(self, step: int) -> Stage:
        return next(stage for stage in self.stages if step < stage.end)

    def examples(self) -> list[Example]:
        """The largest bucket of each stage, in its last step, when all of its terms are at work."""
        return [stage.example(self.micro_batch_size, self.stages[-1].end) for stage in self.stages]

    def activation_bound(self, batch: VideoBatch) -> float:
        """As if every layer were as large as the largest and kept all its tensors, with a term for each of the other
        networks."""
        config = self.model.config
        widths, layers = config.block_out_channels, 2 * config.layers_per_block + 1
        patch = config.patch_size**2 if isinstance(self.model, AutoencoderKLODVAE) else config.in_channels // 3
        widest = max(max(widths[level:level + 2]) / 4**level for level in range(len(widths))) / patch
        values = 12 * (len(widths) * layers + 4) * widest + OTHER_NETWORKS
        passes = 1 + sum(self._term_starts[term] is not None for term in LATENT_TERMS)
        samples, _, frames, height, width = batch.video.shape
        return 4 * passes * values * samples * (frames + 2) * height * width

    def learning_rate_scale(self, step: int) -> float:
        return self.stage(step).learning_rate

    def _weight(self, term: TermConfig, name: str, step: int) -> float:
        return term.weight_at(step - (self._term_starts[name] or 0))

    def forward(self, batch: VideoBatch, step: int, micro_batch: int) -> dict[str, Tensor]:
        stage, device = self.stage(step), next(self.model.parameters()).device
        for part in (self.model.encoder, self.model.quant_conv):
            if part is not None:
                part.requires_grad_(not stage.freeze_encoder)
        video = to_float(batch.video.to(device, non_blocking=True))
        posterior = self._encode(video)
        noise = torch.randn(posterior.mean.shape, generator=generator(self.seed, "posterior", step, micro_batch),
                            pin_memory=device.type == "cuda")
        z = posterior.mean + posterior.std * noise.to(device, non_blocking=True)
        decoded = self._decode(z, len(video))
        losses = reconstruction_loss(video, decoded, posterior.mean, posterior.logvar, stage.loss)

        weight = self._weight(stage.loss.perceptual, "perceptual", step)
        if weight and self.perceptual is not None:
            losses["perceptual"] = self.perceptual(video, decoded)
            losses["loss"] = losses["loss"] + weight * losses["perceptual"]
        weight = self._weight(stage.loss.adversarial, "adversarial", step)
        if weight and self.critic is not None:
            losses["adversarial"] = self.critic.generator_loss(decoded)
            losses["adaptive_weight"] = adaptive_weight(losses["loss"], losses["adversarial"],
                                                        self.model.decoder.conv_out.weight,
                                                        stage.loss.adversarial.max_adaptive)
            losses["loss"] = losses["loss"] + weight * losses["adaptive_weight"] * losses["adversarial"]
            losses["critic_batch"] = torch.stack([video, decoded.detach().to(video.dtype)])
        weights = {term: self._weight(getattr(stage.loss, term), term, step) for term in LATENT_TERMS}
        losses |= weighted_latent_losses(losses["loss"], stage.loss, weights, video, posterior.mean, z, self._encode,
                                         self._decode, lambda term: generator(self.seed, term, step, micro_batch))
        return losses

    def _encode(self, video: Tensor) -> Any:
        """The posterior of a video (B, 3, T, H, W), in the model's own layout: of an image VAE (B*T, c, h, w)."""
        x = video if isinstance(self.model, AutoencoderKLODVAE) else as_images(self.model, video)
        return self.model.encode(x, return_dict=False)[0]

    def _decode(self, z: Tensor, batch: int) -> Tensor:
        """The video of latents in the model's layout."""
        (decoded,) = self.model.decode(z, return_dict=False)
        return decoded if isinstance(self.model, AutoencoderKLODVAE) else as_video(self.model, decoded, batch)


def make_model(config: ModelConfig) -> AutoencoderKLODVAE | AutoencoderKL:
    """Create a VAE with new weights, or with those of `init_from`, inflated if a video VAE starts from an image VAE."""
    if config.init_from is not None:
        source = load_vae(config.init_from)
        if config.kind == "video" and not isinstance(source, AutoencoderKLODVAE):
            return inflate(source, init=config.init, **config.video_options())
        if isinstance(source, AutoencoderKLODVAE) != (config.kind == "video"):
            raise UserError(f"{config.init_from} holds a video VAE, but model.kind is image; set model.kind=video")
        return source
    shape = {"latent_channels": config.latent_channels, "block_out_channels": config.block_out_channels,
             "layers_per_block": config.layers_per_block, "norm_num_groups": config.norm_num_groups}
    if config.kind == "video":
        return AutoencoderKLODVAE(patch_size=config.patch_size, **config.video_options(), **shape)
    from diffusers import AutoencoderKL

    levels, channels = len(config.block_out_channels), 3 * config.patch_size**2
    return AutoencoderKL(in_channels=channels, out_channels=channels,
                         down_block_types=("DownEncoderBlock2D",) * levels,
                         up_block_types=("UpDecoderBlock2D",) * levels, **shape)


def train(config: TrainConfig, change_schedule: bool = False) -> Path:
    """Start or resume a training; returns the folder of the trained VAE, `output`/vae. `change_schedule`: see
    `start_run`."""
    torch.manual_seed(config.loop.seed)  # only for the initial weights
    model = make_model(config.model)
    objective = AutoencoderObjective(model, config)
    start_run(config.output, config, change_schedule)
    clips = stage_clips(objective.stages)
    last = clips[-1]  # every stage is evaluated on the last stage's data, so that all points of a curve compare
    held_out = last.held_out()
    originals = torch.stack(held_out) if held_out else to_float(last.batch(0, 0, 4, config.loop.seed).video)

    def get_batch(step: int, micro_batch: int, _: int) -> VideoBatch:
        current = clips[objective.stages.index(objective.stage(step))]
        for other in clips:
            if other is not current:
                other.clear_cache()
        return current.batch(step, micro_batch, config.loop.micro_batch_size, config.loop.seed)

    def evaluate(step: int, group: EvaluationGroup) -> dict[str, float]:
        return evaluate_heldout(model, originals, objective.perceptual, sample_path(config.output, step), group)

    loop = settle_checkpointing(objective, config.loop, free_memory(best_device()), objective.critic)
    log = fit(config.output, loop, objective, get_batch, evaluate, objective.critic)
    folder = config.output / "vae"
    if not is_main_process():
        return folder
    draw_curves(log, config.output)
    model.eval()
    if isinstance(model, AutoencoderKLODVAE):
        with torch.compiler.set_stance("force_eager"):  # a few batches are not worth a compilation
            mean, std = latent_statistics(model, last, config)
        model.register_to_config(latents_mean=mean, latents_std=std)
    nn.Module.to(model, getattr(torch, config.save_dtype))  # diffusers' own `to` warns about an empty list
    with atomic_folder(folder, replace=True) as temporary:
        model.save_pretrained(temporary)
    return folder


def stage_clips(stages: list[Stage]) -> list[VideoClipDataset]:
    """Return the dataset of each stage; no stage trains on what the last one holds out."""
    probed: ProbeResults = {}
    last = VideoClipDataset(stages[-1].data, probed)
    datasets = {stages[-1].data: last}
    for stage in stages:
        if stage.data not in datasets:
            datasets[stage.data] = VideoClipDataset(stage.data, probed, last.reserved)
    return [datasets[stage.data] for stage in stages]


def draw_curves(log: list[dict[str, float]], folder: Path) -> None:
    """Write psnr.png, and losses.png with a curve for each loss term that was used."""
    def series(key: str) -> tuple[list[float], list[float]]:
        return [line["step"] for line in log if key in line], [line[key] for line in log if key in line]

    curves({"psnr_heldout": series("psnr_heldout")}, folder / "psnr.png", "held-out PSNR", "step", "dB")
    terms = ("l1", "l2", "perceptual", "adversarial", "critic", *LATENT_TERMS)
    curves({key: series(key) for key in terms if series(key)[0]}, folder / "losses.png", "loss terms", "step",
           "unweighted")


@torch.inference_mode()
def latent_statistics(model: AutoencoderKLODVAE, clips: VideoClipDataset, config: TrainConfig,
                      batches: int = 16) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, per channel, of the encoder's means over random training clips. Batches with
    non-finite values are left out, as in training. Raises NonFiniteError if all are non-finite."""
    device = next(model.parameters()).device
    chunks = [
        rearrange(
            model.encode_chunk(to_float(clips.batch(i, 0, config.loop.micro_batch_size, -1).video.to(device)))[0].cpu()[
                :, : model.latent_channels
            ],
            "b c t h w -> c (b t h w)",
        )
        for i in range(batches)
    ]
    finite = [chunk for chunk in chunks if is_finite(chunk)]
    if not finite:
        raise non_finite("the VAE's encoder", model, "for every training clip")
    if len(finite) < batches:
        logger.info("latent statistics: left out %d of %d batches, not finite", batches - len(finite), batches)
    means = torch.cat(finite, dim=1)  # clips of several sizes
    return means.mean(dim=1).tolist(), means.std(dim=1).tolist()
