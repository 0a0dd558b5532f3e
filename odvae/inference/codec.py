"""Encode video files to latent files and decode them, of any length, in constant memory."""

from __future__ import annotations

import contextlib
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
from ..utils.precision import precision_of
from ..utils.precision_names import Precision
from ..utils.progress import bar
from .encoding import encode_video, tiles_text
from .fingerprint import Dtype
from .latent_file import STORED_AS, SUFFIX, Header, open_latents, read_header, read_latents
from .memory import AUTO, MemoryOptions, StreamPlan
from .reconstruct import load_in_precision, output_name, set_aside_reason
from .shipped import find_shipped_vae
from .streaming import decode_stream


@dataclass
class CodecReport:
    """What one call encoded or decoded."""

    verb: str  # encoded, decoded
    done: list[str] = field(default_factory=list)  # a line for each file
    kept: list[Path] = field(default_factory=list)  # existed already
    set_aside: list[RejectedFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # files in a folder that are not read, by ending

    def lines(self) -> list[str]:
        lines = [*self.done, *(f"set aside: {entry.reason}" for entry in self.set_aside),
                 *format_left_out(self.left_out)]
        if len(lines) > 1 or self.kept:
            kept = f"{len(self.kept)} {self.verb} before and unchanged, " if self.kept else ""
            lines.append(f"{len(self.done)} {self.verb}, {kept}{len(self.set_aside)} set aside")
        return lines


def encode_files(source: Path, target: Path, vae: Path | str, *, dtype: Dtype = "float16",
                 precision: Precision = "auto", memory: MemoryOptions = AUTO, compiled: bool = False) -> CodecReport:
    """Encode a video into the file `target` (.safetensors), or all videos of a folder into the same subfolders of
    `target`. A complete file of the same video, VAE, precision and tiles is kept; an interrupted encoding resumes.

    Args:
        dtype: of the stored latents.
        precision: of the computation; by "auto" a file that another one computed is kept too.
        compiled: see `load_in_precision`.

    Raises:
        UserError: the VAE, the names or the memory do not fit; a single video cannot be read. In a folder such a video
            is set aside, and it is an error if none is left.
    """
    model, fingerprint = load_in_precision(vae, precision, compiled=compiled)
    computed = "" if precision == "auto" else precision_of(model)

    def work(path: Path, out: Path, title: str) -> str | None:
        if _encoded(path, out, fingerprint, dtype, computed, memory):
            return None
        return encode_video(path, out, model, fingerprint, dtype, title, memory)

    return _each(source, target, (".mp4", SUFFIX), find_videos, "encoded", work)


def decode_files(source: Path, target: Path, vae: Path | str | None = None, *, precision: Precision = "auto",
                 memory: MemoryOptions = AUTO, compiled: bool = False) -> CodecReport:
    """Decode a latent file into the video `target` (.mp4, .mov, .mkv), or a folder of them into a folder. A video of
    the same latents, precision and tiles is kept.

    Args:
        vae: None: the shipped one that encoded the latents.
        precision: of the computation; by "auto" a video that another one computed is kept too.
        compiled: see `load_in_precision`.

    Raises:
        UserError: as `encode_files`; and for latents of another VAE.
    """
    vae = _encoder_of(source) if vae is None else vae
    model, fingerprint = load_in_precision(vae, precision, compiled=compiled)
    model.fuse()
    computed = "" if precision == "auto" else precision_of(model)

    def work(path: Path, out: Path, title: str) -> str | None:
        if _decoded(path, out, fingerprint, computed, memory):
            return None
        return decode_video(path, out, model, fingerprint, title, memory)

    return _each(source, target, (SUFFIX, ".mp4"), _find_latents, "decoded", work)


def decode_video(source: Path, target: Path, vae: AutoencoderKLODVAE, fingerprint: str, title: str = "decode",
                 memory: MemoryOptions = AUTO) -> str:
    """Decode one latent file into one video; returns a line that describes it. `fingerprint`: that of `vae`."""
    header = read_header(source)
    even = header.height + header.height % 2, header.width + header.width % 2  # H.264 takes no odd sides
    plan = _decode_plan(header, vae, memory)
    comment = _comment(source, fingerprint, precision_of(vae), tiles_text(plan))
    with bar(header.frames, title, "frame") as progress, VideoWriter(
            target, header.frame_rate, metadata={"title": header.source, "comment": comment}) as writer:
        for frames in decoded_frames(source, vae, fingerprint, even, plan):
            writer.write(frames)
            progress.update(len(frames))
    padded = "" if even == (header.height, header.width) else f" padded to {even[0]}x{even[1]}"
    return (f"{target}: {header.frames} frames of {header.height}x{header.width}{padded}, "
            f"{header.frame_rate:.6g} fps, without sound")


def decoded_frames(source: Path, vae: AutoencoderKLODVAE, fingerprint: str, size: tuple[int, int] | None = None,
                   plan: StreamPlan | None = None) -> Iterator[np.ndarray]:
    """Decode the frames of a latent file: uint8 chunks (t, H, W, 3), in constant memory.

    Args:
        size: (height, width) to crop to, at most the encoded size; None: the size of the source.
        plan: None: the largest that fits the memory.

    Raises:
        UserError: not a latent file, truncated, or of another VAE; no plan fits.
    """
    header = read_header(source)
    if header.vae != fingerprint:
        raise UserError(f"{source} holds latents of another VAE: it was encoded by {header.vae[:16]}, but this VAE is "
                        f"{fingerprint[:16]}; pass --vae with the folder of the VAE that encoded it")
    height, width = size or (header.height, header.width)
    plan = plan or _decode_plan(header, vae, AUTO)
    remaining, chunk_latents = header.frames, plan.frames // vae.temporal_compression_ratio
    with plan.applied(vae):
        for video in decode_stream(vae, read_latents(source, vae), frames=chunk_latents):
            frames = to_uint8(video[0, :, :remaining, :height, :width])
            remaining -= len(frames)
            if len(frames):
                yield frames
    if remaining:
        raise UserError(f"{source} lacks its last {remaining} frames; encode the video again")


def _encoder_of(source: Path) -> Path:
    """Return the shipped VAE that encoded a latent file, or the first readable one of a folder."""
    if not source.is_dir():
        return find_shipped_vae(read_header(source).vae, str(source))
    paths = _find_latents(source).paths
    for path in paths:
        with contextlib.suppress(UserError):
            fingerprint = read_header(path).vae
            break
    else:
        read_header(paths[0])  # raises an error that says why
    return find_shipped_vae(fingerprint, str(path))


def _decode_plan(header: Header, vae: AutoencoderKLODVAE, memory: MemoryOptions) -> StreamPlan:
    unit = vae.spatial_compression_ratio
    height, width = (-(-side // unit) * unit for side in (header.height, header.width))
    return memory.plan(vae, "decode", height, width)


def _same_tiles(tiles: str, memory: MemoryOptions) -> bool:
    """Whether `memory` accepts these tiles. If it leaves the choice, whole frames and any tiles are fine."""
    if memory.tile is not None:
        return tiles.partition("+")[0] == "{}x{}".format(*memory.tile)
    return not tiles or memory.tiles


def _encoded(source: Path, target: Path, vae: str, dtype: Dtype, precision: str, memory: MemoryOptions) -> bool:
    """Whether `target` is what encoding `source` would write. `precision` "": any."""
    try:
        header = read_header(target)
        with open_latents(target) as file:
            stored = file.get_slice("latents").get_dtype()
        return (header.vae == vae and stored == STORED_AS[dtype] and precision in ("", header.precision)
                and _same_tiles(header.tiles, memory)
                and header.source == path_text(source.name) and header.content == hash_file(source))
    except (UserError, SafetensorError, OSError):
        return False


def _comment(source: Path, vae: str, precision: str, tiles: str) -> str:
    """Return the comment in a decoded video's metadata, which identifies its latents, VAE, precision and tiles."""
    return f"odvae decode; latents {hash_file(source)}; vae {vae}; in {precision}; tiles {tiles}"


def _decoded(source: Path, target: Path, vae: str, precision: str, memory: MemoryOptions) -> bool:
    """Whether `target` is what decoding `source` would write; `precision` "": in any. A video that exists is complete:
    it is renamed last."""
    try:
        comment = read_metadata(target).get("comment", "")
        before, _, tiles = comment.rpartition("; tiles ")
        stored = before.rpartition("; in ")[2]
        return (precision in ("", stored) and comment == _comment(source, vae, stored, tiles)
                and _same_tiles(tiles, memory))
    except (OSError, ValueError):  # av's errors derive from either
        return False


def _each(source: Path, target: Path, suffixes: tuple[str, str], find: Callable[[Path], MediaFiles], verb: str,
          work: Callable[[Path, Path, str], str | None]) -> CodecReport:
    """Process a file, or each file of a folder; in a folder, a file that cannot be used does not stop the others.
    `work` returns a line that describes the result, or None if it existed. `suffixes`: of inputs and outputs."""
    result = CodecReport(verb)

    def do(path: Path, out: Path, title: str) -> None:
        line = work(path, out, title)
        if line is None:
            result.kept.append(out)
        else:
            result.done.append(line)

    if not source.is_dir():
        do(source, target, source.name)
        return result
    if target.is_file():
        raise UserError(f"{source} is a folder and {target} is a file; give a folder to write to")
    files = find(source)
    output_folder(target)
    paths, result.left_out = files.paths, files.left_out
    result.set_aside += files.set_aside
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
    if not result.done and not result.kept:
        raise failure(f"nothing in {source} could be {verb}: {result.set_aside[0].reason}")
    return result


def _find_latents(folder: Path) -> MediaFiles:
    tree = walk(folder)
    paths = [folder / name for name in tree.names if name.endswith(SUFFIX)]
    if not paths:
        raise UserError(f"{folder} holds no latent files ({SUFFIX}); create them with `odvae encode`")
    return MediaFiles(paths, Counter(), unreadable(folder, tree))
