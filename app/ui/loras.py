"""The LoRAs that the form offers, and those of a video's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.storage.asset_scanner import Asset
from app.storage.assets import AssetCatalog
from app.ui.html.labels import count
from lvdm.adapter_files import LoraFile, misfit


def lora_choices(assets: AssetCatalog, folder: Path | None) -> tuple[list[dict[str, str]], str]:
    """Return the LoRAs that fit the pipeline in a folder (None: the shipped one) as {id, label, name}, and a hint."""
    loras = assets.list("lora")
    fitting = [asset for asset in loras if not misfit(LoraFile(asset.path), folder)]
    choices = [{"id": asset.id, "label": f"{asset.name} ({asset.detail})", "name": asset.name} for asset in fitting]
    if choices:
        return choices, "Adapters of the pipeline, each with a weight."
    others = f"{count(len(loras), 'LoRA')} found, for other pipelines. " if loras else ""
    return [], f"{others}No LoRA for this pipeline yet: train one, or put its .safetensors below the app's folders."


def find_loras(adapters: Any, loras: Sequence[Asset]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a file's adapters, {name: "weight hash"}, as LoRAs of the form, and the names of those not found."""
    chosen: list[dict[str, Any]] = []
    missing = []
    for name, value in adapters.items() if isinstance(adapters, dict) else ():
        try:
            weight = float(str(value).split()[0])
        except (ValueError, IndexError):
            weight = 1.0
        same = [asset for asset in loras
                if name in (LoraFile(asset.path).name, LoraFile(asset.path, 1.0, asset.name).name)]
        if len(same) == 1:
            chosen.append({"id": same[0].id, "weight": weight, "name": same[0].name})
        else:
            missing.append(str(name)[:60])
    return chosen, missing
