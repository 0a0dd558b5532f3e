"""Encode and decode video files: the original and what the VAE keeps of it, side by side, with figures."""

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
from ..trainer.distributed import best_device
from ..utils.errors import UserError, is_disk_full, user_message
from ..utils.files import output_folder, path_text, write_json
from ..utils.finite import check_finite
from ..utils.plots import contact_sheet, side_by_side
from ..utils.progress import track
from .loading import load_vae

LONGEST_NAME = 255  # bytes, of file systems
SSIM_LEAST = 11  # pixels a side that SSIM's window needs


@dataclass
class Reconstruction:
    """Figures of one call; means are over files, a file's figure being the mean over its frames."""

    folder: Path
    rows: list[dict[str, float | str]] = field(default_factory=list)  # file, frames, psnr (dB), ssim
    set_aside: list[RejectedFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # files that are not read, counted by ending

    def mean(self, key: str) -> float:
        return sum(float(row[key]) for row in self.rows) / len(self.rows)

    def lines(self) -> list[str]:
        lines = [f"{row['file']}: {row['frames']} frames, PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}"
                for row in self.rows[:20]]
        if len(self.rows) > 20:
            lines.append(f"... and {len(self.rows) - 20} more, all in {self.folder / 'report.json'}")
        lines += [f"set aside: {entry.reason}" for entry in self.set_aside] + format_left_out(self.left_out)
        return [*lines, f"{len(self.rows)} videos, {len(self.set_aside)} set aside: PSNR {self.mean('psnr'):.2f} dB, "
                       f"SSIM {self.mean('ssim'):.4f}; side by side in {self.folder}"]


def reconstruct_files(source: Path, vae: Path | str, out: Path, *, frames: int | None = None,
                      frame_rate: float | None = None, size: tuple[int, int] | None = None,
                      limit: int | None = None) -> Reconstruction:
    """Reconstruct a file, or the files of a folder, with the posterior's mean.

    Writes to `out` an MP4 each (original left, reconstruction right), contact_sheet.png and report.json.

    Args:
        frames: of each file, 1 + 4k; None: the most that it has. Files that are shorter are set aside.
        frame_rate: frames a second; None: the file's own.
        limit: stop when this many were reconstructed.
        size: (height, width) to resize and crop to; None: the largest multiples of 8 that fit.

    Raises:
        UserError: no file could be used.
    """
    model = load_video_vae(vae)
    if frames is not None:
        model.latent_frames(frames)
    found = MediaFiles([source], Counter(), []) if source.is_file() else find_videos(source)
    output_folder(out)
    paths, result = found.paths, Reconstruction(out, set_aside=found.set_aside, left_out=found.left_out)
    shown: list[tuple[np.ndarray, str]] = []
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
        if len(shown) < 8:
            shown.append((pair, f"{path_text(path.stem)}  {row['psnr']:.1f} dB"))
    if not result.rows:
        raise UserError("no video could be reconstructed: " + result.set_aside[0].reason)
    contact_sheet([pair for pair, _ in shown], out / "contact_sheet.png", [label for _, label in shown], columns=6)
    write_json(out / "report.json", {"psnr": result.mean("psnr"), "ssim": result.mean("ssim"), "files": result.rows,
                                     "set_aside": [path_text(entry.reason) for entry in result.set_aside]})
    return result


def set_aside_reason(error: UserError | OSError) -> str:
    """Why one file of several is set aside. Raises the error again where it would be the same with all of them."""
    reason = user_message(error)
    if reason is None or is_disk_full(error):
        raise error
    return reason


def load_video_vae(folder: Path | str) -> AutoencoderKLODVAE:
    """Our VAE, ready to use on this machine's best device. UserError where the folder holds another one, or none."""
    model = load_vae(folder)
    if not isinstance(model, AutoencoderKLODVAE):
        raise UserError(f"{folder} holds an image VAE; `odvae inflate` makes a video VAE of it")
    model.eval().to(best_device())
    return model


def output_name(path: Path, source: Path, suffix: str = ".mp4", replaces: str = ".mp4") -> Path:
    """Where the result for a file of the folder `source` goes, relative to the output's folder: into the same folders,
    under a name of its own. With `replaces` ".mp4": a/b.avi -> a/b.avi.mp4, a/b.mp4 -> a/b.mp4."""
    relative = path.relative_to(source) if source.is_dir() else Path(path.name)
    stem = relative.name.removesuffix(replaces)
    if len(os.fsencode(stem + suffix)) > LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]
        stem = os.fsencode(stem)[:LONGEST_NAME - len(suffix) - 17].decode("utf-8", "ignore") + f"-{digest}"
    return relative.with_name(stem + suffix)


@torch.inference_mode()
def _reconstruct(path: Path, model: AutoencoderKLODVAE, frames: int | None, frame_rate: float | None,
                 size: tuple[int, int] | None) -> tuple[np.ndarray, dict[str, float]]:
    """The pair side by side, uint8 (T, H, 2W + gap, 3), and its figures."""
    time, space = model.temporal_compression_ratio, model.spatial_compression_ratio
    with VideoReader(path) as opened:
        info = opened.info
        height, width = size or (info.height // space * space, info.width // space * space)
        model.check_size(height, width)
        there = info.frames if frame_rate is None else count_frames(info.duration, frame_rate)
        count = 1 + ((frames or there) - 1) // time * time
        video = opened.clip(0.0, count, frame_rate, partial(resize_crop, height=height, width=width))
    x = to_tensor(video)[None]
    decoded = model(x.to(model.device)).sample.cpu()
    check_finite(decoded, "the VAE", model, f"for {path}")
    figures = {"frames": len(video), "frame_rate": info.frame_rate, "psnr": float(psnr(x, decoded).mean()),
               "ssim": float(ssim(x, decoded).mean()) if min(height, width) >= SSIM_LEAST else float("nan")}
    return side_by_side(video, to_uint8(decoded[0])), figures
