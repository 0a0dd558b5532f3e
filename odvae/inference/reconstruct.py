"""Reconstruct video files: the original and the reconstruction side by side, with PSNR and SSIM."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..data.files import MediaFiles, RejectedFile, find_videos, format_left_out
from ..data.transforms import resize_crop, to_tensor, to_uint8
from ..data.video.reader import VideoError, VideoReader, count_frames, write_video
from ..metrics.psnr import psnr
from ..metrics.ssim import ssim
from ..model import AutoencoderKLODVAE
from ..model.compilation import compile_vae
from ..trainer.distributed import best_device
from ..utils.errors import UserError, is_disk_full, user_message
from ..utils.files import output_folder, path_text, write_json
from ..utils.finite import check_finite
from ..utils.plots import contact_sheet, side_by_side
from ..utils.precision import set_precision
from ..utils.precision_names import Precision
from ..utils.progress import track
from .fingerprint import vae_fingerprint
from .loading import load_vae

LOW_PSNR = 25.0  # dB, below which a reconstruction has visible blotches
MAX_FILE_NAME = 255  # bytes, of file systems
SSIM_MIN_SIDE = 11  # pixels, the side of SSIM's window


@dataclass
class Reconstruction:
    """Metrics of one call; means are over files, each file's value being the mean over its frames."""

    folder: Path
    rows: list[dict[str, float | str]] = field(default_factory=list)  # file, frames, psnr (dB), ssim
    set_aside: list[RejectedFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # files that are not read, by ending

    def mean(self, key: str) -> float:
        return sum(float(row[key]) for row in self.rows) / len(self.rows)

    def lines(self) -> list[str]:
        lines = [f"{row['file']}: {row['frames']} frames, PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}"
                for row in self.rows[:20]]
        if len(self.rows) > 20:
            lines.append(f"... and {len(self.rows) - 20} more, all in {self.folder / 'report.json'}")
        lines += [f"set aside: {entry.reason}" for entry in self.set_aside] + format_left_out(self.left_out)
        return [*lines, *low_psnr(self.mean("psnr")),
                f"{len(self.rows)} videos, {len(self.set_aside)} set aside: PSNR {self.mean('psnr'):.2f} dB, "
                f"SSIM {self.mean('ssim'):.4f}; side by side in {self.folder}"]


def reconstruct_files(source: Path, vae: Path | str, out: Path, *, frames: int | None = None,
                      frame_rate: float | None = None, size: tuple[int, int] | None = None,
                      limit: int | None = None, precision: Precision = "auto",
                      compiled: bool = False) -> Reconstruction:
    """Reconstruct a file, or the files of a folder, from the posterior's mean.

    Writes to `out` one MP4 per file (original left, reconstruction right), contact_sheet.png and report.json.

    Args:
        frames: frames of each file, 1 + 4k; None: as many as it has. Shorter files are set aside.
        frame_rate: frames per second; None: the file's own.
        limit: stop after this many files were reconstructed.
        size: (height, width) to resize and crop to; None: the largest multiples of 8 that fit.
        precision: of the computation.
        compiled: compile the VAE's blocks, see `model.compilation`.

    Raises:
        UserError: no file could be used.
    """
    model = load_video_vae(vae)
    computed = set_precision(model, precision)
    if compiled:
        compile_vae(model)
    if frames is not None:
        model.latent_frames(frames)
    files = MediaFiles([source], Counter(), []) if source.is_file() else find_videos(source)
    output_folder(out)
    paths, result = files.paths, Reconstruction(out, set_aside=files.set_aside, left_out=files.left_out)
    examples: list[tuple[np.ndarray, str]] = []
    for path in track(paths, "reconstruct", "video", total=min(len(paths), limit or len(paths))):
        if len(result.rows) == limit:
            break
        try:
            pair, row = _reconstruct(path, model, frames, frame_rate, size)
            write_video(out / output_name(path, source), [pair], frame_rate or row["frame_rate"])
        except (VideoError, OSError) as error:
            result.set_aside.append(RejectedFile(path, set_aside_reason(error)))
            continue
        result.rows.append({"file": path_text(path), **row})
        if len(examples) < 8:
            examples.append((pair, f"{path_text(path.stem)}  {row['psnr']:.1f} dB"))
    if not result.rows:
        raise UserError("no video could be reconstructed: " + result.set_aside[0].reason)
    pairs, labels = zip(*examples, strict=True)
    contact_sheet(pairs, out / "contact_sheet.png", labels, columns=6)
    write_json(out / "report.json", {"psnr": result.mean("psnr"), "ssim": result.mean("ssim"),
                                     "precision": computed, "files": result.rows,
                                     "set_aside": [path_text(entry.reason) for entry in result.set_aside]})
    return result


def low_psnr(psnr: float | None) -> list[str]:
    """Return a warning, as a line, where a VAE's PSNR (dB) on its videos is too low to be of use."""
    if psnr is None or not psnr < LOW_PSNR:
        return []
    return [f"warning: the VAE reconstructs these videos at {psnr:.1f} dB PSNR, below {LOW_PSNR:g} dB: they are unlike "
            "what it was trained on; use another (--vae), such as odvae/weights/natural, or train it on them"]


def set_aside_reason(error: UserError | OSError) -> str:
    """Return why one file of several is set aside. Raises the error again if it would affect all of them."""
    reason = user_message(error)
    if reason is None or is_disk_full(error):
        raise error
    return reason


def load_video_vae(folder: Path | str) -> AutoencoderKLODVAE:
    """Load an OD-VAE in eval mode on this machine's best device. UserError if the folder holds another VAE, or none."""
    model = load_vae(folder)
    if not isinstance(model, AutoencoderKLODVAE):
        raise UserError(f"{folder} holds an image VAE; turn it into a video VAE with `odvae inflate`")
    model.eval().to(best_device())
    if model.device.type == "cuda":
        model.fuse()  # stores kernels channels last: an encoder's too
    return model


def load_in_precision(folder: Path | str, precision: Precision, *,
                      compiled: bool = False) -> tuple[AutoencoderKLODVAE, str]:
    """Load an OD-VAE as `load_video_vae`, to compute in a precision; returns it and the fingerprint of its weights.

    Args:
        compiled: compile its blocks, see `model.compilation`.
    """
    model = load_video_vae(folder)
    fingerprint = vae_fingerprint(model)  # of float32: whatever computes, it is the same VAE
    set_precision(model, precision)
    if compiled:
        compile_vae(model)
    return model, fingerprint


def output_name(path: Path, source: Path, suffix: str = ".mp4", replaces: str = ".mp4") -> Path:
    """Return the output path for a file of the folder `source`, relative to the output folder: in the same subfolder,
    with a unique name. With `replaces` ".mp4": a/b.avi -> a/b.avi.mp4, a/b.mp4 -> a/b.mp4."""
    relative = path.relative_to(source) if source.is_dir() else Path(path.name)
    stem = relative.name.removesuffix(replaces)
    if len(os.fsencode(stem + suffix)) > MAX_FILE_NAME:
        digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]
        stem = os.fsencode(stem)[:MAX_FILE_NAME - len(suffix) - 17].decode("utf-8", "ignore") + f"-{digest}"
    return relative.with_name(stem + suffix)


@torch.inference_mode()
def _reconstruct(path: Path, model: AutoencoderKLODVAE, frames: int | None, frame_rate: float | None,
                 size: tuple[int, int] | None) -> tuple[np.ndarray, dict[str, float]]:
    """Return original and reconstruction side by side, uint8 (T, H, 2W + gap, 3), and their metrics."""
    time, space = model.temporal_compression_ratio, model.spatial_compression_ratio
    with VideoReader(path) as reader:
        info = reader.info
        height, width = size or (info.height // space * space, info.width // space * space)
        model.check_size(height, width)
        available = info.frames if frame_rate is None else count_frames(info.duration, frame_rate)
        count = 1 + ((frames or available) - 1) // time * time
        video = reader.clip(0.0, count, frame_rate, partial(resize_crop, height=height, width=width))
    x = to_tensor(video, model.device)[None]
    decoded = model(x.to(model.dtype)).sample.float()
    check_finite(decoded, "the VAE", model, f"for {path}")
    x, decoded = x.cpu(), decoded.cpu()
    row = {"frames": len(video), "frame_rate": info.frame_rate, "psnr": float(psnr(x, decoded).mean()),
           "ssim": float(ssim(x, decoded).mean()) if min(height, width) >= SSIM_MIN_SIDE else float("nan")}
    return side_by_side(video, to_uint8(decoded[0])), row
