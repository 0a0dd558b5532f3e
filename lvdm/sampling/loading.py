"""Pipelines from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from odvae.inference.loading import load_decoder, load_vae
from odvae.trainer.distributed import best_device
from odvae.utils.errors import UserError
from odvae.weights import DEMO_VAE

from ..capabilities import pipeline_kind
from ..model.transformer import LVDMTransformer3DModel
from ..text import load_text_encoder
from ..weights import DEMO_TRANSFORMER
from .diffusers_adapter import DiffusersAdapter
from .open_sora import OpenSoraPipeline
from .pipeline import LVDMPipeline

OWN = {"LVDMPipeline": LVDMPipeline, "OpenSoraPipeline": OpenSoraPipeline}  # those over an OD-VAE
AnyPipeline = LVDMPipeline | OpenSoraPipeline | DiffusersAdapter


def default_pipeline() -> LVDMPipeline:
    """Load the shipped VAE and transformer as a pipeline, in float32."""
    transformer = LVDMTransformer3DModel.from_pretrained(DEMO_TRANSFORMER, torch_dtype=torch.float32)
    return LVDMPipeline.build(load_vae(DEMO_VAE).eval(), transformer.eval(), load_text_encoder(None))


def load_pipeline(folder: Path | str | None, to_device: bool = True,
                  dtype: torch.dtype | None = None) -> AnyPipeline:
    """Load a pipeline for inference.

    Args:
        folder: one that `lvdm train` or save_pretrained wrote, of a class in `lvdm.capabilities.PIPELINES`; None: the
            shipped one.
        to_device: move it to the accelerator, where there is one.
        dtype: None: bfloat16 on an accelerator, else float32; of an LVDMPipeline float32.

    Raises:
        UserError: there is no such pipeline, or it cannot be loaded.
    """
    kind = pipeline_kind(folder)
    pipeline: Any
    if folder is None:
        pipeline = default_pipeline()
    elif kind in OWN:
        pipeline = read_pipeline(OWN[kind], folder, _dtypes(kind, dtype))
    else:
        pipeline = DiffusersAdapter(read_pipeline(getattr(diffusers, kind), folder, _dtypes(kind, dtype)))
    if kind in OWN:
        pipeline.vae.fuse()
        pipeline.transformer.fuse_qkv_projections()
    if kind == "LVDMPipeline" and dtype is not None:
        pipeline.to(dtype)
    if to_device:
        pipeline.to(best_device())
    return pipeline  # type: ignore[no-any-return]


def attach_decoder(pipeline: AnyPipeline, folder: Path | str) -> None:
    """Let a distilled decoder decode in place of the pipeline's VAE; None in `pipeline.distilled_decoder` undoes it.

    Raises:
        UserError: there is none, or it does not fit the VAE; for Allegro's, whose frames are laid out otherwise.
    """
    if pipeline.kind == "AllegroPipeline":
        raise UserError("an AllegroPipeline cannot decode by a distilled decoder")
    pipeline.distilled_decoder = load_decoder(folder, pipeline.vae)


def load_lvdm_pipeline(folder: Path | str | None, to_device: bool = True) -> LVDMPipeline:
    """Load an `LVDMPipeline`, see `load_pipeline`. Raises UserError for one of another class."""
    if folder is not None:
        check_lvdm_pipeline(folder)
    pipeline = load_pipeline(folder, to_device)
    assert isinstance(pipeline, LVDMPipeline)
    return pipeline


def check_lvdm_pipeline(folder: Path | str) -> None:
    """Raise UserError unless the folder holds an `LVDMPipeline`."""
    if (kind := pipeline_kind(folder)) != "LVDMPipeline":
        raise UserError(f"{folder} holds {kind}; an LVDMPipeline is needed here")


def _dtypes(kind: str, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The precision of a pipeline's components. Wan's VAE is made for float32; the OD-VAE is small."""
    if kind == "LVDMPipeline":
        return {"default": torch.float32}
    if dtype is None:
        dtype = torch.float32 if best_device().type == "cpu" else torch.bfloat16
    return {"default": dtype} | ({"vae": torch.float32} if kind in ("WanPipeline", "OpenSoraPipeline") else {})


def read_pipeline(cls: Any, folder: Path | str, dtype: Any) -> Any:
    """Load a pipeline of a class, on the CPU. Raises UserError if that fails."""
    try:
        return cls.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the pipeline in {folder}: {error}") from error
