"""Pipelines from disk."""

from __future__ import annotations

from pathlib import Path

import torch

from odvae.inference.loading import load_vae
from odvae.trainer.distributed import best_device
from odvae.utils.errors import UserError
from odvae.weights import DEMO_VAE

from ..model.transformer import LVDMTransformer3DModel
from ..text import load_text_encoder
from ..weights import DEMO_TRANSFORMER
from .pipeline import LVDMPipeline


def default_pipeline() -> LVDMPipeline:
    """The shipped pair as a pipeline, in float32."""
    transformer = LVDMTransformer3DModel.from_pretrained(DEMO_TRANSFORMER, torch_dtype=torch.float32)
    return LVDMPipeline.build(load_vae(DEMO_VAE).eval(), transformer.eval(), load_text_encoder(None))


def load_pipeline(folder: Path | str | None, place: bool = True) -> LVDMPipeline:
    """The pipeline in a folder that `lvdm train` or save_pretrained wrote (None: the one that ships), in float32, on
    the accelerator where there is one and where `place` says so, its VAE fused for inference."""
    pipeline = default_pipeline() if folder is None else _read_pipeline(folder)
    pipeline.vae.fuse()
    return pipeline.to(best_device()) if place else pipeline


def find_pipeline(folder: Path | str) -> None:
    """Raise UserError where a folder holds no pipeline."""
    if not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"{folder} is not a pipeline's folder: it has no model_index.json. Give the `pipeline` folder "
                        f"of a run of `lvdm train`, or one written by LVDMPipeline.save_pretrained")


def _read_pipeline(folder: Path | str) -> LVDMPipeline:
    find_pipeline(folder)
    try:
        return LVDMPipeline.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the pipeline in {folder}: {error}") from error
