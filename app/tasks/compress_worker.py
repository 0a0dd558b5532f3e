"""Run compression jobs. Needs torch, so only the worker imports it. The files are described in `compress`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from app.inference.fragmented_mp4 import write_picture
from app.inference.model_manager import is_out_of_memory
from app.tasks.compress import CompressParams, SourceVideo, find_source
from app.tasks.context import JobContext
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import TOLERANCE, VideoReader, VideoWriter, count_frames
from odvae.inference.codec import decoded_frames
from odvae.inference.encoding import encode_frames, library_versions, tiles_text
from odvae.inference.fingerprint import Dtype
from odvae.inference.latent_file import READ, Header
from odvae.inference.memory import SPARE, Direction, MemoryOptions, StreamPlan, free_memory, memory_estimate
from odvae.metrics.psnr import psnr
from odvae.metrics.ssim import ssim
from odvae.model import AutoencoderKLODVAE
from odvae.utils.errors import UserError
from odvae.utils.files import hash_file, write_json
from odvae.utils.format import format_bytes

DTYPE: Dtype = "float16"  # of the stored latents
ITEM_BYTES = 2  # of one value
DECODING_COST = 2.5  # of decoding and comparing a frame, relative to encoding it (measured, the natural VAE)
MAX_TRIES = 4  # plans, each with half the memory of the one before
MAX_READ_PIXELS = 2**23  # of the frames that are read at once
MAX_PSNR = 100.0  # dB; equal frames would have infinity, which JSON cannot represent
SAMPLES, THUMB, GAP = 5, 384, 4  # frames in frames.webp beside the worst; longest side, gap, in pixels

Result = TypeVar("Result")


@dataclass
class Clip:
    """The frames to compress; they can be read repeatedly."""

    video: VideoReader
    params: CompressParams
    count: int = field(init=False)
    rate: float = field(init=False)  # frames per second
    whole: bool = field(init=False)  # all frames of the file, neither resized nor cropped

    def __post_init__(self) -> None:
        info, params = self.video.info, self.params
        end = info.duration if params.seconds is None else min(info.duration, params.start + params.seconds)
        if params.frame_rate is None:
            first, stop = np.searchsorted(self.video.times, [params.start + TOLERANCE, end - TOLERANCE], "left")
            self.count = max(1, int(stop) - max(0, int(first) - 1))
        else:
            self.count = max(1, count_frames(end - params.start, params.frame_rate))
        self.rate = params.frame_rate or info.frame_rate
        self.whole = self.count == info.frames and self.size == (info.height, info.width) and not params.frame_rate

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), as `validate` determined them."""
        return self.params.height or 0, self.params.width or 0

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 (t, H, W, 3)."""
        info = self.video.info
        chunk_frames = max(1, min(READ, MAX_READ_PIXELS // (info.height * info.width)))
        for chunk in self.video.iter_chunks(self.params.start, self.count, self.params.frame_rate, chunk=chunk_frames):
            yield resize_crop(chunk, *self.size)


@dataclass
class FrameMetrics:
    """PSNR and SSIM of each frame, and samples for the contact sheet."""

    psnr: list[float] = field(default_factory=list)  # dB
    ssim: list[float] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)  # (3, h, w, 3) each, see `_trio`
    worst: np.ndarray | None = None

    def add(self, original: np.ndarray, decoded: np.ndarray, device: torch.device, sample: bool) -> None:
        """Compare one frame, uint8 (H, W, 3) each. `sample`: keep it for the contact sheet."""
        a, b = (to_tensor(frame[None], device)[None] for frame in (original, decoded))
        self.psnr.append(min(MAX_PSNR, float(psnr(a, b))))
        self.ssim.append(float(ssim(a, b)))
        if sample:
            self.samples.append(_trio(original, decoded))
        if self.psnr[-1] < min(self.psnr[:-1], default=math.inf):
            self.worst = _trio(original, decoded)

    def summary(self) -> dict[str, Any]:
        return {
            "psnr": round(float(np.mean(self.psnr)), 3), "ssim": round(float(np.mean(self.ssim)), 5),
            "worst_frame": (worst := int(np.argmin(self.psnr))), "worst_psnr": round(self.psnr[worst], 3),
            "worst_ssim": round(min(self.ssim), 5),
        }  # fmt: skip


class ProgressReporter:
    """Reports the progress of encoding and decoding."""

    def __init__(self, context: JobContext, frames: int) -> None:
        self._context, self._frames, self._start = context, frames, time.monotonic()
        self.detail = ""

    def report(self, phase: str, frame: int) -> None:
        """Report that `frame` frames of a phase are done. Raises JobInterrupted if the job is to end."""
        done = frame if phase == "encoding" else self._frames + DECODING_COST * frame
        total = self._frames * (1 + DECODING_COST)
        left = (time.monotonic() - self._start) * (total - done) / done if done else None
        self._context.report_progress(phase=phase, part=frame, parts=self._frames, done=done, total=total,
                                      seconds_left=left, detail=self.detail)  # fmt: skip


def run(context: JobContext) -> None:
    """Encode, decode, compare, report. An interrupted job starts again; every file is written atomically."""
    params = CompressParams.model_validate(context.job.params)
    source = find_source(params, context.services, context.job.owner)
    vae_folder = context.services.assets.find(params.vae, "vae") if params.vae else None
    context.report_progress(phase="loading")
    fingerprint = context.models.vae_fingerprint(vae_folder)
    memory = MemoryOptions(tiles=params.tile is not None)
    if isinstance(params.tile, int):
        memory = MemoryOptions(tile=(params.tile, params.tile))
    with VideoReader(source.path) as video:
        clip = Clip(video, params)
        compression = Compression(context, vae_folder, fingerprint, source, clip, ProgressReporter(context, clip.count))
        shape, encoding = compression.within_memory("encode", memory, compression.encode)
        context.update_result(files=["original.mp4", "latents.safetensors"])
        metrics, decoding = compression.within_memory("decode", memory, compression.decode)
    assert metrics.worst is not None  # there is at least one frame
    _write_sheet(context.folder / "frames.webp", [*metrics.samples, metrics.worst])
    write_picture(context.folder / "poster.webp", metrics.samples[len(metrics.samples) // 2][1])
    (height, width), latents = clip.size, int(np.prod(shape))
    result = {
        "name": source.name, "frames": clip.count, "seconds": round(clip.count / clip.rate, 4), "height": height,
        "width": width, "frame_rate": clip.rate, "vae": fingerprint, **metrics.summary(),
        "ratio": round(clip.count * height * width * 3 / latents, 3),  # pixel values per latent value
        "latents_shape": list(shape), "latents_bytes": latents * ITEM_BYTES, "source_bytes": source.path.stat().st_size,
        "whole": clip.whole, "bits_per_pixel": round(8 * latents * ITEM_BYTES / (clip.count * height * width), 4),
        "plan": f"{encoding['text']}; {decoding['text']}",
        "memory": max(encoding["bytes"], decoding["bytes"]),  # bytes, as estimated
        "source_size": [video.info.height, video.info.width],
    }  # fmt: skip
    per_frame = {"psnr": [round(x, 3) for x in metrics.psnr], "ssim": [round(x, 5) for x in metrics.ssim]}
    write_json(context.folder / "report.json", {
        **result, "settings": context.job.params, "encoding": encoding, "decoding": decoding,
        "library_versions": library_versions(), "per_frame": per_frame})
    files = ["reconstruction.mp4", "original.mp4", "latents.safetensors", "report.json", "frames.webp", "poster.webp"]
    context.update_result(**result, files=files)


@dataclass(frozen=True)
class Compression:
    """The compression of one clip. `fingerprint`: of the VAE in `vae_folder`."""

    context: JobContext
    vae_folder: Path | None
    fingerprint: str
    source: SourceVideo
    clip: Clip
    progress: ProgressReporter

    def encode(self, vae: AutoencoderKLODVAE, plan: StreamPlan) -> tuple[int, ...]:
        """Write original.mp4 and latents.safetensors; returns the latents' shape (t, c, h, w)."""
        clip, source, (height, width) = self.clip, self.source, self.clip.size
        header = Header(vae=self.fingerprint, frames=clip.count, frame_rate=clip.rate, height=height, width=width,
                        source=source.name, made_with=library_versions(),
                        # What is only a part of a file must not pass for the whole: `odvae encode` would keep it.
                        content=hash_file(source.path) if clip.whole else "")  # fmt: skip

        def frames(writer: VideoWriter) -> Iterator[np.ndarray]:
            for chunk in clip.chunks():
                self.progress.report("encoding", writer.frames)
                writer.write(chunk)
                yield chunk

        with VideoWriter(self.context.folder / "original.mp4", clip.rate, metadata={"title": source.name}) as writer:
            return encode_frames(self.context.folder / "latents.safetensors", frames(writer), header, vae, plan, DTYPE)

    def decode(self, vae: AutoencoderKLODVAE, plan: StreamPlan) -> FrameMetrics:
        """Write reconstruction.mp4 and compare each of its frames with the original."""
        vae.fuse()
        metrics, clip = FrameMetrics(), self.clip
        sampled = set(np.linspace(0, clip.count - 1, min(SAMPLES, clip.count)).round().astype(int))
        originals = (frame for chunk in clip.chunks() for frame in chunk)
        latents = self.context.folder / "latents.safetensors"
        metadata = {"title": self.source.name, "comment": f"OD-VAE reconstruction; vae {self.fingerprint}"}
        with VideoWriter(self.context.folder / "reconstruction.mp4", clip.rate, metadata=metadata) as writer:
            self.progress.report("decoding", 0)
            for frames in decoded_frames(latents, vae, self.fingerprint, plan=plan):
                for decoded, original in zip(frames, islice(originals, len(frames)), strict=True):
                    metrics.add(original, decoded, vae.device, sample=len(metrics.psnr) in sampled)
                writer.write(frames)
                self.progress.report("decoding", writer.frames)
        return metrics

    def within_memory(self, direction: Direction, memory: MemoryOptions,
                      work: Callable[[AutoencoderKLODVAE, StreamPlan], Result]) -> tuple[Result, dict[str, Any]]:
        """Call `work` with the largest plan that fits, and with smaller ones if it runs out of memory nevertheless.

        Return its result and a description of the plan. Raises UserError if no plan fits.
        """
        context, size = self.context, self.clip.size
        vae, plan = context.models.vae(self.vae_folder), None
        for tries_left in reversed(range(MAX_TRIES)):
            plan = plan or memory.plan(vae, direction, *size)
            need = memory_estimate(vae, direction, *size, frames=plan.frames, tiling=plan.tiling)
            tile = plan.tiling
            tiles = f"in tiles of {tile.height}x{tile.width} pixels, overlap {tile.overlap}" if tile else "whole"
            text = f"{direction[:-1]}ing {plan.frames} frames at once, {tiles}, in about {format_bytes(need)}"
            self.progress.detail = text
            context.log(text)
            try:
                return work(vae, plan), {"text": text, "frames": plan.frames, "tiles": tiles_text(plan), "bytes": need}
            except (MemoryError, RuntimeError) as error:
                if not tries_left or not is_out_of_memory(error):
                    raise
            del vae
            context.models.unload()
            vae = context.models.vae(self.vae_folder)
            plan = _smaller_plan(vae, direction, size, need)
            context.note(f"Out of memory in {text}. Tried again with less.")
        raise AssertionError("the last try returns or raises")


def _smaller_plan(vae: AutoencoderKLODVAE, direction: Direction, size: tuple[int, int], need: int) -> StreamPlan:
    """Return a plan for half the memory of the failed one or, failing that, for any less. Half of the free memory could
    be more than that, and give the same plan again."""
    failed = int(need / SPARE)
    for free in (min(free_memory(vae.device), failed) // 2, failed - 1):
        with suppress(UserError):
            return MemoryOptions(free=free).plan(vae, direction, *size)
    height, width = size
    raise UserError(f"The machine ran out of memory: {direction[:-1]}ing {height}x{width} needs {format_bytes(need)}, "
                    "and there is no smaller plan. Choose a smaller size, or close other programs.")  # fmt: skip


def _trio(original: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Return thumbnails, uint8 (3, h, w, 3): the original, its reconstruction, four times their difference."""
    difference = (np.abs(decoded.astype(np.int16) - original) * 4).clip(0, 255).astype(np.uint8)
    images = [Image.fromarray(frame) for frame in (original, decoded, difference)]
    for image in images:
        image.thumbnail((THUMB, THUMB))
    return np.stack([np.asarray(image) for image in images])


def _write_sheet(path: Path, trios: list[np.ndarray]) -> None:
    """Write a contact sheet with a column for each (3, h, w, 3)."""
    framed = [np.pad(trio, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=128) for trio in trios]
    columns = [trio.reshape(-1, *trio.shape[2:]) for trio in framed]
    write_picture(path, np.concatenate(columns, axis=1)[:-GAP, :-GAP])
