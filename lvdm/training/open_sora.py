"""Train the transformer of Open-Sora-Plan, in a pipeline that `lvdm import` wrote, by denoising diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from odvae.inference.fingerprint import vae_fingerprint
from odvae.inference.loading import load_vae
from odvae.trainer.distributed import best_device, module_on_accelerator
from odvae.utils.errors import UserError
from odvae.utils.files import read_json
from odvae.utils.precision import compute_precision

from ..capabilities import WHOLE, pipeline_kind
from ..condition import Condition
from ..model.open_sora import OpenSoraT2VTransformer3DModel
from ..sampling.loading import read_pipeline
from ..sampling.open_sora import OpenSoraPipeline
from .config import ModelConfig, TrainConfig, refuse_inapplicable
from .lora import add_lora
from .objective import DenoisingDiffusion, DiffusionNoiseSampler
from .setup import TrainingSetup
from .text_embeddings import TextEmbeddingCache
from .windows import LatentWindows

PIPELINE = "OpenSoraPipeline"
_SIZES = ModelConfig.model_fields.keys() - {"init_from", "lora", "attention"}
INAPPLICABLE = {
    "condition": "this model is conditioned on text",
    "text_encoder": "this model is trained with the text encoder of its pipeline",
    "flow": "this model is trained by denoising diffusion, see `diffusion`",
    "windows.history": WHOLE,
    "windows.mid_clip": WHOLE,
} | {f"model.{name}": "the sizes are those of the trained weights" for name in sorted(_SIZES)}


def is_open_sora(folder: Path | None) -> bool:
    """Whether a folder to start from holds a pipeline of Open-Sora-Plan.

    Raises:
        UserError: it holds only its transformer, or a pipeline of diffusers.
    """
    if folder is None:
        return False
    if (folder / "model_index.json").is_file():
        kind = pipeline_kind(folder)
        if kind not in (PIPELINE, "LVDMPipeline"):
            raise UserError(f"model.init_from={folder} holds {kind}, which is not trained here; give an LVDMPipeline "
                            "or one that `lvdm import` wrote")
        return kind == PIPELINE
    config = folder / "config.json"
    if config.is_file() and str(read_json(config).get("_class_name")).startswith("OpenSora"):
        raise UserError(f"model.init_from={folder} holds a transformer of Open-Sora-Plan alone; give the folder of a "
                        "pipeline with its VAE and text encoder, as `lvdm import` writes it")
    return False


class OpenSoraSetup(TrainingSetup):
    """The transformer of an OpenSoraPipeline, trained with the pipeline's VAE, text encoder and noise schedule.

    The weights under a LoRA are loaded in bfloat16 where the training computes in it, except shards, whose weights must
    be of one dtype. The text encoder is on the accelerator only while it embeds. The VAE is saved as it is, so that the
    cache fits the trained pipeline too.
    """

    pipeline: OpenSoraPipeline

    def __init__(self, config: TrainConfig) -> None:
        refuse_inapplicable(config, INAPPLICABLE)
        self.config, lora = config, config.model.lora
        self._half = bool(lora) and config.loop.sharding == "none" and \
            compute_precision(config.loop.mixed_precision, best_device()) == "bf16"
        self.pipeline = self._load(torch.bfloat16 if self._half else torch.float32)
        vae, model = self.pipeline.vae, self.pipeline.transformer
        if config.vae is not None and vae_fingerprint(load_vae(config.vae)) != vae_fingerprint(vae):
            raise UserError(f"vae={config.vae} is another VAE than that of the pipeline in {config.model.init_from}; "
                            "leave it out")
        windows = config.windows.model_copy(update={"history": 0, "mid_clip": 0.0})
        self.windows = LatentWindows(windows, vae, 1, model.config.patch_size, config.loop.seed,
                                     config.loop.micro_batch_size)
        torch.manual_seed(config.loop.seed)  # for the LoRA's initial weights only
        if lora is not None:
            add_lora(model, lora)

    def _load(self, dtype: torch.dtype) -> OpenSoraPipeline:
        """Load the pipeline to start from, with its transformer in `dtype`."""
        folder = self.config.model.init_from
        assert folder is not None
        pipeline: OpenSoraPipeline = read_pipeline(OpenSoraPipeline, folder, {
            "default": "auto", "vae": torch.float32, "transformer": dtype})
        return pipeline

    def make_objective(self) -> DenoisingDiffusion:
        scheduler = self.pipeline.scheduler
        objective = DenoisingDiffusion(self.pipeline.transformer, self.config.diffusion, scheduler.alphas_cumprod,
                                       scheduler.config.prediction_type)
        objective.largest = self._largest_batch(self.pipeline.caption_encoder)
        return objective

    def make_sampler(self, prompts: Sequence[str]) -> DiffusionNoiseSampler:
        config, encoder = self.config, self.pipeline.caption_encoder
        assert encoder is not None
        with module_on_accelerator(self.pipeline.text_encoder):
            text = TextEmbeddingCache(encoder, self.windows.caches, str(config.model.init_from))
            self._negative = Condition(*encoder.encode([""])).to("cpu")
            self._prompts = Condition(*encoder.encode(list(prompts))).to("cpu") if prompts else self._negative
        return DiffusionNoiseSampler(config.diffusion, lambda captions: Condition(*text(captions)),
                                     seed=config.loop.seed, num_timesteps=len(self.pipeline.scheduler.alphas_cumprod))

    def sample(self, prompts: Sequence[str], indices: Sequence[int]) -> list[np.ndarray]:
        embedded = self._prompts.select(indices)
        height, width = (self.pipeline.vae.spatial_compression_ratio * side for side in self.windows.size)
        with module_on_accelerator(self.pipeline.vae):
            frames, = self.pipeline(
                prompt_embeds=embedded.text, prompt_embeds_mask=embedded.text_mask,
                negative_prompt_embeds=self._negative.text, negative_prompt_embeds_mask=self._negative.text_mask,
                height=height, width=width, **self.sampling_arguments(indices))
        return list(frames)

    def save(self, folder: Path, lora: Path, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.to(self.model, torch.float32)
        if self._half:  # merge into the weights as they are stored, not rounded
            stored = OpenSoraT2VTransformer3DModel.from_pretrained(
                self.config.model.init_from, subfolder="transformer", torch_dtype=torch.float32).state_dict()
            for name, parameter in self.model.named_parameters():
                if not parameter.requires_grad:
                    parameter.data.copy_(stored[name.replace(".base_layer.", ".")])
        super().save(folder, lora, dtype)
