"""LoRA adapters of a pipeline's transformer, as diffusers loads, weighs and merges them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from torch import Tensor, nn

from odvae.utils.errors import UserError
from odvae.utils.files import fingerprint

from ..adapter_files import TRANSFORMERS, LoraFile, read_lora_header

__all__ = ["LVDMLoraLoaderMixin", "LoraFile", "describe_adapters", "load_adapters", "set_weights", "unload_adapters"]


logger = logging.getLogger("odvae")


class LVDMLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """diffusers' LoRA methods (`load_lora_weights`, `set_adapters`, `fuse_lora` ...) for the `transformer`, which are
    those of any pipeline that adapts a transformer alone. Only safetensors are read: nothing is unpickled."""

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
                        **kwargs: Any) -> Any:
        """Read the adapter's weights from a file, a folder, a hub repository or a dict, with diffusers' arguments.

        Raises:
            UserError: a file of another format.
        """
        source, name = pretrained_model_name_or_path_or_dict, kwargs.get("weight_name")
        for file in (name, None if isinstance(source, dict) else source):
            if file is not None and Path(file).suffix in (".bin", ".ckpt", ".pkl", ".pt", ".pth"):
                raise UserError(f"{file}: adapters are read from .safetensors only, as other files can run code when "
                                "they are read; convert it with safetensors.torch.save_file")
        return super().lora_state_dict(source, **kwargs | {"use_safetensors": True})

    @classmethod
    def save_lora_weights(cls, save_directory: str | Path, transformer_lora_layers: dict[str, Any] | None = None,
                          **kwargs: Any) -> None:
        """Save an adapter's weights, with diffusers' arguments, as safetensors.

        Raises:
            UserError: `safe_serialization=False`.
        """
        if not kwargs.get("safe_serialization", True):
            raise UserError("safe_serialization=False: adapters are saved as safetensors only")
        super().save_lora_weights(save_directory, transformer_lora_layers, **kwargs)


def load_adapters(pipeline: Any, files: Sequence[LoraFile]) -> None:
    """Load adapters, each named after its file or folder, and activate all of them. Of a pipeline with two transformers
    (Wan 2.2) each is adapted by the weights that a file has for it.

    Raises:
        UserError: a file is not an adapter of this transformer, or two have one name; a pipeline of diffusers that
            takes no adapters.
    """
    pipeline = getattr(pipeline, "pipeline", pipeline)  # of a `DiffusersAdapter`
    if files and not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"a {type(pipeline).__name__} takes no LoRA; leave out --lora")
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise UserError(f"adapters are named after their files, and two have one name ({', '.join(names)}); rename one")
    for file in files:
        if not file.path.exists():
            raise UserError(f"there is no LoRA {file.path}; give a .safetensors file, or its folder, and its weight "
                            "as FILE:weight")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
                _load(pipeline, file)
        except (OSError, ValueError, RuntimeError, KeyError) as error:  # RuntimeError: tensors of other shapes
            raise UserError(f"cannot load the LoRA {file.path} into this transformer: {error}") from error
        adapted = [part for part, names in pipeline.get_list_adapters().items() if file.name in names]
        if not adapted:
            raise UserError(f"the LoRA {file.path} is for another transformer: it has none of its layers")
        if all(getattr(pipeline, part, None) is not None for part in TRANSFORMERS):
            logger.info("the LoRA %s adapts %s%s", file.path, " and ".join(adapted), "" if len(adapted) > 1 else
                        ", the only one of the pipeline's two transformers that it has weights for")
    set_weights(pipeline, files)


def _load(pipeline: Any, file: LoraFile) -> None:
    """Load an adapter into the transformers that it has weights for, if it does not say into the first.

    Raises:
        UserError: it has weights for a second transformer, and the pipeline has one.
    """
    header, second = read_lora_header(file.path), getattr(pipeline, "transformer_2", None)
    has = [part for part in TRANSFORMERS if header is not None and header.of(part)]
    if "transformer_2" in has and second is None:
        raise UserError(f"the LoRA {file.path} is for a pipeline with two transformers, and this one has one")
    if has != ["transformer_2"]:
        alone = {"load_into_transformer_2": True} if second is not None and pipeline.transformer is None else {}
        pipeline.load_lora_weights(file.path, adapter_name=file.name, **alone)
    if second is not None and "transformer_2" in has:
        weights, metadata = pipeline.lora_state_dict(file.path, return_lora_metadata=True)
        second.load_lora_adapter(weights, prefix="transformer_2", adapter_name=file.name, metadata=metadata,
                                 _pipeline=pipeline)


def set_weights(pipeline: Any, files: Sequence[LoraFile]) -> None:
    """Activate loaded adapters, with the files' weights."""
    pipeline = getattr(pipeline, "pipeline", pipeline)
    if files:
        pipeline.set_adapters([file.name for file in files], [file.weight for file in files])


def unload_adapters(pipeline: Any) -> None:
    """Remove all adapters; the pipeline computes what it did before they were loaded, bit for bit."""
    pipeline = getattr(pipeline, "pipeline", pipeline)
    if not hasattr(pipeline, "unload_lora_weights"):
        return
    pipeline.unload_lora_weights()
    layers = pipeline.transformer.modules() if pipeline.transformer is not None else ()
    for layer in layers:
        if getattr(layer, "fused_projections", False) and hasattr(layer, "joint_layers"):
            layer.fuse_projections()  # a move meanwhile has separated the weights


def describe_adapters(model: nn.Module | None) -> dict[str, str]:
    """Return the active adapters of a model, if there is one: by name the weight, and a hash of their own weights."""
    if model is None or not getattr(model, "peft_config", None):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

    layer: Any = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    configs: Any = model.peft_config
    if layer.disable_adapters:
        return {}
    weights = {name: layer.scaling[name] / _own_scaling(configs[name])
               for name in layer.active_adapters if name in layer.scaling}
    with torch.no_grad():
        return {name: f"{weight:g} {fingerprint(get_peft_model_state_dict(model, adapter_name=name), {})}"
                for name, weight in weights.items()}


def _own_scaling(config: Any) -> float:
    """What peft multiplies an update of weight 1 by."""
    return float(config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))
