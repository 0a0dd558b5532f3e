"""LoRA adapters with random weights, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def save_adapter(transformer: Any, folder: Path, seed: int = 0, rank: int = 2, name: str = "") -> Path:
    """Save an adapter of a transformer's attention layers to folder/NAME ("": with the name of diffusers)."""
    torch.manual_seed(seed)
    tensors = {}
    for layer, module in transformer.named_modules():
        if layer.endswith(("to_q", "to_v")):
            outputs, inputs = module.weight.shape
            tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, inputs) * 0.3
            tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(outputs, rank) * 0.3
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (name or "pytorch_lora_weights.safetensors")
    save_file(tensors, file)
    return file
