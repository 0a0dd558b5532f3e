"""Low-rank adaptation of a trained transformer (LoRA, 2106.09685), by peft through diffusers' adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from odvae.utils.config import Config
from odvae.utils.errors import UserError
from odvae.utils.files import atomic_folder

from ..sampling.lora import LVDMLoraLoaderMixin

ADAPTER = "default"
_IN_BLOCK = re.compile(r"(transformer_)?blocks\.\d")


class LoraConfig(Config):
    rank: int = Field(16, ge=1)
    alpha: int | None = Field(None, ge=1)  # the update is alpha / rank * B A; None: alpha = rank
    # Last names of the linear layers that get one, such as to_q or to_out.0; None: all in the blocks.
    targets: tuple[str, ...] | None = None


def add_lora(model: Any, config: LoraConfig) -> None:
    """Freeze a transformer and add a trainable adapter, in float32, which starts at zero.

    Raises:
        UserError: peft is not installed; the model has no such target.
    """
    try:
        from peft import LoraConfig as PeftConfig
    except ImportError as error:
        raise UserError("model.lora needs peft, which is not installed; pip install peft") from error
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in layers if _IN_BLOCK.match(name)]
    known = {_last_name(name) for name in layers}
    targets = {_last_name(name) for name in inside} if config.targets is None else set(config.targets)
    if unknown := targets - known:
        raise UserError(f"model.lora.targets: there is no layer {', '.join(sorted(unknown))}; choose from "
                        f"{', '.join(sorted(known))}")
    model.requires_grad_(False)
    chosen = {name for name in (inside if config.targets is None else layers) if _last_name(name) in targets}
    # peft matches ends of names: "proj" of an MLP is also that of the patch embedding, which is no linear layer.
    unique = chosen.issuperset(name for name, _ in model.named_modules() if _last_name(name) in targets)
    model.add_adapter(PeftConfig(r=config.rank, lora_alpha=config.alpha or config.rank,
                                 target_modules=sorted(targets if unique else chosen)), ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _last_name(name: str) -> str:
    """The last part of a module's name, with the one before where it is a number: to_out.0."""
    rest, _, last = name.rpartition(".")
    return f"{rest.rpartition('.')[2]}.{last}" if last.isdigit() else last


def merge_lora(model: Any, folder: Path) -> None:
    """Save the adapter alone to `folder` (safetensors; a pipeline's `load_lora_weights` loads it), then merge it into
    the weights."""
    from peft.utils import get_peft_model_state_dict

    metadata = {key: sorted(value) if isinstance(value, set) else value
                for key, value in model.peft_config[ADAPTER].to_dict().items()}
    with atomic_folder(folder, replace=True) as temporary:
        LVDMLoraLoaderMixin.save_lora_weights(temporary, get_peft_model_state_dict(model, adapter_name=ADAPTER),
                                              transformer_lora_adapter_metadata=metadata)
    model.fuse_lora()
    model.unload_lora()
