"""The configuration of an LVDM's training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from odvae.trainer.trainer import LoopConfig
from odvae.utils.config import Config, OutputPath, differences
from odvae.utils.errors import UserError

from .flow_matching import FlowConfig
from .lora import LoraConfig
from .objective import DiffusionConfig
from .windows import WindowConfig


class ModelConfig(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"attention"})

    # A folder to start from: a transformer's, whose config then replaces the sizes; or a pipeline's, also one of
    # Open-Sora-Plan (`lvdm import`), which is trained with its own VAE and text encoder.
    init_from: Path | None = None
    preset: str | None = None  # a size of `model.presets`, in place of the next four
    hidden_size: int = 192
    num_layers: int = 8
    num_attention_heads: int = 6
    mlp_ratio: float = 4.0
    patch_size: int = 2
    group_size: int = Field(2, ge=1)  # latent frames that are generated together
    rope_theta: float = Field(100.0, gt=1)
    attention: str | None = None  # one of diffusers' attention backends, such as flex or flash; None: torch's own
    lora: LoraConfig | None = None  # train a LoRA of `init_from` instead of all weights


class SampleConfig(Config):
    prompts: tuple[str, ...] = ()  # empty: those of held-out clips
    count: int = Field(4, ge=0)
    steps: int | None = Field(None, ge=1)  # None: the default of the pipeline, as in `lvdm generate`
    guidance_scale: float | None = None  # likewise


class TrainConfig(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"output", "sample", "save_dtype"})

    output: OutputPath = Path("outputs/lvdm")
    # The OD-VAE that the cache was built with; None: the shipped one that it was, for Open-Sora-Plan the pipeline's.
    vae: Path | None = None
    condition: Literal["text", "class", "none"] = "text"  # class: each caption in the cache is a class
    text_encoder: str | None = None  # a transformers encoder's folder or hub name; None: the built-in one
    windows: WindowConfig = WindowConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()  # of an LVDM
    diffusion: DiffusionConfig = DiffusionConfig()  # of Open-Sora-Plan
    sample: SampleConfig = SampleConfig()
    loop: LoopConfig = LoopConfig()
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


def refuse_inapplicable(config: TrainConfig, reasons: Mapping[str, str]) -> None:
    """Raise UserError if a setting that does not apply to the model differs from its default.

    Args:
        reasons: why, by the dotted key of a setting or of a section.
    """
    given = differences(TrainConfig(), config)
    refused = [f"{key}={value}: {reason}" for key, (_, value) in given.items()
               for name, reason in reasons.items() if f"{key}.".startswith(f"{name}.")]
    if refused:
        raise UserError("\n".join([f"{config.model.init_from or 'an LVDM'} is not trained with these settings; leave "
                                   "them out:", *refused]))
