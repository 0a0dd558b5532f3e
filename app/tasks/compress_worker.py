"""The work of `compress`; it needs torch, so only the worker imports it. See `compress` for the files that it makes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from app.inference.fragmented_mp4 import write_picture
from app.inference.model_manager import is_out_of_memory
from app.tasks.compress import CompressParams, SourceVideo, source_of
from app.tasks.context import JobContext
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import TOLERANCE, VideoReader, VideoWriter, count_frames
from odvae.inference.codec import decoded_frames
from odvae.inference.fingerprint import Dtype, vae_fingerprint
from odvae.inference.latent_file import READ, Header, latent_bytes, write_header
from odvae.inference.memory import SPARE, Direction, MemoryOptions, StreamPlan, free_memory, memory_estimate
from odvae.inference.streaming import encode_stream
from odvae.metrics.psnr import psnr
from odvae.metrics.ssim import ssim
from odvae.model import AutoencoderKLODVAE
from odvae.utils.errors import UserError
from odvae.utils.files import atomic_path, hash_file, write_json
from odvae.utils.format import format_bytes

DTYPE: Dtype = "float16"  # what latents are stored as
ITEM = 2  # bytes of one
DECODING = 2.5  # what a frame costs to decode and compare, in frames that are encoded (measured, the natural VAE)
TRIES = 4  # plans, each with half the memory of the one before
HELD = 2**23  # pixels of the file that are read at once, where 16 frames are more
MOST_PSNR = 100.0  # dB; equal frames have no end of it, which JSON cannot say
SHOWN, THUMB, GAP = 5, 384, 4  # frames in frames.webp beside the worst; longest side, space between, in pixels

Made = TypeVar("Made")


@dataclass
class Clip:
    """The frames that are compressed; they can be read again."""

    video: VideoReader
    wanted: CompressParams
    count: int = field(init=False)
    rate: float = field(init=False)  # frames a second
    whole: bool = field(init=False)  # the file as it is: all frames, nothing resized or cropped

    def __post_init__(self) -> None:
        info, wanted = self.video.info, self.wanted
        end = info.duration if wanted.seconds is None else min(info.duration, wanted.start + wanted.seconds)
        if wanted.frame_rate is None:
            first, stop = np.searchsorted(self.video.times, [wanted.start + TOLERANCE, end - TOLERANCE], "left")
            self.count = max(1, int(stop) - max(0, int(first) - 1))
        else:
            self.count = max(1, count_frames(end - wanted.start, wanted.frame_rate))
        self.rate = wanted.frame_rate or info.frame_rate
        self.whole = self.count == info.frames and self.size == (info.height, info.width) and not wanted.frame_rate

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), as `validate` found them out."""
        return self.wanted.height or 0, self.wanted.width or 0

    def pieces(self) -> Iterator[np.ndarray]:
        """uint8 (t, H, W, 3)."""
        info = self.video.info
        at_once = max(1, min(READ, HELD // (info.height * info.width)))
        for piece in self.video.iter_chunks(self.wanted.start, self.count, self.wanted.frame_rate, piece=at_once):
            yield resize_crop(piece, *self.size)


@dataclass
class FrameMetrics:
    """Of each frame, original against reconstruction; and some frames to look at."""

    psnr: list[float] = field(default_factory=list)  # dB
    ssim: list[float] = field(default_factory=list)
    shown: list[np.ndarray] = field(default_factory=list)  # of each (3, h, w, 3), see `_trio`
    worst: np.ndarray | None = None

    def add(self, true: np.ndarray, made: np.ndarray, device: torch.device, show: bool) -> None:
        """One frame, uint8 (H, W, 3) each: whatever the length, memory for one."""
        a, b = (to_tensor(frame[None])[None].to(device) for frame in (true, made))
        self.psnr.append(min(MOST_PSNR, float(psnr(a, b))))
        self.ssim.append(float(ssim(a, b)))
        if show:
            self.shown.append(_trio(true, made))
        if self.psnr[-1] < min(self.psnr[:-1], default=math.inf):
            self.worst = _trio(true, made)

    def summary(self) -> dict[str, Any]:
        return {
            "psnr": round(float(np.mean(self.psnr)), 3), "ssim": round(float(np.mean(self.ssim)), 5),
            "worst_frame": (worst := int(np.argmin(self.psnr))), "worst_psnr": round(self.psnr[worst], 3),
            "worst_ssim": round(min(self.ssim), 5),
        }  # fmt: skip


class ProgressReporter:
    """Tells the desk how far both passes are."""

    def __init__(self, context: JobContext, frames: int) -> None:
        self._context, self._frames, self._began = context, frames, time.monotonic()
        self.detail = ""

    def at(self, phase: str, frame: int) -> None:
        """So many frames of a phase are done. Raises JobInterrupted where the job is to end."""
        done = frame if phase == "encoding" else self._frames + DECODING * frame
        total = self._frames * (1 + DECODING)
        left = (time.monotonic() - self._began) * (total - done) / done if done else None
        self._context.report_progress(phase=phase, piece=frame, pieces=self._frames, done=done, total=total,
                                      seconds_left=left, detail=self.detail)  # fmt: skip


def run(context: JobContext) -> None:
    """Encode, decode, compare, report. It begins anew where an earlier run was broken off: every file appears when it
    is whole."""
    wanted = CompressParams.model_validate(context.job.params)
    source = source_of(wanted, context.services, context.job.owner)
    vae_folder = context.services.places.find(wanted.vae, "vae") if wanted.vae else None
    context.report_progress(phase="loading")
    fingerprint = vae_fingerprint(context.engine.vae(vae_folder))
    memory = MemoryOptions(tiles=wanted.tile is not None)
    if isinstance(wanted.tile, int):
        memory = MemoryOptions(tile=(wanted.tile, wanted.tile))
    with VideoReader(source.path) as video:
        clip = Clip(video, wanted)
        pace = ProgressReporter(context, clip.count)

        def encode(vae: AutoencoderKLODVAE, plan: StreamPlan) -> tuple[int, ...]:
            return _encode(context, vae, plan, clip, source, fingerprint, pace)

        def decode(vae: AutoencoderKLODVAE, plan: StreamPlan) -> FrameMetrics:
            return _decode(context, vae, plan, clip, source, fingerprint, pace)

        shape, encoding = _within_memory(context, "encode", clip.size, memory, vae_folder, encode, pace)
        context.update_result(files=["original.mp4", "latents.safetensors"])
        figures, decoding = _within_memory(context, "decode", clip.size, memory, vae_folder, decode, pace)
    assert figures.worst is not None  # there is at least one frame
    _write_sheet(context.folder / "frames.webp", [*figures.shown, figures.worst])
    write_picture(context.folder / "poster.webp", figures.shown[len(figures.shown) // 2][1])
    (height, width), latents = clip.size, int(np.prod(shape))
    result = {
        "name": source.name, "frames": clip.count, "seconds": round(clip.count / clip.rate, 4), "height": height,
        "width": width, "frame_rate": clip.rate, "vae": fingerprint, **figures.summary(),
        "ratio": round(clip.count * height * width * 3 / latents, 3),  # values that went in to values that are kept
        "latents_shape": list(shape), "latents_bytes": latents * ITEM, "source_bytes": source.path.stat().st_size,
        "whole": clip.whole, "bits_per_pixel": round(8 * latents * ITEM / (clip.count * height * width), 4),
        "plan": f"{encoding['text']}; {decoding['text']}",
        "memory": max(encoding["bytes"], decoding["bytes"]),  # bytes, as estimated
        "source_size": [video.info.height, video.info.width],
    }  # fmt: skip
    per_frame = {"psnr": [round(x, 3) for x in figures.psnr], "ssim": [round(x, 5) for x in figures.ssim]}
    write_json(context.folder / "report.json", {**result, "settings": context.job.params, "encoding": encoding,
                                             "decoding": decoding, "made_with": _versions(), "per_frame": per_frame})
    files = ["reconstruction.mp4", "original.mp4", "latents.safetensors", "report.json", "frames.webp", "poster.webp"]
    context.update_result(**result, files=files)


def _encode(
    context: JobContext,
    vae: AutoencoderKLODVAE,
    plan: StreamPlan,
    clip: Clip,
    source: SourceVideo,
    fingerprint: str,
    pace: ProgressReporter,
) -> tuple[int, ...]:
    """Write original.mp4 and latents.safetensors; returns the latents' shape (t, c, h, w)."""
    (height, width), unit = clip.size, vae.spatial_compression_ratio
    length = 1 + -(-(clip.count - 1) // vae.temporal_compression_ratio) * vae.temporal_compression_ratio
    shape = vae.latent_frames(length), vae.latent_channels, height // unit, width // unit
    header = Header(vae=fingerprint, frames=clip.count, frame_rate=clip.rate, height=height, width=width,
                    source=source.name, tiles=_tiles(plan), made_with=_versions(),
                    # What is only a part of a file must not pass for the whole: `odvae encode` would keep it.
                    content=hash_file(source.path) if clip.whole else "")  # fmt: skip

    def videos(writer: VideoWriter) -> Iterator[Tensor]:
        """(1, 3, t, height, width) in [-1, 1], `length` frames in all: the last one again."""
        video = None
        for piece in clip.pieces():
            pace.at("encoding", writer.frames)
            writer.write(piece)
            video = to_tensor(piece)[None].to(vae.device, vae.dtype)
            yield video
        if video is not None and length > writer.frames:
            yield video[:, :, -1:].repeat(1, 1, length - writer.frames, 1, 1)

    with (
        plan.applied(vae),
        VideoWriter(context.folder / "original.mp4", clip.rate, metadata={"title": source.name}) as writer,
        atomic_path(context.folder / "latents.safetensors") as temporary,
        temporary.open("wb") as file,
    ):
        write_header(file, header, shape, DTYPE)
        for z in encode_stream(vae, videos(writer), frames=plan.frames):
            file.write(latent_bytes(z, DTYPE, Path(source.name)))
        if writer.frames != clip.count:
            raise UserError(f"{source.name} gave {writer.frames} frames of the {clip.count} that were counted.")
    return shape


def _decode(
    context: JobContext,
    vae: AutoencoderKLODVAE,
    plan: StreamPlan,
    clip: Clip,
    source: SourceVideo,
    fingerprint: str,
    pace: ProgressReporter,
) -> FrameMetrics:
    """Write reconstruction.mp4 and compare each of its frames with the one that went in."""
    vae.fuse()
    figures, wanted = FrameMetrics(), set(np.linspace(0, clip.count - 1, min(SHOWN, clip.count)).round().astype(int))
    originals = (frame for piece in clip.pieces() for frame in piece)
    latents = context.folder / "latents.safetensors"
    with VideoWriter(context.folder / "reconstruction.mp4", clip.rate,
                     metadata={"title": source.name, "comment": f"OD-VAE reconstruction; vae {fingerprint}"}) as writer:
        pace.at("decoding", 0)
        for frames in decoded_frames(latents, vae, fingerprint, plan=plan):
            for made, true in zip(frames, islice(originals, len(frames)), strict=True):
                figures.add(true, made, vae.device, show=len(figures.psnr) in wanted)
            writer.write(frames)
            pace.at("decoding", writer.frames)
    return figures


def _within_memory(
    context: JobContext,
    part: Direction,
    size: tuple[int, int],
    memory: MemoryOptions,
    vae_folder: Path | None,
    work: Callable[[AutoencoderKLODVAE, StreamPlan], Made],
    pace: ProgressReporter,
) -> tuple[Made, dict[str, Any]]:
    """Do `work` by the largest plan that fits; where it runs out of memory all the same, by smaller ones.

    Returns what it made, and what is to be told of the plan.

    Raises:
        UserError: no plan fits.
    """
    vae, plan = context.engine.vae(vae_folder), None
    for left in reversed(range(TRIES)):
        plan = plan or memory.plan(vae, part, *size)
        need = memory_estimate(vae, part, *size, frames=plan.frames, tiling=plan.tiling)
        tile = plan.tiling
        cut = f"tiles of {tile.height}x{tile.width} pixels that share {tile.overlap}" if tile else "whole"
        text = f"{part[:-1]}ing {plan.frames} frames at once, {cut}, in about {format_bytes(need)}"
        pace.detail = text
        context.log(text)
        try:
            return work(vae, plan), {"text": text, "frames": plan.frames, "tiles": _tiles(plan), "bytes": need}
        except (MemoryError, RuntimeError) as error:
            if not left or not is_out_of_memory(error):
                raise
        del vae
        context.engine.unload()
        vae = context.engine.vae(vae_folder)
        plan = _smaller(vae, part, size, need)
        context.note(f"There was too little memory for {text}. Tried again in less.")
    raise AssertionError("the last try returns or raises")


def _smaller(vae: AutoencoderKLODVAE, part: Direction, size: tuple[int, int], need: int) -> StreamPlan:
    """A plan for half of what one took that failed, or, where there is none, any for less. Half of what is free may be
    more than that, and bring the same one again."""
    less = int(need / SPARE)
    for free in (min(free_memory(vae.device), less) // 2, less - 1):
        with suppress(UserError):
            return MemoryOptions(free=free).plan(vae, part, *size)
    raise UserError(f"The machine ran out of memory: {part[:-1]}ing {size[0]}x{size[1]} takes {format_bytes(need)}, "
                    "and there is no smaller plan. Take a smaller size, or close other programs.")  # fmt: skip


def _tiles(plan: StreamPlan) -> str:
    """As a file of latents tells it."""
    tiling = plan.tiling
    return "" if tiling is None else f"{tiling.height}x{tiling.width}+{tiling.overlap}"


def _versions() -> str:
    return " ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "av"))


def _trio(true: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Small uint8 (3, h, w, 3): the original, its reconstruction, four times their difference."""
    difference = (np.abs(made.astype(np.int16) - true) * 4).clip(0, 255).astype(np.uint8)
    images = [Image.fromarray(frame) for frame in (true, made, difference)]
    for image in images:
        image.thumbnail((THUMB, THUMB))
    return np.stack([np.asarray(image) for image in images])


def _write_sheet(path: Path, shown: list[np.ndarray]) -> None:
    """A column for each (3, h, w, 3)."""
    framed = [np.pad(trio, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=128) for trio in shown]
    columns = [trio.reshape(-1, *trio.shape[2:]) for trio in framed]
    write_picture(path, np.concatenate(columns, axis=1)[:-GAP, :-GAP])
