"""Encode a video file of any length into a latent file, in constant memory; interrupted encodings resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
from torch import Tensor

from ..data.failures import is_recorded, to_video_error
from ..data.transforms import to_tensor
from ..data.video.reader import TOLERANCE, VideoError, VideoReader
from ..model import AutoencoderKLODVAE
from ..utils.errors import NonFiniteError, UserError
from ..utils.files import atomic_path, hash_file, path_text
from ..utils.format import format_bytes
from ..utils.precision import precision_of
from ..utils.progress import bar
from .fingerprint import DTYPES, Dtype
from .latent_file import READ, SUFFIX, Header, latent_bytes, write_header
from .latent_parts import LatentParts
from .memory import AUTO, MemoryOptions, StreamPlan
from .streaming import encode_stream, encoder_reach

PART_SECONDS = 10.0  # of work that an interrupted encoding loses at most


@dataclass(frozen=True)
class EncodedSize:
    """The size a video is padded to for the VAE, and the shape of its latents."""

    frames: int  # 1 + 4k
    height: int  # pixels
    width: int
    latents: tuple[int, int, int, int]  # (t, c, h, w)


def encoded_size(vae: AutoencoderKLODVAE, frames: int, height: int, width: int) -> EncodedSize:
    """Return the size that a video of `frames` x `height` x `width` is padded to."""
    time, space = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    frames = 1 + -(-(frames - 1) // time) * time
    height, width = (-(-side // space) * space for side in (height, width))
    shape = vae.latent_frames(frames), vae.latent_channels, height // space, width // space
    return EncodedSize(frames, height, width, shape)


def encode_frames(target: Path, chunks: Iterable[np.ndarray], header: Header, vae: AutoencoderKLODVAE,
                  plan: StreamPlan, dtype: Dtype = "float16") -> tuple[int, ...]:
    """Encode frames, uint8 chunks (t, H, W, 3), into one latent file; returns its shape (t, c, h, w).

    Raises:
        VideoError: the chunks hold other than `header.frames` frames.
        NonFiniteError, UserError: as `latent_bytes`.
    """
    size = encoded_size(vae, header.frames, header.height, header.width)
    header = header.model_copy(update={"tiles": tiles_text(plan), "precision": precision_of(vae)})
    with plan.applied(vae), atomic_path(target) as temporary, temporary.open("wb") as file:
        write_header(file, header, size.latents, dtype)
        for z in encode_stream(vae, _padded(chunks, header, size, vae), frames=plan.frames):
            file.write(latent_bytes(z, dtype, Path(header.source)))
    return size.latents


def encode_video(source: Path, target: Path, vae: AutoencoderKLODVAE, fingerprint: str, dtype: Dtype = "float16",
                 title: str = "encode", memory: MemoryOptions = AUTO) -> str:
    """Encode one video into one latent file; returns a line that describes it. `fingerprint`: that of `vae`.

    Finished latents are kept in NAME.parts beside the target, and the same call resumes from there, to the same
    bytes."""
    if target.suffix != SUFFIX:
        raise UserError(f"cannot write latents to {target}: its name must end in {SUFFIX}")
    if target.is_dir():
        raise UserError(f"cannot write latents to {target}: a folder of that name exists; choose another name")
    with VideoReader(source) as video:
        info, ratio = video.info, vae.temporal_compression_ratio
        size = encoded_size(vae, info.frames, info.height, info.width)
        header = Header(vae=fingerprint, frames=info.frames, frame_rate=info.frame_rate, height=info.height,
                        width=info.width, source=path_text(source.name), content=hash_file(source),
                        precision=precision_of(vae), made_with=library_versions())
        about = {"header": header.model_dump(), "dtype": dtype}
        with LatentParts(target, about, prod(size.latents[1:]) * DTYPES[dtype].itemsize) as parts:
            plan = _plan(parts, memory, vae, size.height, size.width)
            header = header.model_copy(update={"tiles": tiles_text(plan)})
            before = ratio * (parts.latents - 1) + 1 if parts.latents else 0
            try:
                with plan.applied(vae), bar(info.frames, title, "frame", initial=before) as progress:
                    latents = _encode_from(video, vae, parts.latents, header, size, plan.frames, progress.update)
                    file_size = _write_latents(target, header, size.latents, dtype, parts, latents)
            except (UserError, NonFiniteError) as error:
                # A retry would fail the same way (unlike after a disk or network failure).
                if is_recorded(to_video_error(error, header.source).kind):
                    parts.discard()
                raise
            parts.discard()
        return f"{target}: {_describe(video, size, file_size)}"


def _describe(video: VideoReader, size: EncodedSize, file_size: int) -> str:
    """Describe what was encoded, to how many bytes, and how it was changed."""
    info = video.info
    changes = [f"the sides padded to {size.height}x{size.width}"] * \
              ((size.height, size.width) != (info.height, info.width)) + \
              [f"the last frame repeated {size.frames - info.frames} times"] * (size.frames != info.frames) + \
              list(video.notes)
    raw = info.frames * info.height * info.width * 3
    return (f"{info.frames} frames of {info.height}x{info.width} in {format_bytes(file_size)}, "
            f"{raw / file_size:.0f} times less than raw video{''.join(f', {change}' for change in changes)}; "
            "the sound is not kept")


def _plan(parts: LatentParts, memory: MemoryOptions, vae: AutoencoderKLODVAE, height: int, width: int) -> StreamPlan:
    """Return the plan of the kept latents if it can be used again; otherwise a new one, and encoding starts over."""
    reason = parts.mismatch
    if parts.plan is not None:
        try:
            return memory.resume(parts.plan, vae, "encode", height, width)
        except UserError as error:
            reason = str(error)
    plan = memory.plan(vae, "encode", height, width)
    parts.restart(plan, reason)
    return plan


def _write_latents(target: Path, header: Header, shape: tuple[int, ...], dtype: Dtype, parts: LatentParts,
                   chunks: Iterable[Tensor]) -> int:
    """Write the kept latents, then chunks (1, c, t, h, w); returns the size of the file in bytes."""
    pending, last = bytearray(), time.monotonic()
    for z in chunks:
        pending += latent_bytes(z, dtype, Path(header.source))
        if time.monotonic() - last > PART_SECONDS:
            parts.add(bytes(pending))
            pending, last = bytearray(), time.monotonic()
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        return write_header(file, header, shape, dtype) + parts.copy_to(file) + file.write(pending)


def _encode_from(video: VideoReader, vae: AutoencoderKLODVAE, done: int, header: Header, size: EncodedSize,
                 chunk_frames: int, on_progress: Callable[[int], object]) -> Iterator[Tensor]:
    """Yield the latents (1, c, t, h, w) of a video after the first `done`, with the values of an uninterrupted run.

    A stream that starts `encoder_reach` frames earlier has the same encoder state there, so these frames are encoded
    again. Frames are chunked as in an uninterrupted run, so that rounding is the same.
    """
    ratio = vae.temporal_compression_ratio
    first = max(0, ratio * (done - 1) - -(-encoder_reach(vae) // chunk_frames) * chunk_frames) if done else 0
    while first and _frame_at(video.times, video.times[first]) != first:  # frames with the same time are ambiguous
        first = max(0, first - chunk_frames)
    repeated = ratio * (done - 1) + 1 - first if done else 0
    chunks = _counted(video.iter_chunks(float(video.times[first]), chunk=READ), on_progress, repeated)
    known = done - first // ratio  # latents that are encoded again
    for z in encode_stream(vae, _padded(chunks, header, size, vae, first), frames=chunk_frames):
        skip = min(max(0, known), z.shape[2])
        known -= skip
        if skip < z.shape[2]:
            yield z[:, :, skip:]


def _frame_at(times: np.ndarray, time: float) -> int:
    """Return the index of the frame that a reader shows at `time` (s)."""
    return int(np.searchsorted(times, time + TOLERANCE, "right")) - 1


def _counted(chunks: Iterable[np.ndarray], on_progress: Callable[[int], object], skip: int = 0) -> Iterator[np.ndarray]:
    """Report how many frames were consumed, not counting the first `skip`."""
    for chunk in chunks:
        yield chunk
        on_progress(max(0, len(chunk) - skip))
        skip = max(0, skip - len(chunk))


def _padded(chunks: Iterable[np.ndarray], header: Header, size: EncodedSize, vae: AutoencoderKLODVAE,
            first: int = 0) -> Iterator[Tensor]:
    """uint8 (t, H, W, 3) -> (1, 3, t, height, width) in [-1, 1], with edges and the last frame repeated up to `size`.

    Args:
        first: index of the first frame.

    Raises:
        VideoError: the number of frames is not `header.frames`.
    """
    seen, last = first, None
    for chunk in chunks:
        sides = (0, 0), (0, size.height - chunk.shape[1]), (0, size.width - chunk.shape[2]), (0, 0)
        video = to_tensor(np.pad(chunk, sides, mode="edge"), vae.device)[None].to(vae.dtype)
        seen, last = seen + len(chunk), video[:, :, -1:]
        yield video
    if seen != header.frames:
        raise VideoError(f"{header.source} has {header.frames} frames by its index, but {seen} were decoded")
    if last is not None and seen < size.frames:
        yield last.repeat(1, 1, size.frames - seen, 1, 1)


def library_versions() -> str:
    """Return the versions of the libraries that latents depend on, for a header."""
    return " ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "av"))


def tiles_text(plan: StreamPlan) -> str:
    """Return a plan's tiles as a header stores them: "HxW+overlap", "" for whole frames."""
    tiling = plan.tiling
    return "" if tiling is None else f"{tiling.height}x{tiling.width}+{tiling.overlap}"
