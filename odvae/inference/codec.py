"""Video files to files of latents and back, of any length, in constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ..data.files import MediaFiles, RejectedFile, find_videos, format_left_out, unreadable, walk
from ..data.transforms import to_uint8
from ..data.video.writer import VideoWriter, read_metadata
from ..model import AutoencoderKLODVAE
from ..utils.errors import NonFiniteError, UserError
from ..utils.files import hash_file, output_folder, path_text
from ..utils.progress import bar
from .encoding import encode_video, tiles_text
from .fingerprint import Dtype, vae_fingerprint
from .latent_file import STORED_AS, SUFFIX, Header, open_latents, read_header, read_latents
from .memory import AUTO, MemoryOptions, StreamPlan
from .reconstruct import load_video_vae, output_name, set_aside_reason
from .streaming import decode_stream


@dataclass
class CodecReport:
    """What one call did."""

    verb: str  # encoded, decoded
    lines_done: list[str] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)  # were there already
    set_aside: list[RejectedFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # files in a folder that are not read, counted by ending

    def lines(self) -> list[str]:
        lines = [*self.lines_done, *(f"set aside: {entry.reason}" for entry in self.set_aside),
                *format_left_out(self.left_out)]
        if len(lines) > 1 or self.kept:
            kept = f"{len(self.kept)} {self.verb} before and unchanged, " if self.kept else ""
            lines.append(f"{len(self.lines_done)} {self.verb}, {kept}{len(self.set_aside)} set aside")
        return lines


def encode_files(source: Path, target: Path, vae: Path | str, *, dtype: Dtype = "float16",
                 memory: MemoryOptions = AUTO) -> CodecReport:
    """Encode a video into the file `target` (.safetensors), or all videos of a folder into the same folders below
    `target`. What is there already, whole, of the same video, VAE, precision and tiles, is kept as it is; what was
    stopped goes on.

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

    return _each(source, target, (".mp4", SUFFIX), find_videos, "encoded", work)


def decode_files(source: Path, target: Path, vae: Path | str, *, memory: MemoryOptions = AUTO) -> CodecReport:
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

    return _each(source, target, (SUFFIX, ".mp4"), _find_latents, "decoded", work)


def decode_video(source: Path, target: Path, vae: AutoencoderKLODVAE, fingerprint: str, title: str = "decode",
                 memory: MemoryOptions = AUTO) -> str:
    """One file of latents into one video; returns the line that tells of it. `fingerprint`: that of `vae`."""
    header = read_header(source)
    even = header.height + header.height % 2, header.width + header.width % 2  # H.264 takes no odd sides
    plan = _decode_plan(header, vae, memory)
    with bar(header.frames, title, "frame") as progress, VideoWriter(
            target, header.frame_rate, metadata={"title": header.source,
                                                 "comment": _comment(source, fingerprint, tiles_text(plan))}) as writer:
        for frames in decoded_frames(source, vae, fingerprint, even, plan):
            writer.write(frames)
            progress.update(len(frames))
    kept = "" if even == (header.height, header.width) else f" and a line of padding more, {even[0]}x{even[1]}"
    return (f"{target}: {header.frames} frames of {header.height}x{header.width}{kept}, "
            f"{header.frame_rate:.6g} a second, without sound")


def decoded_frames(source: Path, vae: AutoencoderKLODVAE, fingerprint: str, size: tuple[int, int] | None = None,
                   plan: StreamPlan | None = None) -> Iterator[np.ndarray]:
    """The frames that went in, as the VAE gives them back: uint8 chunks (t, H, W, 3), in constant memory.

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


def _decode_plan(header: Header, vae: AutoencoderKLODVAE, memory: MemoryOptions) -> StreamPlan:
    unit = vae.spatial_compression_ratio
    height, width = (-(-side // unit) * unit for side in (header.height, header.width))
    return memory.plan(vae, "decode", height, width)


def _same_tiles(tiles: str, memory: MemoryOptions) -> bool:
    """Would `memory` have it again? Where it leaves the choice, whole frames and whatever tiles were taken are fine."""
    if memory.tile is not None:
        return tiles.partition("+")[0] == "{}x{}".format(*memory.tile)
    return not tiles or memory.tiles


def _encoded(source: Path, target: Path, vae: str, dtype: Dtype, memory: MemoryOptions) -> bool:
    """Is `target` what encoding `source` would give?"""
    try:
        header = read_header(target)
        with open_latents(target) as file:
            stored = file.get_slice("latents").get_dtype()
        return (header.vae == vae and stored == STORED_AS[dtype] and _same_tiles(header.tiles, memory)
                and header.source == path_text(source.name) and header.content == hash_file(source))
    except (UserError, SafetensorError, OSError):
        return False


def _comment(source: Path, vae: str, tiles: str) -> str:
    """What a decoded video says about itself."""
    return f"odvae decode; latents {hash_file(source)}; vae {vae}; tiles {tiles}"


def _decoded(source: Path, target: Path, vae: str, memory: MemoryOptions) -> bool:
    """Is `target` what decoding `source` would give? A video that is there is whole: it is renamed when finished."""
    try:
        found = read_metadata(target).get("comment", "")
        tiles = found.rpartition("tiles ")[2]
        return found == _comment(source, vae, tiles) and _same_tiles(tiles, memory)
    except (OSError, ValueError):  # av's errors derive from either
        return False


def _each(source: Path, target: Path, suffixes: tuple[str, str], find: Callable[[Path], MediaFiles], verb: str,
          work: Callable[[Path, Path, str], str | None]) -> CodecReport:
    """Do a file, or each file of a folder; there, one that cannot be used does not stop the others. `work` returns the
    line that tells of it, or None where it was done before. `suffixes`: of what is read, and of what is written."""
    result = CodecReport(verb)

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
    found = find(source)
    output_folder(target)
    paths, result.left_out = found.paths, found.left_out
    result.set_aside += found.set_aside
    failure: type[Exception] = UserError
    for i, path in enumerate(paths):
        try:
            title = f"[{i + 1}/{len(paths)}] {path_text(path.name)}"
            do(path, target / output_name(path, source, suffixes[1], suffixes[0]), title)
        except NonFiniteError as error:
            failure = NonFiniteError
            result.set_aside.append(RejectedFile(path, str(error)))
        except (UserError, OSError) as error:
            result.set_aside.append(RejectedFile(path, set_aside_reason(error)))
    if not result.lines_done and not result.kept:
        raise failure(f"nothing in {source} could be {verb}: {result.set_aside[0].reason}")
    return result


def _find_latents(folder: Path) -> MediaFiles:
    found = walk(folder)
    paths = [folder / name for name in found.names if name.endswith(SUFFIX)]
    if not paths:
        raise UserError(f"{folder} holds no files of latents ({SUFFIX}); `odvae encode` makes them")
    return MediaFiles(paths, Counter(), unreadable(folder, found))
