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
    """Load the shipped VAE and transformer as a pipeline, in float32."""
    transformer = LVDMTransformer3DModel.from_pretrained(DEMO_TRANSFORMER, torch_dtype=torch.float32)
    return LVDMPipeline.build(load_vae(DEMO_VAE).eval(), transformer.eval(), load_text_encoder(None))


def load_pipeline(folder: Path | str | None, to_device: bool = True) -> LVDMPipeline:
    """Load the pipeline from a folder that `lvdm train` or save_pretrained wrote (None: the shipped one), in float32,
    its VAE and its attention's projections fused for inference. With `to_device` it is moved to the accelerator, where
    there is one."""
    pipeline = default_pipeline() if folder is None else _read_pipeline(folder)
    pipeline.vae.fuse()
    pipeline.transformer.fuse_qkv_projections()
    return pipeline.to(best_device()) if to_device else pipeline


def check_pipeline_folder(folder: Path | str) -> None:
    """Raise UserError unless the folder holds a pipeline."""
    if not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"{folder} is not a pipeline's folder: it has no model_index.json. Give the `pipeline` folder "
                        f"of an `lvdm train` run, or one written by LVDMPipeline.save_pretrained")


def _read_pipeline(folder: Path | str) -> LVDMPipeline:
    check_pipeline_folder(folder)
    try:
        return LVDMPipeline.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the pipeline in {folder}: {error}") from error
