"""Verify a cache: checksums, the consistency of index and tensors, statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..data.failures import cache_file_error
from ..inference.fingerprint import DTYPES
from ..utils.errors import UserError
from ..utils.format import format_bytes
from ..utils.progress import track
from ..utils.seeding import generator
from . import format as fmt
from .encoder import LatentEncoder
from .reader import LatentCache
from .text import verify_text


@dataclass
class VerifyReport:
    lines: list[str] = field(default_factory=list)  # the summary
    faults: list[str] = field(default_factory=list)  # what is wrong, where, and what to do
    clips: int = 0
    bytes: int = 0  # of tensors that were read
    moments: list[fmt.Moments] = field(default_factory=list)  # of the intact shards


def verify(cache: Path, vae: Any = None, decode: int = 0) -> VerifyReport:
    """Read every byte of a cache. Each shard's index and tensors must fit, each checksum match, each clip be unique,
    and each shard's statistics be those of its tensors.

    Args:
        vae, decode: decode this many clips and encode them again, to measure the distance between the two latents.
    """
    header, result, seen = fmt.read_header(cache), VerifyReport(), dict[str, str]()
    names = _current_shards(cache)
    for name in track(names, "verify", "shard"):
        _verify_shard(cache, name, header, seen, result)
    lines, faults = result.lines, result.faults
    lines.append(f"{result.clips} clips in {len(names)} shards, {format_bytes(result.bytes)} read, "
                 f"{len(faults)} faults")
    stray = [path.name for path in (cache / "shards").iterdir() if path.suffix != ".parquet"
             and not path.with_suffix(".parquet").exists()]
    if stray:
        lines.append(f"{len(stray)} leftover files of interrupted builds; the next build removes them")
    measured = header.measured
    if result.moments and (measured is None or measured.clips != result.clips or not np.allclose(
            measured.latents_mean, fmt.Moments.merged(result.moments).mean, rtol=1e-9)):
        lines.append("the header's statistics are outdated, because a build was interrupted; the next build updates "
                     "them, and readers use those of the shards")
    texts, text_faults = verify_text(cache)
    if texts:
        lines.append(f"{texts} caption embeddings")
    faults += text_faults
    if decode and vae is not None and not faults:
        lines += _round_trips(cache, vae, decode)
    return result


def _current_shards(cache: Path) -> list[str]:
    """Return the names of the shards that no other one replaces."""
    names, replaced = fmt.committed_shards(cache), set[str]()
    for name in names:
        with suppress(UserError):  # reported when the shard itself is verified
            replaced.update(fmt.read_index(fmt.shard_paths(cache, name)[1], ("id",))[1].replaces)
    return [name for name in names if name not in replaced]


def _verify_shard(cache: Path, name: str, header: fmt.Header, seen: dict[str, str], result: VerifyReport) -> None:
    """Add a shard to the result; `seen` has the shard of each clip so far, by ID."""
    tensors, index = fmt.shard_paths(cache, name)
    try:
        table, notes = fmt.read_index(index)
    except UserError as error:
        result.faults.append(str(error))
        return
    for clip in table["id"].to_pylist():
        if clip in seen:
            result.faults.append(f"{index}: clip {clip} is in {seen[clip]} too; delete one of the two .parquet")
        seen[clip] = name
    result.clips += len(table)
    moments, advice = [], f"delete {index} and build again: only its clips are re-encoded"
    try:
        for fault, latent in _tensors(tensors, table.to_pylist(), header, notes) if len(table) else ():
            if latent is None:
                result.faults.append(f"{fault}; {advice}")
            else:
                moments.append(fmt.Moments.of(latent[: header.vae.latent_channels].float().numpy()))
        result.bytes += notes.tensor_bytes
    except (SafetensorError, OSError) as error:
        result.faults.append(str(cache_file_error(error, tensors, advice)))
    if moments and notes.moments is not None and len(moments) == len(table):
        recomputed = fmt.Moments.merged(moments)
        if recomputed.count != notes.moments.count or not np.allclose(recomputed.mean, notes.moments.mean, rtol=1e-9):
            result.faults.append(f"{index}: its statistics are not those of its tensors; delete it and build again")
        result.moments.append(recomputed)


def _tensors(path: Path, rows: list[dict[str, Any]], header: fmt.Header,
             notes: fmt.ShardNotes) -> Iterator[tuple[str, Tensor | None]]:
    """Yield for each row what is wrong with its tensor ("": nothing), and the tensor. Raises SafetensorError,
    OSError."""
    data = path.read_bytes()  # not mapped: an I/O error in a mapping kills the process
    if len(data) != notes.tensor_bytes:
        yield f"{path} has {len(data)} bytes, not {notes.tensor_bytes}", None
        return
    latents = load(data)
    if set(latents) != {row["id"] for row in rows}:
        yield f"{path} holds other tensors than its index says", None
        return
    for row in rows:
        latent = latents[row["id"]]
        if list(latent.shape) != row["shape"] or latent.dtype != DTYPES[header.dtype]:
            yield f"{path}: {row['id']} is {latent.dtype} {list(latent.shape)}, unlike its index", None
        elif hashlib.sha256(latent.view(torch.uint8).numpy().tobytes()).hexdigest() != row["checksum"]:
            yield f"{path}: the checksum of {row['id']} ({row['path']}) does not match", None
        else:
            yield "", latent


def _round_trips(cache: Path, vae: Any, count: int) -> list[str]:
    opened = LatentCache(cache, vae)
    encoder = LatentEncoder(vae)
    order = torch.randperm(len(opened), generator=generator(0, "verify")).tolist()[:count]
    std = torch.tensor(opened.latents_std)[:, None, None, None]
    frames, heights, widths = (opened.column(name) for name in ("frames", "height", "width"))
    errors = []
    for i in order:
        latent = opened.entry(i).float()
        video = encoder.decode(latent, frames[i].as_py(), heights[i].as_py(), widths[i].as_py()).clamp(-1, 1)
        errors.append(float(((encoder.encode(video)[0].cpu().float() - latent) / std).square().mean().sqrt()))
    return [f"{len(errors)} clips decoded and encoded again: latents differ by {np.median(errors):.3f} of a standard "
            f"deviation (median; at most {max(errors):.3f})"]
