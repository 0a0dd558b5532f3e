"""Generate videos to files, written while they are sampled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odvae.data.clips import is_image
from odvae.data.transforms import resize_crop
from odvae.data.video import read_clip, read_image
from odvae.data.writing import VideoWriter
from odvae.runtime.distributed import best_device
from odvae.runtime.errors import UserError
from odvae.runtime.figures import contact_sheet
from odvae.runtime.progress import bar

from .pipeline import LVDMPipeline, VideoPiece
from .rollout import RolloutStep
from .weights import default_pipeline


def load_pipeline(folder: Path | str | None) -> LVDMPipeline:
    """The pipeline in a folder that `lvdm train` or save_pretrained wrote (None: the one that ships), in float32, on
    the accelerator where there is one, its VAE fused for inference."""
    pipeline = default_pipeline() if folder is None else _read_pipeline(folder)
    pipeline.vae.fuse()
    return pipeline.to(best_device())


def _read_pipeline(folder: Path | str) -> LVDMPipeline:
    if not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"{folder} is not a pipeline's folder: it has no model_index.json. Give the `pipeline` folder "
                        f"of a run of `lvdm train`, or one written by LVDMPipeline.save_pretrained")
    try:
        return LVDMPipeline.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the pipeline in {folder}: {error}") from error


def read_beginning(pipeline: LVDMPipeline, path: Path) -> np.ndarray:
    """A photo, or the end of a video, as the pipeline can go on from it: at its frame rate and size, the last 1 + 4k
    frames. uint8 (T, H, W, 3)."""
    config = pipeline.transformer.config
    frames = read_image(path) if is_image(path) else read_clip(path, frame_rate=float(config.frame_rate))
    spare = (len(frames) - 1) % pipeline.vae.temporal_compression_ratio
    return resize_crop(frames[spare:], config.sample_height, config.sample_width)


def generate(pipeline: LVDMPipeline, prompts: Sequence[str], out: Path, *, frames: int, seed: int = 0,
             scale: int = 1, **settings: Any) -> list[Path]:
    """Make one video a prompt, all in one batch: `out`/{number}-{prompt}.mp4 and contact_sheet.png.

    Each group of frames is decoded and appended to the files as soon as it is sampled. Settings (and the seed that was
    used) are stored in the MP4's comment.

    Args:
        scale: whole-number enlargement of the written pixels, for players that show small videos small.
        settings: arguments of `LVDMPipeline.stream`.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{i:02d}-{_slug(prompt)}.mp4" for i, prompt in enumerate(prompts)]
    rate = float(pipeline.transformer.config.frame_rate)
    events = pipeline.stream(list(prompts), frames=frames, seed=seed, **settings)
    shown: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(VideoWriter(path, rate, metadata={"comment": json.dumps(
                {"prompt": prompt, "seed": seed + i, "frames": frames, **_plain(settings)})}))
            for i, (path, prompt) in enumerate(zip(paths, prompts, strict=True))]
        progress = stack.enter_context(bar(None, "generate", "step"))
        for event in events:
            if isinstance(event, RolloutStep):
                if progress.total is None:
                    progress.reset(total=event.groups * event.steps)
                progress.set_postfix(group=f"{event.group}/{event.groups}", refresh=False)
                progress.update(1)
            elif isinstance(event, VideoPiece):
                for writer, piece in zip(writers, event.frames, strict=True):
                    writer.write(piece.repeat(scale, axis=1).repeat(scale, axis=2))
                shown.append(event.frames)
    videos = np.concatenate(shown, axis=1)
    contact_sheet(list(videos), out / "contact_sheet.png", list(prompts), columns=11)
    return paths


def _slug(prompt: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    return "-".join(words)[:60] or "empty"


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
