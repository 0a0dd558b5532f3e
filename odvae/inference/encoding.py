"""A video file into a file of latents, of any length, in constant memory; what was stopped goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.failures import as_failure, is_recorded
from ..data.transforms import to_tensor
from ..data.video.reader import TOLERANCE, VideoError, VideoReader
from ..model import AutoencoderKLODVAE
from ..utils.errors import NonFiniteError, UserError
from ..utils.files import atomic_path, hash_file, path_text
from ..utils.progress import bar
from .fingerprint import DTYPES, Dtype
from .latent_file import READ, SUFFIX, Header, latent_bytes, write_header
from .latent_parts import LatentParts
from .memory import AUTO, MemoryOptions, StreamPlan
from .streaming import encode_stream, encoder_reach

PART_SECONDS = 10.0  # of work that are lost at most where an encoding is stopped


def encode_video(source: Path, target: Path, vae: AutoencoderKLODVAE, fingerprint: str, dtype: Dtype = "float16",
                 title: str = "encode", memory: MemoryOptions = AUTO) -> str:
    """One video into one file of latents; returns the line that tells of it. `fingerprint`: that of `vae`.

    What is done is kept in NAME.parts beside the target, and the same call goes on from there, to the same bytes."""
    if target.suffix != SUFFIX:
        raise UserError(f"cannot write latents to {target}: its name must end in {SUFFIX}")
    if target.is_dir():
        raise UserError(f"cannot write latents to {target}: a folder of that name is there; choose another name")
    with VideoReader(source) as video:
        info, ratio, space = video.info, vae.temporal_compression_ratio, vae.spatial_compression_ratio
        length = 1 + -(-(info.frames - 1) // ratio) * ratio
        height, width = (-(-side // space) * space for side in (info.height, info.width))
        shape = (vae.latent_frames(length), vae.latent_channels, height // space, width // space)
        header = Header(vae=fingerprint, frames=info.frames, frame_rate=info.frame_rate, height=info.height,
                        width=info.width, source=path_text(source.name), content=hash_file(source),
                        made_with=" ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "av")))
        about = {"header": header.model_dump(), "dtype": dtype}
        with LatentParts(target, about, prod(shape[1:]) * DTYPES[dtype].itemsize) as parts:
            plan = _plan(parts, memory, vae, height, width)
            header = header.model_copy(update={"tiles": tiles_text(plan)})
            before = ratio * (parts.latents - 1) + 1 if parts.latents else 0
            try:
                with plan.applied(vae), bar(info.frames, title, "frame", initial=before) as progress:
                    size = _write_latents(target, header, shape, dtype, parts, _encode_from(
                        video, vae, parts.latents, (length, height, width), plan.frames, progress.update))
            except (UserError, NonFiniteError) as error:
                # It would be the same again (not so where a disk or a network failed).
                if is_recorded(as_failure(error, header.source).kind):
                    parts.discard()
                raise
            parts.discard()
    padding = [f"the sides padded to {height}x{width}"] * ((height, width) != (info.height, info.width)) + \
              [f"the last frame repeated {length - info.frames} times"] * (length != info.frames)
    padding += video.notes
    raw = info.frames * info.height * info.width * 3
    return (f"{target}: {info.frames} frames of {info.height}x{info.width} in {size / 1e6:.2f} MB, "
            f"{raw / size:.0f} times less than raw video{''.join(f', {p}' for p in padding)}; "
            "the sound is not kept")


def _plan(parts: LatentParts, memory: MemoryOptions, vae: AutoencoderKLODVAE, height: int, width: int) -> StreamPlan:
    """The plan that the kept latents were made by, as far as it still serves; else a new one, and they begin anew."""
    reason = parts.unlike
    if parts.plan is not None:
        try:
            return memory.again(parts.plan, vae, "encode", height, width)
        except UserError as error:
            reason = str(error)
    plan = memory.plan(vae, "encode", height, width)
    parts.begin(plan, reason)
    return plan


def _write_latents(target: Path, header: Header, shape: tuple[int, ...], dtype: Dtype, parts: LatentParts,
                   pieces: Iterable[Tensor]) -> int:
    """Write pieces (1, c, t, h, w) behind those that are kept; returns the size of the file in bytes."""
    waiting, last = bytearray(), time.monotonic()
    for z in pieces:
        waiting += latent_bytes(z, dtype, Path(header.source))
        if time.monotonic() - last > PART_SECONDS:
            parts.add(bytes(waiting))
            waiting, last = bytearray(), time.monotonic()
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        begins = size = write_header(file, header, shape, dtype)
        size += parts.copy_to(file) + file.write(waiting)
        if size - begins != prod(shape) * DTYPES[dtype].itemsize:
            raise VideoError(f"{header.source} gave other than the {header.frames} frames that were counted")
    return size


def _encode_from(video: VideoReader, vae: AutoencoderKLODVAE, done: int, size: tuple[int, int, int], at_once: int,
                 tell: Callable[[int], object]) -> Iterator[Tensor]:
    """The latents (1, c, t, h, w) of a video behind the first `done`, with the values that they have in one go.

    The encoder's state there is that of a stream which began `encoder_reach` frames earlier, so these are encoded once
    more. Frames lie in the same pieces as in one go, so that all is rounded alike.

    Args:
        size: (frames, height, width) as they are encoded, padding included.
    """
    ratio = vae.temporal_compression_ratio
    first = max(0, ratio * (done - 1) - -(-encoder_reach(vae) // at_once) * at_once) if done else 0
    while first and _frame_at(video.times, video.times[first]) != first:  # frames of one time cannot be told apart
        first = max(0, first - at_once)
    again = ratio * (done - 1) + 1 - first if done else 0
    frames = _counted(video.iter_chunks(float(video.times[first]), piece=READ), tell, again)
    known = done - first // ratio  # latents that come once more
    for z in encode_stream(vae, _padded(frames, size[0] - first, *size[1:], vae.device), frames=at_once):
        skip = min(max(0, known), z.shape[2])
        known -= skip
        if skip < z.shape[2]:
            yield z[:, :, skip:]


def _frame_at(times: np.ndarray, time: float) -> int:
    """The frame that a reader takes to be shown at `time` (s)."""
    return int(np.searchsorted(times, time + TOLERANCE, "right")) - 1


def _counted(pieces: Iterable[np.ndarray], tell: Callable[[int], object], skip: int = 0) -> Iterator[np.ndarray]:
    """Tell how many frames were taken, without the first `skip`."""
    for piece in pieces:
        yield piece
        tell(max(0, len(piece) - skip))
        skip = max(0, skip - len(piece))


def _padded(pieces: Iterable[np.ndarray], length: int, height: int, width: int,
            device: torch.device) -> Iterator[Tensor]:
    """uint8 (t, H, W, 3) -> (1, 3, t, height, width) in [-1, 1], `length` frames in all: edge and last frame again."""
    seen, last = 0, None
    for piece in pieces:
        sides = (0, 0), (0, height - piece.shape[1]), (0, width - piece.shape[2]), (0, 0)
        video = to_tensor(np.pad(piece, sides, mode="edge"))[None].to(device)
        seen, last = seen + len(piece), video[:, :, -1:]
        yield video
    if last is not None and seen < length:
        yield last.repeat(1, 1, length - seen, 1, 1)


def tiles_text(plan: StreamPlan) -> str:
    """As a header says it: "HxW+overlap", "" for whole frames."""
    tiling = plan.tiling
    return "" if tiling is None else f"{tiling.height}x{tiling.width}+{tiling.overlap}"
