"""Build a latent cache, or continue one: list, probe and plan; then decode, encode and write at the same time.

Any number of processes may run the same build (`lease`). They share one plan, which the first of them writes: shards of
clips. A process claims a shard, encodes it in batches that do not cross its end, and commits it. So a build gives the
same bytes however many processes ran it and however often they were killed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.files import format_left_out
from ...data.listing import Listing, list_entries
from ...data.video.reader import VideoError
from ...utils.backoff import Backoff
from ...utils.config import override
from ...utils.errors import UserError, output_path
from ...utils.format import format_bytes
from ...utils.progress import bar
from .. import format as fmt
from ..encoder import LatentEncoder
from ..lease import BuildLease
from .decode_pool import DecodePool
from .plan import ClipPolicy, Plan, PlannedClip, RejectedClip, assign_shards, make_plan, share_set_aside
from .probe import WAIT, probe_files
from .settings import BuildSettings
from .shard_encoder import EncodeCounts, ShardEncoder
from .shard_index import ShardIndex
from .shared_plan import agree_on_shards, forget_plan

MAX_SHARD_BYTES = 256e6


@dataclass(frozen=True)
class BuildSummary:
    """What a build did, and what the cache holds after it."""

    done: int  # clips encoded by this process
    elsewhere: int  # clips encoded by other processes during this build
    reused: int  # clips of the source that were in the cache already
    duplicates: int  # clips of the source that are the same as another one
    set_aside: list[RejectedClip]  # files and clips of the source that could not be used
    share_set_aside: float  # 0 to 1, mean over the source's files of the rejected share of each
    bytes: int  # of the cache's shards on disk
    raw_bytes: int  # of all its clips as uint8 RGB, at their encoded size
    frames: int  # of video, in the whole cache
    seconds: float  # duration of this build
    encode_seconds: float  # from the first clip's decoding to the last shard
    frames_encoded: int
    captions_from_names: int  # files of the source without any other caption
    left_out: dict[str, int]  # files in the source that are not read, counted by extension
    notes: dict[str, int]  # number of files by conversion applied to their frames, see `VideoInfo.notes`
    psnr: float | None  # dB, mean over the clips on which it is measured


def build_cache(source: Path | str, cache: Path | str, vae: Any, settings: BuildSettings | None = None,
                **options: Any) -> BuildSummary:
    """Encode every clip of `source` that `cache` does not hold yet. Latents are raw: not normalised.

    A file that was renamed or moved, or whose caption changed, is not encoded again: its rows are updated. Clips whose
    file is gone stay (`maintain.collect_garbage` removes them). Other processes, on this host or on others that share
    the folders, may run the same build at the same time.

    Args:
        source: as `odvae.data.listing.list_entries` takes it.
        cache: the cache folder; created if missing.
        vae: an AutoencoderKLODVAE or an autoencoder of diffusers; runs on its own device and in its dtype.
        settings: of the build; `options` override fields of it.

    Raises:
        UserError: an empty source or an unreadable list, sizes that do not fit the VAE, a cache of another VAE or
            transform (naming the field), a folder that is not a cache, other processes that build from another source.
        OSError: the disk is full or fails; the shards committed before stay, and the next build continues after them.
    """
    begin = time.monotonic()
    settings = override(settings or BuildSettings(), options, "the build's settings")
    cache, encoder = output_path(cache), LatentEncoder(vae, settings.store)
    with _prepare(source, cache, encoder, settings) as (header, plan, left_out, lease, workers):
        _write_header(cache, header, lease)
        shards, shard_index = agree_on_shards(
            cache, plan.items, lease, retry=settings.retry, file_seconds=settings.file_seconds,
            assign=partial(assign_shards, bytes_of=_bytes_of(encoder, settings), shard_bytes=settings.shard_mb * 1e6,
                           shard_clips=settings.shard_clips))
        ids_before = set(shard_index.ids)
        shard_index.update_captions(plan.items, lease)
        encode_begin = time.monotonic()
        counts = _encode(shards, shard_index, encoder, settings, lease, workers,
                         _choose_psnr_clips(plan.items, settings.psnr_clips))
        encode_seconds = time.monotonic() - encode_begin
        shard_index.update()
        forget_plan(cache, plan.items, lease)
        rejected = plan.set_aside + shard_index.failures({item.id for item in plan.items})
        measured = shard_index.measured()
        if fmt.read_header(cache).measured != measured:
            lease.write(fmt.header_path(cache), _json(header.model_copy(update={"measured": measured})))
        _write_rejects(cache, rejected, lease)
    planned = {item.id for item in plan.items}
    new = (shard_index.ids & planned) - ids_before
    used_files = (item.ref.name for item in plan.items if item.id in shard_index.ids)
    return BuildSummary(
        done=counts.clips, elsewhere=len(new) - counts.clips, reused=len(planned & ids_before),
        duplicates=plan.duplicates, set_aside=rejected, seconds=time.monotonic() - begin,
        encode_seconds=encode_seconds, frames_encoded=counts.frames,
        captions_from_names=len({item.ref for item in plan.items if item.caption_from_name}), left_out=left_out,
        notes=dict(plan.notes), share_set_aside=share_set_aside(plan.files, used_files, rejected),
        psnr=measured.psnr if measured else None, bytes=shard_index.total("bytes"),
        raw_bytes=shard_index.total("raw_bytes"), frames=shard_index.total("frames"))


def dry_run(source: Path | str, cache: Path | str, vae: Any, settings: BuildSettings) -> tuple[Plan, list[str]]:
    """Return a build's plan, and a table of its buckets. Files are probed and nothing is encoded; the results are kept
    in the cache's folder, so that the build need not probe again."""
    cache, encoder = output_path(cache), LatentEncoder(vae, settings.store)
    with _prepare(source, cache, encoder, settings) as (header, plan, left_out, _, _):
        stored = ShardIndex(cache).ids
    lines = plan.report(header.transform, _bytes_of(encoder, settings)) + format_left_out(left_out)
    reused = sum(item.id in stored for item in plan.items)
    return plan, [*lines, f"to encode: {len(plan.items) - reused} clips; in the cache already: {reused}"]


@contextmanager
def _prepare(source: Path | str, cache: Path, encoder: LatentEncoder,
           settings: BuildSettings) -> Iterator[tuple[fmt.Header, Plan, dict[str, int], BuildLease, DecodePool]]:
    """Run a build up to its plan. Nothing is written to `cache` before everything is validated."""
    header, backoff = make_header(encoder, settings), Backoff(settings.patience)
    listing = list_entries(source, settings.columns, backoff)
    check_folder(cache, header)
    with BuildLease(cache / "work") as lease, _workers(settings, backoff) as workers:
        plan = _make_plan(listing, cache, header, settings, lease, workers, _bytes_of(encoder, settings))
        yield header, plan, dict(listing.left_out), lease, workers


def make_header(encoder: LatentEncoder, settings: BuildSettings) -> fmt.Header:
    """Return the header of a new cache. Raises UserError for sizes that do not fit the VAE, and if PySceneDetect is
    needed and missing."""
    policy = ClipPolicy.parse(settings.clips)
    if policy.kind == "scenes" and importlib.util.find_spec("scenedetect") is None:
        raise UserError("--clips scenes needs PySceneDetect: pip install 'odvae-lvdm[scenes]'")
    lengths = [] if policy.kind == "whole" else sorted(set(settings.frames))
    encoder.check(lengths or [1], settings.sizes)
    return fmt.Header(
        vae=encoder.header,
        transform=fmt.TransformHeader(frame_rate=settings.frame_rate, frames=lengths,
                                      sizes=sorted(set(settings.sizes))),
        stored=settings.store, dtype=settings.dtype,
        made_with={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "decord2", "av")})


def check_folder(cache: Path, header: fmt.Header) -> None:
    """Raise UserError unless the folder is a cache with the same header, or can become one."""
    if fmt.header_path(cache).exists():
        different = fmt.differences(fmt.read_header(cache), header)
        if different:
            raise UserError(f"{cache} was built with another VAE or transform ({'; '.join(different)}); build into "
                            "another folder, or use the same VAE and options")
        return
    folders = {"work", "files", "shards", "text"}
    if cache.exists() and (not cache.is_dir() or any(path.name not in folders for path in cache.iterdir())
                           or fmt.committed_shards(cache) or (cache / fmt.MERGE_PLAN).exists()):
        if fmt.header_path(cache).exists():  # another process wrote it meanwhile
            return check_folder(cache, header)
        if (cache / fmt.MERGE_PLAN).exists():
            fmt.read_header(cache)  # raises an error that says so
        raise UserError(f"{cache} exists and is not a latent cache; give an empty or a new folder")


def _workers(settings: BuildSettings, backoff: Backoff) -> DecodePool:
    return DecodePool(settings.workers or min(8, os.cpu_count() or 1), settings.file_seconds, backoff)


def _make_plan(listing: Listing, cache: Path, header: fmt.Header, settings: BuildSettings, lease: BuildLease,
             workers: DecodePool, bytes_of: Callable[[PlannedClip], int]) -> Plan:
    policy = ClipPolicy.parse(settings.clips)
    probed = probe_files((entry.ref for entry in listing.entries), cache, lease, workers,
                         keep_truncated=settings.keep_truncated, scenes=policy.kind == "scenes", retry=settings.retry)
    plan = make_plan(listing.entries, probed, header, policy)
    plan.files.update(ref.name for ref, _ in listing.set_aside)
    plan.set_aside += [RejectedClip.of(ref.name, error) for ref, error in listing.set_aside]
    too_large = [item for item in plan.items if bytes_of(item) > MAX_SHARD_BYTES]
    plan.set_aside += [RejectedClip.of(item.ref.name, VideoError(
        f"{item.ref}: the latent of its {item.frames} frames takes {format_bytes(bytes_of(item))}, and a shard holds "
        f"at most {format_bytes(MAX_SHARD_BYTES)}", "cut it, with --clips every:SECONDS or back-to-back", "too long"),
        item.start) for item in too_large]
    plan.items = [item for item in plan.items if bytes_of(item) <= MAX_SHARD_BYTES]
    return plan


def _write_header(cache: Path, header: fmt.Header, lease: BuildLease) -> None:
    """Write the header, unless another process of this build already has."""
    while not lease.claim("header"):
        time.sleep(WAIT)
    try:
        check_folder(cache, header)
        if not fmt.header_path(cache).exists():
            lease.write(fmt.header_path(cache), _json(header))
        (cache / "shards").mkdir(exist_ok=True)
    finally:
        lease.release("header")


def _encode(shards: dict[str, list[PlannedClip]], shard_index: ShardIndex, encoder: LatentEncoder,
            settings: BuildSettings, lease: BuildLease, workers: DecodePool, psnr_clips: set[str]) -> EncodeCounts:
    """Encode the shards that no other process does, then wait for the others, and take over from those that die."""
    # Each process begins at another shard, so that they seldom compete for one.
    names = list(shards)
    first = hash(lease.name) % max(1, len(names))
    waiting = names[first:] + names[:first] if lease.live_peers() else names

    def claim_each(names: Sequence[str]) -> Iterator[tuple[str, list[PlannedClip]]]:
        for name in names:
            if not shard_index.committed(name) and lease.claim(name):
                if shard_index.committed(name):
                    lease.release(name)
                else:
                    yield name, shards[name]

    with bar(sum(map(len, shards.values())), "encode", "clip") as progress:
        shard_encoder = ShardEncoder(encoder, shard_index.cache, settings, lease, workers, psnr_clips, progress.update)
        while waiting:
            shard_encoder.encode(claim_each(waiting))
            waiting = [name for name in waiting if not shard_index.committed(name)]
            if waiting:
                progress.set_postfix_str(f"{len(waiting)} shards in other processes", refresh=False)
                time.sleep(WAIT)
    return shard_encoder.counts


def _choose_psnr_clips(items: Sequence[PlannedClip], count: int) -> set[str]:
    """Choose the clips whose PSNR is measured: at random, and the same in every process."""
    return set(sorted(item.id for item in items)[:count])


def _bytes_of(encoder: LatentEncoder, settings: BuildSettings) -> Callable[[PlannedClip], int]:
    """Return a function from a clip to its bytes in a shard, including its entry in the shard's header."""
    return lambda item: 200 + encoder.bytes_of(item.frames, item.height, item.width, settings.dtype)


def _write_rejects(cache: Path, rejected: Sequence[RejectedClip], lease: BuildLease) -> None:
    path = cache / "rejects.parquet"
    if not rejected:
        path.unlink(missing_ok=True)
        return
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(entry) for entry in rejected], schema=fmt.REJECTS), sink)
    lease.write(path, sink.getvalue())


def _json(header: fmt.Header) -> bytes:
    return (header.model_dump_json(indent=2) + "\n").encode()
