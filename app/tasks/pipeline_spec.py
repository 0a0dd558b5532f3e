"""What a pipeline can generate, read from the configs in its folder without loading the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from lvdm.capabilities import (
    PIPELINES,
    Capabilities,
    VideoGrid,
    capabilities,
    class_name,
    pipeline_kind,
    video_grid,
)
from lvdm.weights import DEMO_TRANSFORMER
from odvae.utils.errors import UserError
from odvae.weights import DEMO_VAE

SHIPPED_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
DEFAULT_SECONDS = 4.0  # of a video, by a pipeline that has no length of its own


@dataclass(frozen=True, kw_only=True)
class PipelineSpec(VideoGrid):
    """A pipeline, and the sizes of its videos."""

    name: str = ""
    kind: str = "LVDMPipeline"  # its class, in `lvdm.capabilities.PIPELINES`
    classes: tuple[str, ...] = ()
    text: bool = True  # whether it takes prompts
    scheduler: str = ""  # the class of its own one
    capabilities: Capabilities = field(default_factory=lambda: PIPELINES["LVDMPipeline"])

    @property
    def num_inference_steps(self) -> int:
        """Sampling steps where none are given."""
        return self.capabilities.num_inference_steps

    @property
    def guidance_scale(self) -> float:
        """Guidance where none is given."""
        return self.capabilities.guidance_scale

    @property
    def schedulers(self) -> tuple[str, ...]:
        """Those that it can be sampled with, in place of its own."""
        return self.capabilities.schedulers

    def own_seconds(self, frame_rate: float | None = None) -> float:
        """Return the length of a video for which none is given."""
        return self.own_frames / (frame_rate or self.frame_rate) if self.own_frames else DEFAULT_SECONDS

    @property
    def unsupported(self) -> Mapping[str, str]:
        """What it cannot do, with the reasons: parameters, and "image" and "video" to continue from."""
        return self.capabilities.unsupported

    def frames_for(self, seconds: float, frame_rate: float | None = None) -> int:
        """Return the valid number of frames nearest to `seconds`."""
        return self.nearest_frames(seconds * (frame_rate or self.frame_rate))

    def groups(self, frames: int) -> int:
        """Return the number of groups of latents for so many frames."""
        return 1 + -(-((frames - 1) // self.temporal_compression) // self.group) if self.group else 1


def load_pipeline_spec(folder: Path | None) -> PipelineSpec:
    """Read the spec of the pipeline in `folder` (None: the shipped one). Raises UserError if there is none."""
    if folder is None:
        return _read("the shipped weights", "LVDMPipeline", DEMO_TRANSFORMER / "config.json", DEMO_VAE / "config.json",
                     SHIPPED_SCHEDULER)
    try:
        kind = pipeline_kind(folder)
    except UserError as error:
        raise UserError(f"{error}. Choose another one.") from error
    name = folder.parent.name if folder.name == "pipeline" else folder.name
    transformers = [folder / part / "config.json" for part in ("transformer", "transformer_2")]
    transformer = next((path for path in transformers if path.is_file()), transformers[0])
    return _read(name, kind, transformer, folder / "vae" / "config.json", _scheduler(folder))


def _scheduler(folder: Path) -> str:
    try:
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return class_name(config)


@lru_cache(maxsize=64)
def _read(name: str, kind: str, transformer: Path, vae: Path, scheduler: str) -> PipelineSpec:
    try:
        model, autoencoder = (json.loads(path.read_text(encoding="utf-8")) for path in (transformer, vae))
        grid = asdict(video_grid(kind, model, autoencoder))
        classes = tuple(model.get("class_names", ()))
        return PipelineSpec(**grid, name=name, kind=kind, classes=classes, text=bool(model.get("text_dim", 256)),
                            scheduler=scheduler, capabilities=capabilities(kind, model))
    except (OSError, ValueError, KeyError, TypeError) as error:
        folder = transformer.parent.parent
        raise UserError(f"{folder} holds no readable pipeline ({error}). Choose another one.") from error


def describe_limits(spec: PipelineSpec) -> str:
    """Return in one sentence what the pipeline cannot do and why; "" for one that can do all."""
    reasons: dict[str, list[str]] = {}
    for name, reason in spec.unsupported.items():
        what = {"image": "start image", "video": "continuation", "loras": "LoRAs"}.get(name, name.replace("_", " "))
        reasons.setdefault(reason, []).append(what)
    if not reasons:
        return ""
    limits = [f"no {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return f"{spec.name} ({spec.kind}) has {'; '.join(limits)}."
