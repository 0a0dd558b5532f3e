"""What each kind of pipeline can do, by its class in `model_index.json`; known without loading it, or torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .defaults import GUIDANCE_SCALE, STEPS

WHOLE = "this model denoises the whole video at once"
ROLLOUT_ONLY = {name: WHOLE for name in ("sections", "video", "history_groups", "history_noise")}


@dataclass(frozen=True)
class Capabilities:
    """Defaults of a kind of pipeline, and what it cannot do.

    Attributes:
        num_inference_steps, guidance_scale: where the user gives none.
        frame_rate: of its videos; None: its transformer's config says it.
        unsupported: parameters (fields of `GenerationParams`, and "image" and "video" to continue from) that it does
            not take, each with the reason for the user.
    """

    num_inference_steps: int = STEPS
    guidance_scale: float = GUIDANCE_SCALE
    frame_rate: float | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)


_OTHER = ROLLOUT_ONLY | {
    "image": "this is a text-to-video pipeline", "shift": "the shift is set in the pipeline's scheduler",
    "guidance_rescale": "this pipeline has no rescaling of guidance"}

PIPELINES: dict[str, Capabilities] = {
    "LVDMPipeline": Capabilities(),
    "OpenSoraPipeline": Capabilities(100, 7.5, 24.0, _OTHER),
    "WanPipeline": Capabilities(50, 5.0, 16.0, _OTHER),
    "LTXPipeline": Capabilities(50, 3.0, 25.0, _OTHER),
    "CogVideoXPipeline": Capabilities(50, 6.0, 8.0, _OTHER),
    "HunyuanVideoPipeline": Capabilities(50, 6.0, 15.0, _OTHER),
    "MochiPipeline": Capabilities(64, 4.5, 30.0, _OTHER),
    "AllegroPipeline": Capabilities(100, 7.5, 15.0, _OTHER),
}
