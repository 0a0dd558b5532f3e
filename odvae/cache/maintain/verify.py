"""Verify a cache: checksums, the consistency of index and tensors, statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...data.failures import cache_file_error
from ...inference.fingerprint import DTYPES
from ...utils.errors import UserError
from ...utils.format import format_bytes
from ...utils.progress import track
from ...utils.seeding import generator
from ...utils.storage import Storage, open_storage
from .. import format as fmt
from ..encoder import LatentEncoder
from ..lock import lock_cache
from ..moments import Moments
from ..partition import Shard, folder_of, partition_numbers, read_partition, tensors_of, write_partition
from ..reader import LatentCache
from .text import verify_text

ADVICE = "run `odvae cache verify --repair` and build again: only its clips are re-encoded"


@dataclass
class VerifyReport:
    lines: list[str] = field(default_factory=list)  # the summary
    faults: list[str] = field(default_factory=list)  # what is wrong, where, and what to do
    clips: int = 0
    shards: int = 0
    leftovers: int = 0  # files of interrupted builds
    removed: int = 0  # clips, by the repair
    bytes: int = 0  # of tensors that were read
    moments: list[Moments] = field(default_factory=list)  # of the intact shards of each partition


def verify(cache: Path, vae: Any = None, decode: int = 0, repair: bool = False) -> VerifyReport:
    """Read every byte of a cache. Each partition's rows and tensors must fit, each checksum match, each clip be unique
    in its partition, and each shard's statistics be those of its tensors.

    Args:
        vae, decode: decode this many clips and encode them again, to measure the distance between the two latents.
        repair: remove the rows of faulty shards, so that the next build encodes their clips again.
    """
    storage = open_storage(cache)
    header, result = fmt.read_header(storage), VerifyReport()
    with lock_cache(storage) if repair else nullcontext():
        numbers = partition_numbers(storage)
        for number in track(numbers, "verify", "partition"):
            _verify_partition(storage, number, header, result, repair)
    lines, faults = result.lines, result.faults
    lines.append(f"{result.clips} clips in {result.shards} shards, {format_bytes(result.bytes)} read, "
                 f"{len(faults)} faults")
    if result.leftovers:
        lines.append(f"{result.leftovers} leftover files of interrupted builds; the next build removes them")
    if result.removed:
        lines.append(f"{result.removed} clips of faulty shards removed; the next build encodes them again")
    measured = header.measured
    if result.moments and (measured is None or measured.clips != result.clips or not np.allclose(
            measured.latents_mean, Moments.merged(result.moments).mean, rtol=1e-9)):
        lines.append("the header's statistics are outdated, because a build was interrupted; the next build updates "
                     "them, and readers use those of the shards")
    texts, text_faults = verify_text(cache)
    if texts:
        lines.append(f"{texts} caption embeddings")
    faults += text_faults
    if decode and vae is not None and not faults:
        lines += _round_trips(cache, vae, decode)
    return result


def _verify_partition(storage: Storage, number: int, header: fmt.Header, result: VerifyReport, repair: bool) -> None:
    """Add a partition to the result."""
    try:
        partition = read_partition(storage, number, check=False).with_uncommitted()
    except UserError as error:
        result.faults.append(str(error))
        return
    seen, sound, first = set[str](), list[tuple[Shard, pa.Table]](), len(result.moments)
    for shard, table in partition.tables():
        before = len(result.faults)
        _verify_shard(storage, number, shard, table, header, seen, result)
        if len(result.faults) == before:
            sound.append((shard, table))
    if shards := result.moments[first:]:
        result.moments[first:] = [Moments.merged(shards)]
    used = {f"{shard.name}{suffix}" for shard in partition.shards for suffix in (".safetensors", ".parquet")}
    result.leftovers += sum(name.endswith(".safetensors") and name not in used
                            for name in storage.sizes(folder_of(number)))
    if repair and len(sound) < len(partition.shards):
        rest = pa.concat_tables([table for _, table in sound] or [fmt.SCHEMA.empty_table()])
        result.removed += len(partition.table) - len(rest)
        write_partition(storage, replace(partition, shards=tuple(shard for shard, _ in sound), table=rest))


def _verify_shard(storage: Storage, number: int, shard: Shard, table: pa.Table, header: fmt.Header, seen: set[str],
                  result: VerifyReport) -> None:
    """Add a shard to the result; `seen` has the clips of the partition so far."""
    path = storage.path(tensors_of(number, shard.name))
    for clip in table["id"].to_pylist():
        if clip in seen:
            result.faults.append(f"{path}: clip {clip} is in another shard too; {ADVICE}")
        seen.add(clip)
    result.clips += len(table)
    result.shards += 1
    moments = []
    try:
        for fault, latent in _tensors(storage, number, shard, table.to_pylist(), header):
            if latent is None:
                result.faults.append(f"{fault}; {ADVICE}")
            else:
                moments.append(Moments.of(latent[: header.vae.latent_channels].float().numpy()))
        result.bytes += shard.bytes
    except (SafetensorError, OSError) as error:
        result.faults.append(str(cache_file_error(error, path, ADVICE)))
    if moments and shard.moments is not None and len(moments) == len(table):
        recomputed = Moments.merged(moments)
        if recomputed.count != shard.moments.count or not np.allclose(recomputed.mean, shard.moments.mean, rtol=1e-9):
            result.faults.append(f"{path}: its statistics are not those of its tensors; {ADVICE}")
        result.moments.append(recomputed)


def _tensors(storage: Storage, number: int, shard: Shard, rows: list[dict[str, Any]],
             header: fmt.Header) -> Iterator[tuple[str, Tensor | None]]:
    """Yield for each row what is wrong with its tensor ("": nothing), and the tensor. Raises SafetensorError,
    OSError."""
    path = storage.path(tensors_of(number, shard.name))
    data = storage.read(tensors_of(number, shard.name))  # not mapped: an I/O error in a mapping kills the process
    if len(data) != shard.bytes:
        yield f"{path} has {len(data)} bytes, not {shard.bytes}", None
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
    sizes = zip(*(opened.take(order, name) for name in ("frames", "height", "width")), strict=True)
    errors = []
    for i, size in zip(order, sizes, strict=True):
        latent = opened.entry(i).float()
        video = encoder.decode(latent, *size).clamp(-1, 1)
        errors.append(float(((encoder.encode(video)[0].cpu().float() - latent) / std).square().mean().sqrt()))
    return [f"{len(errors)} clips decoded and encoded again: latents differ by {np.median(errors):.3f} of a standard "
            f"deviation (median; at most {max(errors):.3f})"]
