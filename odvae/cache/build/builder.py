"""Build a latent cache, or go on with one: list, look, plan; then decode, encode and write at the same time.

Any number of processes may run the same build (`lease`). What binds them is the plan, which the first of them writes
down: shards of clips. A shard is claimed, encoded in batches that do not cross its end, and committed. So a build ends
with the same bytes however many processes there were and however often they were killed.
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

from ...data.files import left_out_lines
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
from .decode_pool import Workers
from .plan import ClipPolicy, Plan, PlannedClip, RejectedClip, assign_shards, make_plan, share_set_aside
from .probe import WAIT, scan
from .settings import BuildSettings
from .shard_encoder import EncodeCounts, ShardEncoder
from .shard_index import ShardIndex
from .shared_plan import agree_on_shards, forget_plan

LARGEST = 256e6  # bytes of a shard


@dataclass(frozen=True)
class BuildSummary:
    """What one build did, and what the cache holds after it."""

    done: int  # clips encoded by this process
    elsewhere: int  # and by other processes meanwhile
    reused: int  # clips of the source that were in the cache already
    duplicates: int  # clips of the source that are the same as another one
    set_aside: list[RejectedClip]  # files and clips of the source that could not be used
    share_set_aside: float  # 0 to 1, the mean over the source's files of how much of each that is
    bytes: int  # of the cache's shards on disk
    raw_bytes: int  # of all its clips as uint8 RGB, at the size at which they were encoded
    frames: int  # of video, in the whole cache
    seconds: float  # that this build took
    encode_seconds: float  # from the first clip's decoding to the last shard
    frames_encoded: int
    captions_from_names: int  # files of the source that had no other caption
    left_out: dict[str, int]  # files in the source that are not read, counted by ending
    notes: dict[str, int]  # files by what is done to their pictures, `VideoInfo.notes`
    psnr: float | None  # dB, mean over the probes


def build_cache(source: Path | str, cache: Path | str, vae: Any, settings: BuildSettings | None = None,
                **options: Any) -> BuildSummary:
    """Encode every clip of `source` that `cache` does not hold yet. Latents are raw, as the encoder says them.

    A file that was renamed or moved, or whose caption changed, is not encoded again: its rows are brought up to date.
    Clips whose file is gone stay (`maintain.collect_garbage` removes them). Other processes, on this host or on others
    that share the folders, may run the same build at the same time.

    Args:
        source: as `odvae.data.listing.list_entries` takes it.
        cache: the cache folder; made where it is missing.
        vae: an AutoencoderKLODVAE or an autoencoder of diffusers; runs where it is and in its dtype.
        settings: how; `options` are fields of it that differ.

    Raises:
        UserError: an empty source or a list that cannot be read, sizes that do not fit the VAE, a cache of another VAE
            or transform (naming the field), a folder that is something else, others that build from another source.
        OSError: the disk is full or fails; the shards before stay, and the next build goes on after them.
    """
    began = time.monotonic()
    settings = override(settings or BuildSettings(), options, "the build's settings")
    cache, encoder = output_path(cache), LatentEncoder(vae, settings.store)
    with _begun(source, cache, encoder, settings) as (header, plan, left_out, here, workers):
        _write_header(cache, header, here)
        shards, contents = agree_on_shards(
            cache, plan.items, here, retry=settings.retry, file_seconds=settings.file_seconds,
            cut=partial(assign_shards, bytes_of=_bytes_of(encoder, settings), shard_bytes=settings.shard_mb * 1e6,
                        shard_clips=settings.shard_clips))
        before = set(contents.ids)
        contents.update_captions(plan.items, here)
        started = time.monotonic()
        done = _encode(shards, contents, encoder, settings, here, workers, _probes(plan.items, settings.probes))
        ended = time.monotonic()
        contents.update()
        forget_plan(cache, plan.items, here)
        aside = plan.set_aside + contents.failures({item.id for item in plan.items})
        measured = contents.measured()
        if fmt.read_header(cache).measured != measured:
            here.write(fmt.header_path(cache), _json(header.model_copy(update={"measured": measured})))
        _write_rejects(cache, aside, here)
    wanted = {item.id for item in plan.items}
    new = (contents.ids & wanted) - before
    return BuildSummary(
        done=done.clips, elsewhere=len(new) - done.clips, reused=len(wanted & before), duplicates=plan.duplicates,
        set_aside=aside, seconds=time.monotonic() - began, encode_seconds=ended - started, frames_encoded=done.frames,
        captions_from_names=len({item.place for item in plan.items if item.caption_from_name}), left_out=left_out,
        notes=dict(plan.notes),
        share_set_aside=share_set_aside(plan.files, (item.place.name for item in plan.items if item.id in contents.ids),
                                        aside),
        psnr=measured.psnr if measured else None, bytes=contents.total("bytes"),
        raw_bytes=contents.total("raw_bytes"), frames=contents.total("frames"))


def dry_run(source: Path | str, cache: Path | str, vae: Any, settings: BuildSettings) -> tuple[Plan, list[str]]:
    """What a build would do: its plan, and a table of what falls where. Files are looked at and nothing is encoded;
    what was seen is kept in the cache's folder, so that the build need not look again."""
    cache, encoder = output_path(cache), LatentEncoder(vae, settings.store)
    with _begun(source, cache, encoder, settings) as (header, plan, left_out, _, _):
        stored = ShardIndex(cache).ids
    lines = plan.report(header.transform, _bytes_of(encoder, settings)) + left_out_lines(left_out)
    there = sum(item.id in stored for item in plan.items)
    return plan, [*lines, f"to encode: {len(plan.items) - there} clips; in the cache already: {there}"]


@contextmanager
def _begun(source: Path | str, cache: Path, encoder: LatentEncoder,
           settings: BuildSettings) -> Iterator[tuple[fmt.Header, Plan, dict[str, int], BuildLease, Workers]]:
    """A build up to its plan. Nothing is written to `cache` before all that can be refused was."""
    header, backoff = make_header(encoder, settings), Backoff(settings.patience)
    listing = list_entries(source, settings.columns, backoff)
    check_folder(cache, header)
    with BuildLease(cache / "work") as here, _workers(settings, backoff) as workers:
        plan = _planned(listing, cache, header, settings, here, workers, _bytes_of(encoder, settings))
        yield header, plan, dict(listing.left_out), here, workers


def make_header(encoder: LatentEncoder, settings: BuildSettings) -> fmt.Header:
    """Raises UserError for sizes that do not fit the VAE, and where PySceneDetect is needed and missing."""
    cutting = ClipPolicy.parse(settings.clips)
    if cutting.kind == "scenes" and importlib.util.find_spec("scenedetect") is None:
        raise UserError("--clips scenes needs PySceneDetect: pip install 'odvae-lvdm[scenes]'")
    lengths = [] if cutting.kind == "whole" else sorted(set(settings.frames))
    encoder.check(lengths or [1], settings.sizes)
    return fmt.Header(
        vae=encoder.header,
        transform=fmt.TransformHeader(frame_rate=settings.frame_rate, frames=lengths,
                                      sizes=sorted(set(settings.sizes))),
        stored=settings.store, dtype=settings.dtype,
        made_with={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "decord2", "av")})


def check_folder(cache: Path, header: fmt.Header) -> None:
    """Raises UserError unless it is a cache that was made in the same way, or may become one."""
    if fmt.header_path(cache).exists():
        different = fmt.differences(fmt.read_header(cache), header)
        if different:
            raise UserError(f"{cache} was made with another VAE or transform ({'; '.join(different)}); build into "
                            "another folder, or give what it was made with")
        return
    ours = {"work", "files", "shards", "text"}
    if cache.exists() and (not cache.is_dir() or any(path.name not in ours for path in cache.iterdir())
                           or fmt.committed_shards(cache) or (cache / fmt.MERGING).exists()):
        if fmt.header_path(cache).exists():  # another process wrote it meanwhile
            return check_folder(cache, header)
        if (cache / fmt.MERGING).exists():
            fmt.read_header(cache)  # which says so
        raise UserError(f"{cache} is there already and is not a latent cache; give an empty or a new folder")


def _workers(settings: BuildSettings, backoff: Backoff) -> Workers:
    return Workers(settings.workers or min(8, os.cpu_count() or 1), settings.file_seconds, backoff)


def _planned(listing: Listing, cache: Path, header: fmt.Header, settings: BuildSettings, here: BuildLease,
             workers: Workers, bytes_of: Callable[[PlannedClip], int]) -> Plan:
    cutting = ClipPolicy.parse(settings.clips)
    found = scan((entry.place for entry in listing.entries), cache, here, workers,
                 keep_truncated=settings.keep_truncated, scenes=cutting.kind == "scenes", retry=settings.retry)
    plan = make_plan(listing.entries, found, header, cutting)
    plan.files.update(place.name for place, _ in listing.set_aside)
    plan.set_aside += [RejectedClip.of(place.name, error) for place, error in listing.set_aside]
    too_large = [item for item in plan.items if bytes_of(item) > LARGEST]
    plan.set_aside += [RejectedClip.of(item.place.name, VideoError(
        f"{item.place}: the latent of its {item.frames} frames takes {format_bytes(bytes_of(item))}, and a shard holds "
        f"{format_bytes(LARGEST)}", "cut it, with --clips every:SECONDS or back-to-back", "too long"), item.start)
        for item in too_large]
    plan.items = [item for item in plan.items if bytes_of(item) <= LARGEST]
    return plan


def _write_header(cache: Path, header: fmt.Header, here: BuildLease) -> None:
    """Once: of several processes that begin one cache the first one's counts."""
    while not here.claim("header"):
        time.sleep(WAIT)
    try:
        check_folder(cache, header)
        if not fmt.header_path(cache).exists():
            here.write(fmt.header_path(cache), _json(header))
        (cache / "shards").mkdir(exist_ok=True)
    finally:
        here.release("header")


def _encode(shards: dict[str, list[PlannedClip]], contents: ShardIndex, encoder: LatentEncoder, settings: BuildSettings,
            here: BuildLease, workers: Workers, probes: set[str]) -> EncodeCounts:
    """Encode what no other process does, then wait for the others, and take over from those that die."""
    # Each process begins somewhere else, so that they seldom want the same shard.
    names = list(shards)
    turn = hash(here.name) % max(1, len(names))
    waiting = names[turn:] + names[:turn] if here.live_peers() else names

    def mine(names: Sequence[str]) -> Iterator[tuple[str, list[PlannedClip]]]:
        for name in names:
            if not contents.committed(name) and here.claim(name):
                if contents.committed(name):
                    here.release(name)
                else:
                    yield name, shards[name]

    with bar(sum(map(len, shards.values())), "encode", "clip") as progress:
        shard_encoder = ShardEncoder(encoder, contents.cache, settings, here, workers, probes, progress.update)
        while waiting:
            shard_encoder.encode(mine(waiting))
            waiting = [name for name in waiting if not contents.committed(name)]
            if waiting:
                progress.set_postfix_str(f"{len(waiting)} shards in other processes", refresh=False)
                time.sleep(WAIT)
    return shard_encoder.counts


def _probes(items: Sequence[PlannedClip], count: int) -> set[str]:
    """Whose PSNR is measured: a random choice that is the same in every process."""
    return set(sorted(item.id for item in items)[:count])


def _bytes_of(encoder: LatentEncoder, settings: BuildSettings) -> Callable[[PlannedClip], int]:
    """Of a clip in a shard, its place in the table of contents included."""
    return lambda item: 200 + encoder.bytes_of(item.frames, item.height, item.width, settings.dtype)


def _write_rejects(cache: Path, aside: Sequence[RejectedClip], here: BuildLease) -> None:
    path = cache / "rejects.parquet"
    if not aside:
        path.unlink(missing_ok=True)
        return
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(entry) for entry in aside], schema=fmt.REJECTS), sink)
    here.write(path, sink.getvalue())


def _json(header: fmt.Header) -> bytes:
    return (header.model_dump_json(indent=2) + "\n").encode()
