"""Settings of a training that follow from what is trained, unless they are given. Rules of thumb, but for those of
Open-Sora-Plan, which are of configs/lvdm/open_sora_lora.yaml."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from app.tasks.context import Services
from lvdm.capabilities import pipeline_kind
from odvae.utils.errors import UserError

# Trained weights change little: less than new ones, of which the rates are those of `TrainParams`.
FINE_TUNING = {"learning_rate": 5e-4}
LORA = {"optimizer": "adamw", "learning_rate": 5e-4}
OPEN_SORA = {"optimizer": "adamw", "learning_rate": 1e-5, "micro_batch_size": 1, "gradient_accumulation_steps": 4,
             "frames": 29, "held_out": 8, "samples": 2, "sample_steps": 50, "mixed_precision": "bf16",
             "gradient_checkpointing": "full"}
OPEN_SORA_LORA = OPEN_SORA | {"learning_rate": 1e-4}
DEPENDENT = tuple(OPEN_SORA)  # all settings that may follow


def dependent_defaults(model: str, init_from: str, lora: int, services: Services) -> dict[str, Any]:
    """Return those of `DEPENDENT` that differ from the defaults of `TrainParams`. The arguments are as there, also
    invalid."""
    if not init_from:
        return {}
    kind = "LVDMPipeline"
    if model == "lvdm" and init_from != "shipped":
        with suppress(UserError):  # reported when the training is submitted
            kind = pipeline_kind(services.assets.find(init_from, "pipeline"))
    if kind == "OpenSoraPipeline":
        return dict(OPEN_SORA_LORA if lora else OPEN_SORA)
    return dict(LORA if lora and model == "lvdm" else FINE_TUNING)
