"""The LoRAs of a job: assets with weights, and whether they fit its pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from app.storage.assets import AssetCatalog
from lvdm.adapter_files import LoraFile, check_peft, misfit
from odvae.utils.errors import UserError

MAX_LORAS = 8  # of a job
MAX_WEIGHT = 10.0


class LoraChoice(BaseModel):
    """A LoRA of a job."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=64, description="of an asset")
    weight: float = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False,
                          description="what its update is multiplied by; 0 leaves it out")
    name: str = Field("", max_length=1000, description="filled in")


def check_loras(choices: Sequence[LoraChoice], folder: Path | None, assets: AssetCatalog) -> tuple[LoraChoice, ...]:
    """Return the choices with their names.

    Args:
        folder: of the pipeline, None: the shipped one.

    Raises:
        UserError: one is gone, is chosen twice, or does not fit the pipeline; the message names it.
    """
    if choices:
        check_peft()
    found = [_find(choice, assets) for choice in choices]
    for choice, path in found:
        if sum(other.id == choice.id for other, _ in found) > 1:
            raise UserError(f"loras: {choice.name} is chosen twice. Choose it once, with the sum of the weights.")
        if reason := misfit(LoraFile(path), folder):
            raise UserError(f"loras: {choice.name} {reason}. Choose another one, or another pipeline.")
    return tuple(choice for choice, _ in found)


def lora_files(choices: Sequence[LoraChoice], assets: AssetCatalog) -> list[LoraFile]:
    """Return the files of a job's LoRAs, with names of their own. Raises UserError if one is gone."""
    found = [_find(choice, assets) for choice in choices]
    names = [LoraFile(path).name for _, path in found]
    return [LoraFile(path, choice.weight, choice.name if names.count(name) > 1 else name)
            for (choice, path), name in zip(found, names, strict=True)]


def _find(choice: LoraChoice, assets: AssetCatalog) -> tuple[LoraChoice, Path]:
    try:
        asset = assets.get(choice.id, "lora")
    except UserError as error:
        what = f"{choice.name} is gone" if choice.name else f"there is no LoRA {choice.id[:60]} here"
        raise UserError(f"loras: {what}. Choose another one, or none.") from error
    return choice.model_copy(update={"name": asset.name}), asset.path
