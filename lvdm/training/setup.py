"""What a training works on, by the kind of its model: the data, the pipeline with the model, and the objective."""

from __future__ import annotations

import contextlib
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from odvae.cache.format import read_header
from odvae.inference.shipped import find_shipped_vae
from odvae.inference.wan import load_causal_vae
from odvae.trainer.distributed import module_on_accelerator
from odvae.utils.errors import UserError
from odvae.utils.files import atomic_folder, read_json

from ..condition import conditioner
from ..model.presets import PRESETS
from ..model.transformer import LVDMTransformer3DModel
from ..sampling import model_card
from ..sampling.base import VideoPipeline
from ..sampling.pipeline import LVDMPipeline
from ..text import TextEncoder, TransformersEncoder, load_text_encoder
from .batch import BatchShape
from .config import TrainConfig, refuse_inapplicable
from .flow_map import FlowMapMatching, FlowMapNoiseSampler
from .flow_matching import FlowMatching, FlowNoiseSampler
from .lora import add_lora, merge_lora
from .objective import LatentObjective, NoiseSampler
from .text_embeddings import TextEmbeddingCache
from .windows import LatentWindows

logger = logging.getLogger("odvae")

MAX_CLASSES = 10_000


class TrainingSetup(ABC):
    """What `train` works on.

    Attributes:
        windows: the data.
        pipeline: its `transformer` is the model that is trained, as it is before the first step, including its LoRA.
    """

    config: TrainConfig
    windows: LatentWindows
    pipeline: VideoPipeline

    @property
    def model(self) -> Any:
        return self.pipeline.transformer

    @abstractmethod
    def make_objective(self) -> LatentObjective:
        """Make the objective, which knows the largest batch."""

    @abstractmethod
    def make_sampler(self, prompts: Sequence[str]) -> NoiseSampler:
        """Embed the captions of the caches, and the prompts of samples, where that is to be done beforehand."""

    def _largest_batch(self, encoder: Any) -> BatchShape:
        """The largest batch, with the longest text that the encoder gives (None: no text)."""
        samples, latents = self.windows.largest_batch()
        limit = 0
        if encoder is not None:
            limit = encoder.max_tokens if isinstance(encoder, TransformersEncoder) else encoder.config.max_tokens
        return BatchShape(samples, latents, limit)

    @abstractmethod
    def sample(self, prompts: Sequence[str], indices: Sequence[int]) -> list[np.ndarray]:
        """Generate a video for each prompt, uint8 (T, H, W, 3), with the weights as they are. `indices` are those of
        the prompts among all, and the seeds."""

    def sampling_arguments(self, indices: Sequence[int]) -> dict[str, Any]:
        """Arguments of the pipeline for samples."""
        sample, defaults = self.config.sample, self.pipeline.capabilities
        guidance = defaults.guidance_scale if sample.guidance_scale is None else sample.guidance_scale
        return {"num_frames": self.config.windows.frames, "guidance_scale": guidance, "seed": list(indices),
                "num_inference_steps": sample.steps or defaults.num_inference_steps, "output_type": "uint8",
                "return_dict": False}

    def save(self, folder: Path, lora: Path, dtype: torch.dtype = torch.float32) -> None:
        """Save the pipeline to `folder`, in place of one that is there, its transformer in `dtype`. A LoRA is saved
        alone to `lora` and merged into the pipeline's weights."""
        nn.Module.to(self.model, torch.float32)  # diffusers' own `to` warns about an empty list
        self.model.eval()
        if self.config.model.lora is not None:
            merge_lora(self.model, lora)
        nn.Module.to(self.model, dtype)
        with atomic_folder(folder, replace=True) as temporary:
            if (folder / model_card.FILE).exists():  # may be a person's own
                shutil.copy2(folder / model_card.FILE, temporary)
            self.pipeline.save_pretrained(temporary)


class LVDMSetup(TrainingSetup):
    """An LVDM, from scratch or from trained weights, by flow matching.

    Args:
        weights: False: a new model has fake tensors, to estimate what a training takes.
    """

    pipeline: LVDMPipeline

    def __init__(self, config: TrainConfig, *, weights: bool = True) -> None:
        refuse_inapplicable(config, {"diffusion": "an LVDM is trained by flow matching, see `flow`"})
        trained = None if config.model.init_from is None else load_transformer(config.model.init_from)
        folder = config.vae
        if folder is None:
            cache = config.windows.caches[0]
            folder = find_shipped_vae(read_header(cache).vae.fingerprint, str(cache), "vae=")
        vae = load_causal_vae(folder)
        self.config = config
        self.encoder = load_text_encoder(config.text_encoder) if config.condition == "text" else None
        torch.manual_seed(config.loop.seed)  # for the initial weights only
        sizes = config.model if trained is None else trained.config
        self.windows = LatentWindows(config.windows, vae, sizes.group_size, sizes.patch_size, config.loop.seed,
                                     config.loop.micro_batch_size)
        with contextlib.nullcontext() if weights or trained is not None else FakeTensorMode():
            model = _make_transformer(config, self.windows, trained, self.encoder)
        if config.model.lora is not None:
            add_lora(model, config.model.lora)
        self.pipeline = LVDMPipeline.build(vae, model, self.encoder)

    def make_objective(self) -> FlowMatching:
        kind = FlowMatching if self.config.flow.map is None else FlowMapMatching
        objective = kind(self.pipeline.transformer, self.config.flow)
        objective.largest = self._largest_batch(self.encoder)
        return objective

    def make_sampler(self, prompts: Sequence[str]) -> FlowNoiseSampler:
        config, model, text = self.config, self.pipeline.transformer, None
        if self.encoder is not None:
            text = TextEmbeddingCache(self.encoder, self.windows.caches, config.text_encoder or "built-in")
        options = {"seed": config.loop.seed, "group_size": model.config.group_size,
                   "patch_size": model.config.patch_size}
        if config.flow.map is None:
            return FlowNoiseSampler(config.flow, conditioner(model, text), **options)
        return FlowMapNoiseSampler(config.flow, conditioner(model, text), guided=model.config.guidance_embeds,
                                   **options)

    def sample(self, prompts: Sequence[str], indices: Sequence[int]) -> list[np.ndarray]:
        with module_on_accelerator(self.pipeline.vae):
            frames, = self.pipeline(list(prompts), **self.sampling_arguments(indices))
        return list(frames)

    def save(self, folder: Path, lora: Path, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.to(self.pipeline.vae, dtype)
        super().save(folder, lora, dtype)


def load_transformer(folder: Path) -> LVDMTransformer3DModel:
    """Load from a transformer's folder, or a pipeline's. Raises UserError."""
    inside = folder / "transformer"
    inside, expected = inside if inside.is_dir() else folder, LVDMTransformer3DModel.__name__
    config = inside / "config.json"
    if config.is_file() and (found := read_json(config).get("_class_name")) != expected:
        raise UserError(f"{inside} holds {found}, not {expected}")  # diffusers would load what has the same names
    try:
        return LVDMTransformer3DModel.from_pretrained(inside, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a transformer from {folder}: {error}") from error


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
        return _with_embeddings(trained, config)
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
                                  frame_rate=windows.frame_rate, **required, **sizes, **_flow_map_options(config))


def _flow_map_options(config: TrainConfig) -> dict[str, bool]:
    """What the transformer's config says of a flow map."""
    flow_map = config.flow.map
    if flow_map is None:
        return {}
    return {"flow_map": True, "guidance_embeds": flow_map.guidance is not None and config.condition != "none"}


def _with_embeddings(trained: LVDMTransformer3DModel, config: TrainConfig) -> LVDMTransformer3DModel:
    """Return the model with the embeddings that a flow map needs; new ones change nothing at first."""
    new = [name for name, needed in _flow_map_options(config).items() if needed and not trained.config[name]]
    if not new:
        return trained
    if config.model.lora is not None:
        raise UserError(f"model.init_from={config.model.init_from} has no embeddings of {' and '.join(new)}, which a "
                        "LoRA does not train; train flow.map without model.lora first")
    sizes = {name: value for name, value in trained.config.items() if not name.startswith("_")}
    model = LVDMTransformer3DModel(**sizes | dict.fromkeys(new, True))
    added, left_over = model.load_state_dict(trained.state_dict(), strict=False)
    assert not left_over, left_over
    logger.info("%s: new parameters for flow.map, which change nothing before they are trained: %s",
                config.model.init_from, ", ".join(added))
    return model


def _class_names(windows: LatentWindows) -> list[str]:
    """Every caption of the caches, sorted. Raises UserError if there are too many to be classes."""
    captions = set[str]()
    for some in chain.from_iterable(cache.iter_captions() for cache in windows.caches):
        captions.update(some.unique().to_pylist())
        if len(captions - {""}) > MAX_CLASSES:
            break
    names = sorted(captions - {""})
    if not 0 < len(names) <= MAX_CLASSES:
        found = f"more than {MAX_CLASSES}" if names else "no"
        raise UserError(f"condition=class: {windows.caches[0].path} has {found} different captions, and needs 1 to "
                        f"{MAX_CLASSES}. Train with condition=text, or build the cache from one folder per class")
    return names


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _describe(value: Any) -> str:
    return f"{len(value)} classes" if isinstance(value, list | tuple) else str(value)
