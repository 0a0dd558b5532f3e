"""Video files to files of latents and back, of any length, in constant memory.

A file of latents is a safetensors file with one tensor, "latents" (t, c, h, w): what the encoder's mean said, raw. Time
comes first so that latents are appended as they are made; the header, which safetensors wants in front, is known
beforehand because the video's frames are counted. Its metadata is a `Header`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .cache.format import DTYPES, Dtype, vae_fingerprint
from .data.clips import SetAside, list_videos
from .data.transforms import to_tensor, to_uint8
from .data.video import Video, VideoError
from .data.writing import VideoWriter
from .model import AutoencoderKLODVAE
from .reconstruct import load_video_vae, output_name
from .runtime.errors import UserError
from .runtime.files import atomic_path
from .runtime.progress import bar
from .streaming import decode_stream, encode_stream

SUFFIX = ".safetensors"
READ = 16  # frames, or latent frames, that are read at once
_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # as safetensors calls them


class Header(BaseModel):
    """What a file of latents says about itself; safetensors stores every value as text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["odvae-latents"] = "odvae-latents"
    version: Literal["1"] = "1"
    vae: str  # `vae_fingerprint`
    frames: int  # that went in; what the encoder saw beyond them, up to 1 + 4k, was the last one again
    frame_rate: float  # frames a second
    height: int  # pixels, as they went in; beyond them, up to multiples of 8, the edge again
    width: int
    source: str  # the file's name
    made_with: str  # versions of libraries


@dataclass
class Coded:
    """What one call did."""

    verb: str  # encoded, decoded
    lines_done: list[str] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)

    def lines(self) -> list[str]:
        told = [*self.lines_done, *(f"set aside: {entry.reason}" for entry in self.set_aside)]
        if len(told) > 1:
            told.append(f"{len(self.lines_done)} {self.verb}, {len(self.set_aside)} set aside")
        return told


def encode_files(source: Path, target: Path, vae: Path | str, *, dtype: Dtype = "float16") -> Coded:
    """Encode a video into the file `target` (.safetensors), or all videos of a folder into the folder `target`.

    Raises:
        UserError: the VAE or the names do not fit; a single video cannot be read. In a folder, such a video is set
            aside, and it is an error where none is left.
    """
    model = load_video_vae(vae)
    fingerprint = vae_fingerprint(model)
    return _each(source, target, SUFFIX, list_videos, "encoded",
                 lambda path, out, title: encode_video(path, out, model, fingerprint, dtype, title))


def decode_files(source: Path, target: Path, vae: Path | str) -> Coded:
    """The way back: a file of latents into the video `target` (.mp4, .mov, .mkv), or a folder of them into a folder.

    Raises:
        UserError: as `encode_files`; and for latents that another VAE made.
    """
    model = load_video_vae(vae)
    fingerprint = vae_fingerprint(model)
    return _each(source, target, ".mp4", _list_latents, "decoded",
                 lambda path, out, title: decode_video(path, out, model, fingerprint, title))


def encode_video(source: Path, target: Path, vae: AutoencoderKLODVAE, fingerprint: str, dtype: Dtype = "float16",
                 title: str = "encode") -> str:
    """One video into one file of latents; returns the line that tells of it. `fingerprint`: that of `vae`."""
    if target.suffix != SUFFIX:
        raise UserError(f"cannot write latents to {target}: its name must end in {SUFFIX}")
    with Video(source) as video:
        info, time, space = video.info, vae.temporal_compression_ratio, vae.spatial_compression_ratio
        length = 1 + -(-(info.frames - 1) // time) * time
        height, width = (-(-side // space) * space for side in (info.height, info.width))
        shape = (vae.latent_frames(length), vae.latent_channels, height // space, width // space)
        header = Header(vae=fingerprint, frames=info.frames, frame_rate=info.frame_rate, height=info.height,
                        width=info.width, source=source.name,
                        made_with=" ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "av")))
        with bar(info.frames, title, "frame") as progress, atomic_path(target) as temporary, \
                temporary.open("wb") as file:
            begins = size = _write_header(file, header, shape, dtype)
            read = _counted(video.pieces(piece=READ), progress.update)
            for z in encode_stream(vae, _padded(read, length, height, width, vae.device)):
                size += file.write(_bytes(z, dtype, source))
            if size - begins != prod(shape) * DTYPES[dtype].itemsize:
                raise VideoError(f"{source} gave other than the {info.frames} frames that were counted")
    padding = [f"the sides padded to {height}x{width}"] * ((height, width) != (info.height, info.width)) + \
              [f"the last frame repeated {length - info.frames} times"] * (length != info.frames)
    raw = info.frames * info.height * info.width * 3
    return (f"{target}: {info.frames} frames of {info.height}x{info.width} in {size / 1e6:.2f} MB, "
            f"{raw / size:.0f} times less than raw video{''.join(f', {p}' for p in padding)}; "
            "the sound is not kept")


def decode_video(source: Path, target: Path, vae: AutoencoderKLODVAE, fingerprint: str, title: str = "decode") -> str:
    """One file of latents into one video; returns the line that tells of it. `fingerprint`: that of `vae`."""
    header = read_header(source)
    even = header.height + header.height % 2, header.width + header.width % 2  # H.264 takes no odd sides
    with bar(header.frames, title, "frame") as progress, VideoWriter(
            target, header.frame_rate, metadata={"title": header.source}) as writer:
        for frames in decoded_frames(source, vae, fingerprint, even):
            writer.write(frames)
            progress.update(len(frames))
    kept = "" if even == (header.height, header.width) else f" and a line of padding more, {even[0]}x{even[1]}"
    return (f"{target}: {header.frames} frames of {header.height}x{header.width}{kept}, "
            f"{header.frame_rate:.6g} a second, without sound")


def decoded_frames(source: Path, vae: AutoencoderKLODVAE, fingerprint: str,
                   size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """The frames that went in, as the VAE gives them back: uint8 pieces (t, H, W, 3), in constant memory.

    Args:
        size: (height, width) to crop to, at most what was encoded; None: the size that went in.

    Raises:
        UserError: no file of latents, cut off, or of another VAE.
    """
    header = read_header(source)
    if header.vae != fingerprint:
        raise UserError(f"{source} holds latents of another VAE: it was encoded by {header.vae[:16]}, and the one that "
                        f"was given is {fingerprint[:16]}; give --vae the folder of the one that encoded it")
    height, width = size or (header.height, header.width)
    left = header.frames
    for video in decode_stream(vae, _read_latents(source, vae)):
        frames = to_uint8(video[0, :, :left, :height, :width])
        left -= len(frames)
        if len(frames):
            yield frames
    if left:
        raise UserError(f"{source} lacks its last {left} frames; encode the video again")


def read_header(path: Path) -> Header:
    """Raises UserError where the file is not there, not whole, or not one of latents."""
    try:
        with safe_open(path, "pt") as file:
            return Header.model_validate(file.metadata() or {})
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no file of latents that can be read ({error}); encode the video again") from error
    except ValidationError as error:
        wrong = ", ".join(str(e["loc"][0]) for e in error.errors())
        raise UserError(f"{path} was not written by `odvae encode`: its metadata does not fit ({wrong})") from error


def _each(source: Path, target: Path, suffix: str, listed: Callable[[Path], list[Path]], verb: str,
          work: Callable[[Path, Path, str], str]) -> Coded:
    """Do a file, or each file of a folder; there, one that cannot be used does not stop the others."""
    result = Coded(verb)
    if not source.is_dir():
        result.lines_done.append(work(source, target, source.name))
        return result
    if target.is_file():
        raise UserError(f"{source} is a folder and {target} is a file; give a folder to write to")
    paths = listed(source)
    for i, path in enumerate(paths):
        try:
            title = f"[{i + 1}/{len(paths)}] {path.name}"
            result.lines_done.append(work(path, target / output_name(path, source, suffix), title))
        except UserError as error:
            result.set_aside.append(SetAside(path, str(error)))
    if not result.lines_done:
        raise UserError(f"nothing in {source} could be {verb}: {result.set_aside[0].reason}")
    return result


def _list_latents(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob(f"*{SUFFIX}") if not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds no files of latents ({SUFFIX}); `odvae encode` makes them")
    return found


def _counted(pieces: Iterable[np.ndarray], tell: Callable[[int], object]) -> Iterator[np.ndarray]:
    for piece in pieces:
        yield piece
        tell(len(piece))


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


def _write_header(file: BinaryIO, header: Header, shape: tuple[int, ...], dtype: Dtype) -> int:
    """The front of a safetensors file: the header's length (8 bytes), the header; returns how many bytes that is."""
    size = prod(shape) * DTYPES[dtype].itemsize
    text = json.dumps({"__metadata__": {key: str(value) for key, value in header.model_dump().items()},
                       "latents": {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [0, size]}}).encode()
    text += b" " * (-len(text) % 8)  # the tensor begins at a multiple of 8
    return file.write(len(text).to_bytes(8, "little") + text)


def _bytes(z: Tensor, dtype: Dtype, source: Path) -> bytes:
    """A latent piece (1, c, t, h, w) as it lies in the file, (t, c, h, w)."""
    stored = z[0].transpose(0, 1).to(DTYPES[dtype])
    if not stored.isfinite().all():
        raise UserError(f"{source}: a latent is beyond what {dtype} can hold; store bfloat16 or float32")
    return stored.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _read_latents(path: Path, vae: AutoencoderKLODVAE) -> Iterator[Tensor]:
    """Pieces (1, c, t, h, w) in the VAE's precision, read as they are asked for."""
    with safe_open(path, "pt") as file:
        latents = file.get_slice("latents")
        for start in range(0, latents.get_shape()[0], READ):
            yield latents[start:start + READ].transpose(0, 1)[None].to(vae.device, vae.dtype)
