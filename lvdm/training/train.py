"""Train an LVDM on latent caches, from scratch or from trained weights, fully or with a LoRA."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from odvae import AutoencoderKLODVAE
from odvae.inference.loading import load_vae
from odvae.trainer.distributed import is_main_process
from odvae.trainer.metrics import sample_path
from odvae.trainer.trainer import LoopConfig, fit, start_run
from odvae.utils.config import Config, OutputPath
from odvae.utils.errors import NonFiniteError, UserError
from odvae.utils.plots import contact_sheet, curves
from odvae.weights import DEMO_VAE

from ..condition import conditioner
from ..defaults import GUIDANCE_SCALE, STEPS
from ..model.presets import PRESETS
from ..model.transformer import LVDMTransformer3DModel
from ..sampling.pipeline import LVDMPipeline
from ..text import TextEncoder, load_text_encoder
from .lora import LoraConfig, add_lora, merge_lora
from .objective import FlowConfig, FlowMatching, NoiseSampler, held_out_losses
from .text_embeddings import TextEmbeddingCache
from .windows import LatentWindows, WindowConfig

logger = logging.getLogger("odvae")

MAX_CLASSES = 10_000


class ModelConfig(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"attention"})

    init_from: Path | None = None  # a transformer's folder to start from; its config then replaces the sizes
    preset: str | None = None  # a size of `model.presets`, in place of the next four
    hidden_size: int = 192
    num_layers: int = 8
    num_attention_heads: int = 6
    mlp_ratio: float = 4.0
    patch_size: int = 2
    group_size: int = Field(2, ge=1)  # latent frames that are generated together
    rope_theta: float = Field(100.0, gt=1)
    attention: str | None = None  # one of diffusers' attention backends, such as flex or flash; None: torch's own
    lora: LoraConfig | None = None  # train a LoRA of `init_from` instead of all weights


class SampleConfig(Config):
    prompts: tuple[str, ...] = ()  # empty: those of held-out clips
    count: int = Field(4, ge=0)
    steps: int = Field(STEPS, ge=1)
    guidance_scale: float = GUIDANCE_SCALE


class TrainConfig(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"output", "sample", "save_dtype"})

    output: OutputPath = Path("outputs/lvdm")
    vae: Path = DEMO_VAE  # the OD-VAE that the cache was built with
    condition: Literal["text", "class", "none"] = "text"  # class: each caption in the cache is a class
    text_encoder: str | None = None  # a transformers encoder's folder or hub name; None: the built-in one
    windows: WindowConfig = WindowConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    sample: SampleConfig = SampleConfig()
    loop: LoopConfig = LoopConfig()
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


def train(config: TrainConfig, change_schedule: bool = False) -> Path:
    """Run or resume a training; return the folder of the trained pipeline, `output`/pipeline. `change_schedule`: see
    `start_run`."""
    vae = load_vae(config.vae)
    if not isinstance(vae, AutoencoderKLODVAE):
        raise UserError(f"{config.vae} holds an image VAE; an LVDM trains on the latents of an OD-VAE")
    encoder = load_text_encoder(config.text_encoder) if config.condition == "text" else None
    windows, model = make_model(config, vae, encoder)
    if config.model.attention is not None:
        set_attention(model, config.model.attention)
    start_run(config.output, config, change_schedule)
    for line in windows.describe().splitlines():
        logger.info("%s", line)
    text = None if encoder is None else TextEmbeddingCache(encoder, windows.caches, config.text_encoder or "built-in")
    objective = FlowMatching(model, config.flow)
    sampler = NoiseSampler(config.flow, conditioner(model, text), seed=config.loop.seed,
                           group_size=model.config.group_size, patch_size=model.config.patch_size)
    pipeline = LVDMPipeline.build(vae, model, encoder)
    pipeline.set_progress_bar_config(disable=True)
    held_out = windows.held_out_batches()
    prompts = _sample_prompts(config, [caption for batch in held_out for caption in batch.captions])

    def evaluate(step: int) -> dict[str, float]:
        figures = {}
        if held_out:
            with torch.inference_mode():
                figures = held_out_losses(objective, sampler, held_out)
        if prompts:
            try:
                videos, = pipeline(prompts, num_frames=config.windows.frames, num_inference_steps=config.sample.steps,
                                   guidance_scale=config.sample.guidance_scale, seed=list(range(len(prompts))),
                                   output_type="uint8", return_dict=False)
                contact_sheet(list(videos), sample_path(config.output, step), prompts)
            except NonFiniteError as error:  # the weights may recover; if not, the training stops itself
                logger.warning("no samples at step %d: %s", step, error)
        return figures

    # With windows.tokens, batches do not have loop.micro_batch_size samples: `fit` then counts micro-batches.
    loop = config.loop if config.windows.tokens is None else config.loop.model_copy(update={"micro_batch_size": 1})
    log = fit(config.output, loop, objective,
              lambda step, micro_batch, count: sampler(windows.batch(step, micro_batch, count), step), evaluate)
    if is_main_process():
        _finish(config, log, model, pipeline)
    return config.output / "pipeline"


def _sample_prompts(config: TrainConfig, captions: list[str]) -> list[str]:
    """The prompts of the samples during training: those configured, else the held-out clips' captions."""
    if config.condition == "none":
        if any(config.sample.prompts):
            raise UserError("condition=none: the model takes no prompts; remove sample.prompts")
        return [""] * config.sample.count
    return list(config.sample.prompts or captions)[: config.sample.count]


def _finish(config: TrainConfig, log: list[dict[str, float]], model: LVDMTransformer3DModel,
            pipeline: LVDMPipeline) -> None:
    """Save the loss curves, the adapter if there is one, and the pipeline."""
    names = [key for key in ("loss", "loss_heldout") if any(key in line for line in log)]
    curves({key: ([line["step"] for line in log if key in line], [line[key] for line in log if key in line])
            for key in names}, config.output / "loss.png", "rectified-flow loss", "step", "loss")
    model.eval()
    if config.model.lora is not None:
        merge_lora(model, config.output / "lora")
    for module in (pipeline.vae, model):
        nn.Module.to(module, getattr(torch, config.save_dtype))  # diffusers' own `to` warns about an empty list
    pipeline.save_pretrained(config.output / "pipeline")


def load_transformer(folder: Path) -> LVDMTransformer3DModel:
    """Load from a transformer's folder, or a pipeline's. Raises UserError."""
    inside = folder / "transformer"
    try:
        return LVDMTransformer3DModel.from_pretrained(inside if inside.is_dir() else folder, torch_dtype=torch.float32,
                                                      use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a transformer from {folder}: {error}") from error


def set_attention(model: LVDMTransformer3DModel, backend: str) -> None:
    """Set the attention backend. Raises UserError if diffusers has no such backend, or its requirements are not met."""
    if backend == "flex" and not torch.cuda.is_available():
        raise UserError("model.attention=flex: FlexAttention trains only on an accelerator, and there is none; omit it "
                        "for torch's own kernels, which give the same result")
    try:
        model.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.attention={backend}: {error}") from error


def make_model(config: TrainConfig, vae: AutoencoderKLODVAE,
               encoder: TextEncoder | None) -> tuple[LatentWindows, LVDMTransformer3DModel]:
    """Build the data and the model as it is before the first step, including its LoRA."""
    torch.manual_seed(config.loop.seed)  # for the initial weights only
    trained = None if config.model.init_from is None else load_transformer(config.model.init_from)
    sizes = config.model if trained is None else trained.config
    windows = LatentWindows(config.windows, vae, sizes.group_size, sizes.patch_size, config.loop.seed,
                            config.loop.micro_batch_size)
    model = _make_transformer(config, windows, trained, encoder)
    if config.model.lora is not None:
        add_lora(model, config.model.lora)
    return windows, model


def _make_transformer(config: TrainConfig, windows: LatentWindows, trained: LVDMTransformer3DModel | None,
                      encoder: TextEncoder | None) -> LVDMTransformer3DModel:
    """Create new weights of the configured size, or check that the trained ones fit these latents and conditions."""
    required: dict[str, Any] = {"in_channels": windows.vae.latent_channels, "text_dim": encoder.dim if encoder else 0}
    if config.condition == "class":
        required["class_names"] = _class_names(windows)
    if trained is not None:
        different = [f"{field}: {_describe(trained.config[field])} there, {_describe(value)} here"
                     for field, value in required.items() if _as_list(trained.config[field]) != _as_list(value)]
        if different:
            raise UserError(f"the transformer in {config.model.init_from} is for other data than "
                            f"{windows.caches[0].path} ({'; '.join(different)}); build a cache for it, or train from "
                            "scratch")
        return trained
    if config.model.lora is not None:
        raise UserError("model.lora adapts trained weights: give their folder as model.init_from")
    sizes = config.model.model_dump(exclude={"init_from", "preset", "attention", "lora"})
    if config.model.preset is not None:
        if config.model.preset not in PRESETS:
            raise UserError(f"unknown model.preset {config.model.preset!r}; choose from {', '.join(PRESETS)}")
        sizes |= PRESETS[config.model.preset]
    height, width = windows.size
    ratio = windows.vae.spatial_compression_ratio
    return LVDMTransformer3DModel(sample_height=height * ratio, sample_width=width * ratio,
                                  frame_rate=windows.frame_rate, **required, **sizes)


def _class_names(windows: LatentWindows) -> list[str]:
    """Every caption of the caches, sorted. Raises UserError if there are too many to be classes."""
    captions = {name for cache in windows.caches for name in cache.all_captions()["caption"].unique().to_pylist()}
    names = sorted(captions - {""})
    if not 0 < len(names) <= MAX_CLASSES:
        raise UserError(f"condition=class: {windows.caches[0].path} has {len(names)} different captions, not "
                        f"1 to {MAX_CLASSES}. Train with condition=text, or build the cache from one folder per class")
    return names


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _describe(value: Any) -> str:
    return f"{len(value)} classes" if isinstance(value, list | tuple) else str(value)
