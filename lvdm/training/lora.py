"""Low-rank adaptation of a trained transformer (LoRA, 2106.09685), by peft through diffusers' adapters."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from odvae.utils.config import Config
from odvae.utils.errors import UserError

from ..model.transformer import LVDMTransformer3DModel


class LoraConfig(Config):
    rank: int = Field(16, ge=1)
    alpha: int | None = Field(None, ge=1)  # the update is alpha / rank * B A; None: alpha = rank
    targets: tuple[str, ...] | None = None  # last names of the linear layers that get one; None: all in the blocks


def add_lora(model: LVDMTransformer3DModel, config: LoraConfig) -> None:
    """Freeze `model` and add a trainable adapter, which starts at zero.

    Raises:
        UserError: peft is not installed; the model has no such target.
    """
    try:
        from peft import LoraConfig as PeftConfig
    except ImportError as error:
        raise UserError("model.lora needs peft, which is not installed; pip install peft") from error
    layers = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    known = {name.rpartition(".")[2] for name in layers}
    targets = {name.rpartition(".")[2] for name in layers if name.startswith("blocks.")}
    targets = targets if config.targets is None else set(config.targets)
    if unknown := targets - known:
        raise UserError(f"model.lora.targets: there is no layer {', '.join(sorted(unknown))}; choose from "
                        f"{', '.join(sorted(known))}")
    model.requires_grad_(False)
    model.add_adapter(PeftConfig(r=config.rank, lora_alpha=config.alpha or config.rank,
                                 target_modules=sorted(targets)))


def merge_lora(model: LVDMTransformer3DModel, folder: Path) -> None:
    """Save the adapter alone to `folder` (safetensors; `model.load_lora_adapter` loads it), then merge it into the
    weights."""
    model.save_lora_adapter(folder, safe_serialization=True)
    model.fuse_lora()
    model.unload_lora()
