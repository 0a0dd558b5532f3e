"""What each kind of pipeline can do, by its class in `model_index.json`; known without loading it, or torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from odvae.geometry import compression
from odvae.utils.errors import UserError

from .defaults import EPSILON_SCHEDULERS, FLOW_MAP_STEPS, FLOW_SCHEDULERS, GUIDANCE_SCALE, STEPS
from .weights import DEMO_TRANSFORMER

Config = Mapping[str, Any]  # of a model

WHOLE = "this model denoises the whole video at once"
DEFAULT_FRAMES = 81  # of a video, by a pipeline that has no length of its own
ROLLOUT_ONLY = {name: WHOLE for name in ("sections", "video", "history_groups", "history_noise", "history_follow",
                                         "sink_period")}


@dataclass(frozen=True)
class Capabilities:
    """Defaults of a kind of pipeline, and what it cannot do.

    Attributes:
        num_inference_steps, guidance_scale: where the user gives none.
        frame_rate: of its videos; None: its transformer's config says it.
        unsupported: parameters (fields of `GenerationParams`, and "image" and "video" to continue from) that it does
            not take, each with the reason for the user; "preview" if nothing is shown of a video before its end.
        size: (height, width) in pixels; None: its transformer's config says it.
        schedulers: names of those that it can be sampled with, in place of its own.
        min_inference_steps: the least that its schedule allows.
        guidance_embeds: whether guidance is learned in: it takes no second pass through the model.
    """

    num_inference_steps: int = STEPS
    guidance_scale: float = GUIDANCE_SCALE
    frame_rate: float | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    schedulers: tuple[str, ...] = ()
    min_inference_steps: int = 1
    guidance_embeds: bool = False

    def passes(self, guidance_scale: float) -> int:
        """Return how often the model is evaluated at a noise level."""
        return 1 if guidance_scale == 1 or self.guidance_embeds else 2


_OTHER = ROLLOUT_ONLY | {
    "image": "this is a text-to-video pipeline", "shift": "the shift is set in the pipeline's scheduler",
    "guidance_rescale": "guidance is not rescaled with this pipeline"}
_DIFFUSERS = _OTHER | {"scheduler": "the pipeline keeps its own scheduler",
                       "preview": "the video is decoded once all of it is sampled"}
_DISTILLED = _DIFFUSERS | {"negative_prompt": "this model's guidance is distilled, and leads away from nothing"}

PIPELINES: dict[str, Capabilities] = {
    "LVDMPipeline": Capabilities(schedulers=FLOW_SCHEDULERS),
    "OpenSoraPipeline": Capabilities(100, 7.5, 24.0, _OTHER, schedulers=EPSILON_SCHEDULERS),
    "WanPipeline": Capabilities(50, 5.0, 16.0, _DIFFUSERS, (480, 832)),
    "LTXPipeline": Capabilities(50, 3.0, 25.0, _DIFFUSERS, (512, 704)),
    "CogVideoXPipeline": Capabilities(50, 6.0, 8.0, _DIFFUSERS),
    "HunyuanVideoPipeline": Capabilities(50, 6.0, 15.0, _DISTILLED, (720, 1280)),
    "MochiPipeline": Capabilities(64, 4.5, 30.0, _DIFFUSERS, (480, 848), min_inference_steps=2),
    "AllegroPipeline": Capabilities(100, 7.5, 15.0, _DIFFUSERS | {"loras": "diffusers loads none into it"}),
}
_LEARNED_GUIDANCE = {
    "negative_prompt": "its guidance is learned in, and leads away from nothing else",
    "guidance_rescale": "its guidance is learned in, with the rescaling of its training"}


def capabilities(kind: str, transformer: Config) -> Capabilities:
    """Return those of a pipeline of class `kind`, by its transformer's config: a flow map takes few steps."""
    able = PIPELINES[kind]
    if kind == "LVDMPipeline" and transformer.get("flow_map"):
        able = replace(able, num_inference_steps=FLOW_MAP_STEPS, schedulers=("euler",))
    if kind == "LVDMPipeline" and transformer.get("guidance_embeds"):
        able = replace(able, unsupported={**able.unsupported, **_LEARNED_GUIDANCE}, guidance_embeds=True)
    return able


def read_capabilities(folder: Path | str | None) -> Capabilities:
    """Return those of the pipeline in a folder (None: the shipped one), without loading it.

    Raises:
        UserError: there is none, or of a class that is not supported.
    """
    kind = pipeline_kind(folder)
    config = (DEMO_TRANSFORMER if folder is None else Path(folder) / "transformer") / "config.json"
    try:
        return capabilities(kind, json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # such as one whose transformer has another name
        return PIPELINES[kind]



@dataclass(frozen=True, kw_only=True)
class VideoGrid:
    """The sizes of a pipeline's videos: `min_frames` + `frame_step` * k frames, sides that are multiples of
    `size_multiple` pixels."""

    frame_rate: float = 8.0  # frames per second that it was trained at
    temporal_compression: int = 4
    spatial_compression: int = 8  # pixels per latent and side
    size_multiple: int = 16
    height: int = 64  # pixels that it was trained at
    width: int = 64
    group: int = 2  # latent frames that are denoised together; 0: all of a video
    first_frames: int = 1  # frames of the first latent frame
    min_frames: int = 1
    frame_step: int = 4
    fixed_size: bool = False  # it makes videos of no other sides than its own
    own_frames: int = 0  # frames of the videos that it was trained on; 0: any number

    @property
    def default_frames(self) -> int:
        """The number of frames of a video for which none is given."""
        return self.own_frames or self.nearest_frames(DEFAULT_FRAMES)

    @property
    def lengths(self) -> str:
        """The valid numbers of frames, as a formula."""
        return f"{self.min_frames} + {self.frame_step}k"

    def num_frames(self, latents: int) -> int:
        """Return the number of frames of so many latent frames."""
        return self.first_frames + self.temporal_compression * (latents - 1)

    def nearest_frames(self, frames: float) -> int:
        """Return the valid number of frames nearest to `frames`."""
        return self.min_frames + self.frame_step * max(0, round((frames - self.min_frames) / self.frame_step))

    def latent_frames(self, num_frames: int) -> int:
        """Return the number of latent frames. Raises UserError for a number of frames that is not valid."""
        if self.nearest_frames(num_frames) != num_frames:
            raise UserError(f"num_frames={num_frames}: must be {self.lengths}; the nearest is "
                            f"{self.nearest_frames(num_frames)}")
        return 1 + (num_frames - self.first_frames) // self.temporal_compression

    def nearest(self, side: int) -> int:
        """Return the valid side nearest to `side`."""
        return max(self.size_multiple, self.size_multiple * round(side / self.size_multiple))

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError unless both sides are multiples of `size_multiple`, or its own if it takes no others."""
        if self.fixed_size and (height, width) != (self.height, self.width):
            raise UserError(f"{height}x{width} pixels: this pipeline makes videos of {self.height}x{self.width} only, "
                            "as its VAE decodes fixed tiles that cover no other size")
        if (self.nearest(height), self.nearest(width)) != (height, width):
            raise UserError(f"{height}x{width} pixels: sides must be multiples of {self.size_multiple}; the nearest is "
                            f"{self.nearest(height)}x{self.nearest(width)}")



def _own(model: Config, vae: Config) -> dict[str, Any]:
    time, space = compression(vae)
    return {"temporal_compression": time, "spatial_compression": space,
            "size_multiple": space * int(model.get("patch_size", 2)), "frame_rate": float(model.get("frame_rate", 8.0)),
            "height": int(model.get("sample_height", 64)), "width": int(model.get("sample_width", 64)),
            "group": int(model.get("group_size", 2)), "frame_step": time}


def _whole(time: int, space: int, multiple: int) -> dict[str, Any]:
    return {"temporal_compression": int(time), "spatial_compression": int(space), "size_multiple": int(multiple),
            "group": 0, "frame_step": int(time)}


def _open_sora(model: Config, vae: Config) -> dict[str, Any]:
    time, space = compression(vae)
    height, width = model["sample_size"]
    grid = _whole(time, space, space * model["patch_size"]) | {"height": space * height, "width": space * width}
    return grid | {"own_frames": 1 + time * (int(model.get("sample_size_t", 24)) - 1)}


def _wan(model: Config, vae: Config) -> dict[str, Any]:
    space = vae.get("scale_factor_spatial") or 8
    grid = _whole(vae.get("scale_factor_temporal") or 4, space, math.lcm(16, space * model["patch_size"][1]))
    grid["own_frames"] = 81
    return grid | ({"height": 704, "width": 1280, "frame_rate": 24.0} if space == 16 else {})  # Wan 2.2 5B


def _ltx(model: Config, vae: Config) -> dict[str, Any]:
    scale = 2 ** sum(vae["spatio_temporal_scaling"])
    space = vae.get("spatial_compression_ratio") or vae["patch_size"] * scale
    time = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * scale
    return _whole(time, space, math.lcm(32, space * model["patch_size"])) | {"own_frames": 161}


def _hunyuan(model: Config, vae: Config) -> dict[str, Any]:
    space = vae.get("spatial_compression_ratio", 8)
    grid = _whole(vae.get("temporal_compression_ratio", 4), space, math.lcm(16, space * model["patch_size"]))
    return grid | {"own_frames": 129}


def _sampled(model: Config, vae: Config) -> dict[str, Any]:
    """CogVideoX and Allegro: the transformer's config has the sides in latents."""
    space = 2 ** (len(vae["block_out_channels"]) - 1)
    grid = _whole(vae["temporal_compression_ratio"], space, math.lcm(8, space * model["patch_size"]))
    return grid | {"height": space * model["sample_height"], "width": space * model["sample_width"]}


def _cogvideox(model: Config, vae: Config) -> dict[str, Any]:
    grid = _sampled(model, vae) | {"own_frames": int(model.get("sample_frames", 49))}
    return grid | ({"frame_rate": 16.0} if model.get("patch_size_t") else {})  # version 1.5


def _allegro(model: Config, vae: Config) -> dict[str, Any]:
    """Its VAE decodes in tiles of 24 frames and one size, 8 frames of which overlap, and leaves what no tile covers
    grey."""
    grid = _sampled(model, vae)
    return grid | {"first_frames": grid["temporal_compression"], "min_frames": 24, "frame_step": 16,
                   "fixed_size": True, "own_frames": 88}


def _mochi(model: Config, vae: Config) -> dict[str, Any]:
    return _whole(6, 8, 8 * model["patch_size"]) | {"own_frames": 19}


_GRIDS: dict[str, Callable[[Config, Config], dict[str, Any]]] = {
    "LVDMPipeline": _own, "OpenSoraPipeline": _open_sora, "WanPipeline": _wan, "LTXPipeline": _ltx,
    "CogVideoXPipeline": _cogvideox, "HunyuanVideoPipeline": _hunyuan,
    "MochiPipeline": _mochi, "AllegroPipeline": _allegro}


def video_grid(kind: str, transformer: Config, vae: Config) -> VideoGrid:
    """Return the grid of a pipeline of class `kind`, by the configs of its components. Raises KeyError, TypeError or
    ValueError for configs that are not of this kind."""
    able = PIPELINES[kind]
    values = _GRIDS[kind](transformer, vae)
    if able.frame_rate is not None:
        values = {"frame_rate": able.frame_rate} | values
    if able.size is not None:
        values = {"height": able.size[0], "width": able.size[1]} | values
    return VideoGrid(**values)


def pipeline_kind(folder: Path | str | None) -> str:
    """Return the class of the pipeline in a folder, one of `PIPELINES` (None: the shipped one).

    Raises:
        UserError: there is none, or of a class that is not supported; the message lists those that are.
    """
    if folder is None:
        return "LVDMPipeline"
    file = Path(folder) / "model_index.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a pipeline's folder: it has no model_index.json. Give the `pipeline` folder "
                        f"of an `lvdm train` run, or one written by a pipeline's save_pretrained")
    kind = _class_name(file, file.stat().st_mtime_ns)
    if kind not in PIPELINES:
        raise UserError(f"{folder} holds {kind or 'a pipeline without a class name'}, which is not supported; "
                        f"supported are {', '.join(PIPELINES)}")
    return kind


@lru_cache(maxsize=256)
def _class_name(file: Path, changed: int) -> str:
    try:
        return class_name(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return ""


def class_name(index: Any) -> str:
    """The class in a `model_index.json`, also where its module stands before it; "" where there is none."""
    name = index.get("_class_name") if isinstance(index, dict) else None
    name = name[-1] if isinstance(name, list) and name else name
    return name if isinstance(name, str) else ""
