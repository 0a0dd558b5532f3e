"""Which components a pipeline consists of: fingerprints of their weights and configs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from odvae.utils.files import fingerprint

from ..sampling.diffusers_adapter import DiffusersAdapter
from ..sampling.lora import describe_adapters
from ..sampling.module_state import module_state

if TYPE_CHECKING:
    from ..sampling.loading import AnyPipeline

ADAPTER = "adapter "  # of the names of parts, for people: a LoRA, with its weight; the transformer's has it too
LOADED = ("architectures", "dtype", "transformers_version")  # of a config: how it was saved and loaded


def fingerprints(pipeline: AnyPipeline, loaded: Mapping[str, str] | None = None) -> dict[str, str]:
    """Fingerprints of a pipeline's components; they change whenever its output does. Reads every weight once, in the
    precision of the computation.

    Args:
        loaded: those of the pipeline before adapters were loaded into it: the other components are not read again.
    """
    pipeline.upcast_weights()
    components = pipeline.components
    if loaded is None:
        parts = _diffusers_parts(components) if isinstance(pipeline, DiffusersAdapter) else _own_parts(pipeline)
    else:
        adapted = [name for name in ("transformer", "transformer_2") if components.get(name) is not None]
        parts = dict(loaded) | _diffusers_parts({name: components[name] for name in adapted})
    if pipeline.distilled_decoder is not None:
        parts["distilled decoder"] = fingerprint_model(pipeline.distilled_decoder)
    parts |= {"precision": "tf32"} if torch.backends.cuda.matmul.allow_tf32 else {}  # the weights do not say it
    for model in (components.get("transformer_2"), pipeline.transformer):  # for people: their own have them too
        parts |= {f"{ADAPTER}{name}": adapter for name, adapter in describe_adapters(model).items()}
    return parts


def _diffusers_parts(components: Mapping[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): _component(part) for name, part in components.items()}


def _own_parts(pipeline: Any) -> dict[str, str]:
    encoder, vae = pipeline.caption_encoder, pipeline.vae
    state = {} if pipeline.text_encoder is None else module_state(pipeline.text_encoder)
    parts = {"vae": fingerprint_model(vae), "transformer": fingerprint_model(pipeline.transformer),
             "text encoder": "" if encoder is None else encoder.fingerprint,
             "scheduler": _component(pipeline.scheduler)}
    if state:
        parts["text encoder"] = fingerprint({}, {"encoder": parts["text encoder"], **state})
    if vae.use_tiling:  # separate: the latents are the same, and can be decoded with other tiles
        parts["tiling"] = f"{vae.tiling.height}x{vae.tiling.width}+{vae.tiling.overlap}"
    return parts


def _component(part: Any) -> str:
    """The fingerprint of a component of any kind; a tokenizer's is of its vocabulary."""
    if isinstance(part, nn.Module):
        return fingerprint_model(part)
    if part is None:
        return ""
    name = {"class": type(part).__name__}
    return fingerprint({}, name | (part.get_vocab() if hasattr(part, "get_vocab") else _config(part)))


def fingerprint_model(model: Any) -> str:
    """The fingerprint of a model's weights, config and state."""
    return fingerprint(model.state_dict(), _config(model) | module_state(model))


def _config(model: Any) -> dict[str, Any]:
    """The config's values that are not the class's defaults: so a new option changes no fingerprint."""
    parameters = inspect.signature(type(model).__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    config = model.config if isinstance(model.config, Mapping) else model.config.to_dict()  # of transformers
    plain = {key: list(value) if isinstance(value, tuple) else value.to_dict() if hasattr(value, "to_dict") else value
             for key, value in config.items() if key not in LOADED}  # a quantization's config is an object
    return {key: value for key, value in plain.items() if not key.startswith("_")
            and value != (list(d) if isinstance(d := defaults.get(key), tuple) else d)}
