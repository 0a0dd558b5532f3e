"""What a pipeline can generate, read from the configs in its folder without loading the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lvdm.weights import DEMO_TRANSFORMER
from odvae.geometry import compression
from odvae.utils.errors import UserError
from odvae.weights import DEMO_VAE


@dataclass(frozen=True)
class PipelineSpec:
    """The sizes of a pipeline's videos: 1 + temporal_compression * k frames, sides that are multiples of
    `size_multiple` pixels."""

    name: str
    frame_rate: float = 8.0  # frames per second that it was trained at
    temporal_compression: int = 4
    size_multiple: int = 16
    height: int = 64  # pixels that it was trained at
    width: int = 64
    group: int = 2  # latent frames that are denoised together
    classes: tuple[str, ...] = ()
    text: bool = True  # whether it takes prompts

    def frames_for(self, seconds: float, frame_rate: float | None = None) -> int:
        """Return the valid number of frames nearest to `seconds`, at least one."""
        return 1 + self.temporal_compression * max(
            0, round((seconds * (frame_rate or self.frame_rate) - 1) / self.temporal_compression)
        )

    def nearest(self, side: int) -> int:
        """Return the valid side nearest to `side`."""
        return max(self.size_multiple, self.size_multiple * round(side / self.size_multiple))

    def groups(self, frames: int) -> int:
        """Return the number of groups of latents for so many frames."""
        return 1 + -(-((frames - 1) // self.temporal_compression) // self.group)


def load_pipeline_spec(folder: Path | None) -> PipelineSpec:
    """Read the spec of the pipeline in `folder` (None: the shipped one). Raises UserError if there is none."""
    if folder is None:
        return _read("the shipped weights", DEMO_TRANSFORMER / "config.json", DEMO_VAE / "config.json")
    name = folder.parent.name if folder.name == "pipeline" else folder.name
    return _read(name, folder / "transformer" / "config.json", folder / "vae" / "config.json")


@lru_cache(maxsize=64)
def _read(name: str, transformer: Path, vae: Path) -> PipelineSpec:
    try:
        model, autoencoder = (json.loads(path.read_text(encoding="utf-8")) for path in (transformer, vae))
        stride, space = compression(autoencoder)
        multiple = space * int(model.get("patch_size", 2))
        return PipelineSpec(name, temporal_compression=stride, size_multiple=multiple, **_model_fields(model))
    except (OSError, ValueError, KeyError, TypeError) as error:
        folder = transformer.parent.parent
        raise UserError(f"{folder} holds no readable pipeline ({error}). Choose another one.") from error


def _model_fields(model: dict[str, Any]) -> dict[str, Any]:
    return {"frame_rate": float(model.get("frame_rate", 8.0)), "height": int(model.get("sample_height", 64)),
            "width": int(model.get("sample_width", 64)), "group": int(model.get("group_size", 2)),
            "classes": tuple(model.get("class_names", ())), "text": bool(model.get("text_dim", 256))}  # fmt: skip
