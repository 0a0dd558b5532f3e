"""Video files to files of latents and back, of any length, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .cache.format import DTYPES, Dtype, vae_fingerprint
from .data.clips import SetAside, list_videos
from .data.transforms import to_tensor, to_uint8
from .data.video import Video, VideoError
from .data.writing import VideoWriter, read_metadata
from .latent_file import READ, STORED_AS, SUFFIX, Header, latent_bytes, read_header, read_latents, write_header
from .memory import AUTO, MemoryChoice, Plan
from .model import AutoencoderKLODVAE
from .reconstruct import load_video_vae, output_name
from .runtime.errors import NonFiniteError, UserError
from .runtime.files import atomic_path, hash_file
from .runtime.progress import bar
from .streaming import decode_stream, encode_stream


@dataclass
class Coded:
    """What one call did."""

    verb: str  # encoded, decoded
    lines_done: list[str] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)  # were there already
    set_aside: list[SetAside] = field(default_factory=list)

    def lines(self) -> list[str]:
        told = [*self.lines_done, *(f"set aside: {entry.reason}" for entry in self.set_aside)]
        if len(told) > 1 or self.kept:
            kept = f"{len(self.kept)} {self.verb} before and unchanged, " if self.kept else ""
            told.append(f"{len(self.lines_done)} {self.verb}, {kept}{len(self.set_aside)} set aside")
        return told


def encode_files(source: Path, target: Path, vae: Path | str, *, dtype: Dtype = "float16",
                 memory: MemoryChoice = AUTO) -> Coded:
    """Encode a video into the file `target` (.safetensors), or all videos of a folder into the folder `target`. What is
    there already, whole, of the same video, VAE, precision and tiles, is kept as it is.

    Raises:
        UserError: the VAE, the names or the memory do not fit; a single video cannot be read. In a folder, such a video
            is set aside, and it is an error where none is left.
    """
    model = load_video_vae(vae)
    fingerprint = vae_fingerprint(model)

    def work(path: Path, out: Path, title: str) -> str | None:
        if _encoded(path, out, fingerprint, dtype, memory):
            return None
        return encode_video(path, out, model, fingerprint, dtype, title, memory)

    return _each(source, target, SUFFIX, list_videos, "encoded", work)


def decode_files(source: Path, target: Path, vae: Path | str, *, memory: MemoryChoice = AUTO) -> Coded:
    """The way back: a file of latents into the video `target` (.mp4, .mov, .mkv), or a folder of them into a folder.
    What is there already, of the same latents and tiles, is kept as it is.

    Raises:
        UserError: as `encode_files`; and for latents that another VAE made.
    """
    model = load_video_vae(vae)
    fingerprint = vae_fingerprint(model)
    model.fuse()

    def work(path: Path, out: Path, title: str) -> str | None:
        if _decoded(path, out, fingerprint, memory):
            return None
        return decode_video(path, out, model, fingerprint, title, memory)

    return _each(source, target, ".mp4", _list_latents, "decoded", work)


def encode_video(source: Path, target: Path, vae: AutoencoderKLODVAE, fingerprint: str, dtype: Dtype = "float16",
                 title: str = "encode", memory: MemoryChoice = AUTO) -> str:
    """One video into one file of latents; returns the line that tells of it. `fingerprint`: that of `vae`."""
    if target.suffix != SUFFIX:
        raise UserError(f"cannot write latents to {target}: its name must end in {SUFFIX}")
    with Video(source) as video:
        info, time, space = video.info, vae.temporal_compression_ratio, vae.spatial_compression_ratio
        length = 1 + -(-(info.frames - 1) // time) * time
        height, width = (-(-side // space) * space for side in (info.height, info.width))
        shape = (vae.latent_frames(length), vae.latent_channels, height // space, width // space)
        plan = memory.plan(vae, "encode", height, width)
        header = Header(vae=fingerprint, frames=info.frames, frame_rate=info.frame_rate, height=info.height,
                        width=info.width, source=source.name, content=hash_file(source), tiles=_tiles(plan),
                        made_with=" ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "av")))
        with plan.applied(vae), bar(info.frames, title, "frame") as progress, atomic_path(target) as temporary, \
                temporary.open("wb") as file:
            begins = size = write_header(file, header, shape, dtype)
            read = _counted(video.pieces(piece=READ), progress.update)
            for z in encode_stream(vae, _padded(read, length, height, width, vae.device), frames=plan.frames):
                size += file.write(latent_bytes(z, dtype, source))
            if size - begins != prod(shape) * DTYPES[dtype].itemsize:
                raise VideoError(f"{source} gave other than the {info.frames} frames that were counted")
    padding = [f"the sides padded to {height}x{width}"] * ((height, width) != (info.height, info.width)) + \
              [f"the last frame repeated {length - info.frames} times"] * (length != info.frames)
    raw = info.frames * info.height * info.width * 3
    return (f"{target}: {info.frames} frames of {info.height}x{info.width} in {size / 1e6:.2f} MB, "
            f"{raw / size:.0f} times less than raw video{''.join(f', {p}' for p in padding)}; "
            "the sound is not kept")


def decode_video(source: Path, target: Path, vae: AutoencoderKLODVAE, fingerprint: str, title: str = "decode",
                 memory: MemoryChoice = AUTO) -> str:
    """One file of latents into one video; returns the line that tells of it. `fingerprint`: that of `vae`."""
    header = read_header(source)
    even = header.height + header.height % 2, header.width + header.width % 2  # H.264 takes no odd sides
    plan = _decode_plan(header, vae, memory)
    with bar(header.frames, title, "frame") as progress, VideoWriter(
            target, header.frame_rate, metadata={"title": header.source,
                                                 "comment": _comment(source, fingerprint, _tiles(plan))}) as writer:
        for frames in decoded_frames(source, vae, fingerprint, even, plan):
            writer.write(frames)
            progress.update(len(frames))
    kept = "" if even == (header.height, header.width) else f" and a line of padding more, {even[0]}x{even[1]}"
    return (f"{target}: {header.frames} frames of {header.height}x{header.width}{kept}, "
            f"{header.frame_rate:.6g} a second, without sound")


def decoded_frames(source: Path, vae: AutoencoderKLODVAE, fingerprint: str, size: tuple[int, int] | None = None,
                   plan: Plan | None = None) -> Iterator[np.ndarray]:
    """The frames that went in, as the VAE gives them back: uint8 pieces (t, H, W, 3), in constant memory.

    Args:
        size: (height, width) to crop to, at most what was encoded; None: the size that went in.
        plan: None: the largest that fits the memory.

    Raises:
        UserError: no file of latents, cut off, or of another VAE; no plan fits.
    """
    header = read_header(source)
    if header.vae != fingerprint:
        raise UserError(f"{source} holds latents of another VAE: it was encoded by {header.vae[:16]}, and the one that "
                        f"was given is {fingerprint[:16]}; give --vae the folder of the one that encoded it")
    height, width = size or (header.height, header.width)
    plan = plan or _decode_plan(header, vae, AUTO)
    left, at_once = header.frames, plan.frames // vae.temporal_compression_ratio
    with plan.applied(vae):
        for video in decode_stream(vae, read_latents(source, vae), frames=at_once):
            frames = to_uint8(video[0, :, :left, :height, :width])
            left -= len(frames)
            if len(frames):
                yield frames
    if left:
        raise UserError(f"{source} lacks its last {left} frames; encode the video again")


def _decode_plan(header: Header, vae: AutoencoderKLODVAE, memory: MemoryChoice) -> Plan:
    unit = vae.spatial_compression_ratio
    height, width = (-(-side // unit) * unit for side in (header.height, header.width))
    return memory.plan(vae, "decode", height, width)


def _tiles(plan: Plan) -> str:
    tiling = plan.tiling
    return "" if tiling is None else f"{tiling.height}x{tiling.width}+{tiling.overlap}"


def _same_tiles(tiles: str, memory: MemoryChoice) -> bool:
    """Would `memory` have it again? Where it leaves the choice, whole frames and whatever tiles were taken are fine."""
    if memory.tile is not None:
        return tiles.partition("+")[0] == "{}x{}".format(*memory.tile)
    return not tiles or memory.tiles


def _encoded(source: Path, target: Path, vae: str, dtype: Dtype, memory: MemoryChoice) -> bool:
    """Is `target` what encoding `source` would give?"""
    try:
        header = read_header(target)
        with safe_open(target, "pt") as file:
            stored = file.get_slice("latents").get_dtype()
        return (header.vae == vae and stored == STORED_AS[dtype] and _same_tiles(header.tiles, memory)
                and header.source == source.name and header.content == hash_file(source))
    except (UserError, SafetensorError, OSError):
        return False


def _comment(source: Path, vae: str, tiles: str) -> str:
    """What a decoded video says about itself."""
    return f"odvae decode; latents {hash_file(source)}; vae {vae}; tiles {tiles}"


def _decoded(source: Path, target: Path, vae: str, memory: MemoryChoice) -> bool:
    """Is `target` what decoding `source` would give? A video that is there is whole: it is renamed when finished."""
    try:
        found = read_metadata(target).get("comment", "")
        tiles = found.rpartition("tiles ")[2]
        return found == _comment(source, vae, tiles) and _same_tiles(tiles, memory)
    except (OSError, ValueError):  # av's errors derive from either
        return False


def _each(source: Path, target: Path, suffix: str, listed: Callable[[Path], list[Path]], verb: str,
          work: Callable[[Path, Path, str], str | None]) -> Coded:
    """Do a file, or each file of a folder; there, one that cannot be used does not stop the others. `work` returns the
    line that tells of it, or None where it was done before."""
    result = Coded(verb)

    def do(path: Path, out: Path, title: str) -> None:
        line = work(path, out, title)
        if line is None:
            result.kept.append(out)
        else:
            result.lines_done.append(line)

    if not source.is_dir():
        do(source, target, source.name)
        return result
    if target.is_file():
        raise UserError(f"{source} is a folder and {target} is a file; give a folder to write to")
    paths = listed(source)
    for i, path in enumerate(paths):
        try:
            title = f"[{i + 1}/{len(paths)}] {path.name}"
            do(path, target / output_name(path, source, suffix), title)
        except (UserError, NonFiniteError) as error:
            result.set_aside.append(SetAside(path, str(error)))
    if not result.lines_done and not result.kept:
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


