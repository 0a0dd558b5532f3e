"""Build a latent cache, or continue one.

The files of a source belong to partitions, by the hash of their paths. For each partition its files are probed, its
clips planned as shards, the missing shards encoded, and its index committed; the next partition is planned meanwhile.
Every step is idempotent, and only committed files are needed to go on: so a build gives the same bytes however often it
was killed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...data.files import format_left_out
from ...data.listing import Listing, ScannedSource, scan_source
from ...data.scratch import open_scratch
from ...utils.backoff import Backoff
from ...utils.config import override
from ...utils.errors import UserError
from ...utils.progress import bar
from ...utils.storage import LocalStorage, Storage, open_storage
from .. import format as fmt
from ..encoder import LatentEncoder, choose_precision
from ..lock import lock_cache
from ..partition import INDEX, folder_of, partition_numbers, read_partition
from ..statistics import update_header
from .executors import open_executor
from .executors.executor import Executor
from .executors.runner import Resources
from .partition_build import BuildContext, PartitionBuild, make_partition_plan
from .plan import ClipPolicy
from .report import BuildSummary, SourceTotals, report_name
from .settings import BuildSettings

FILES_A_PARTITION = 16384  # of a new cache, at most; what a partition needs is held in memory
MAX_PARTITIONS = 2**20


def build_cache(source: Path | str, cache: Path | str, vae: Any, settings: BuildSettings | None = None,
                **options: Any) -> BuildSummary:
    """Encode every clip of `source` that `cache` does not hold yet. Latents are raw: not normalised.

    Within a partition, a file that was renamed or moved, or whose caption changed, is not encoded again: its rows are
    updated. Clips whose file is gone stay (`maintain.garbage.collect_garbage` removes them).

    Args:
        source: as `odvae.data.listing.scan_source` takes it.
        cache: the cache folder, or a URL of fsspec; created if missing.
        vae: an AutoencoderKLODVAE or an autoencoder of diffusers; runs on its own device and in its dtype.
        settings: of the build; `options` override fields of it.

    Raises:
        UserError: an empty source or an unreadable list, sizes that do not fit the VAE, a cache of another VAE or
            transform (naming the field), a folder that is not a cache, another process that changes it.
        OSError: the disk is full or fails; the shards committed before stay, and the next build continues after them.
    """
    begin = time.monotonic()
    settings = override(settings or BuildSettings(), options, "the build's settings")
    storage = open_storage(cache)
    encoder = _encoder(storage, vae, settings)
    with _prepare(source, storage, encoder, settings) as (context, listings, resources):
        if not storage.exists(fmt.HEADER):
            fmt.write_header(storage, context.header)
        summary = BuildSummary()
        with (bar(0, "encode", "clip") as progress,
              open_executor(encoder, storage, settings, source, resources, progress.update) as executor):
            _build(context, listings, executor, summary, progress)
            summary.usage, summary.encoders, summary.decoders = executor.usage, executor.encoders, executor.decoders
        summary.rates = {name: frames / max(1e-9, summary.encode_seconds) for name, frames in executor.frames.items()}
        if executor.has_lost:
            _remove_temporaries(storage, settings)
        summary.left_out = dict(listings.left_out)
        statistics = update_header(storage, context.header)
    summary.bytes, summary.raw_bytes, summary.frames = statistics.bytes, statistics.raw_bytes, statistics.frames
    summary.psnr = statistics.measured.psnr if statistics.measured else None
    summary.seconds = time.monotonic() - begin
    storage.write(report_name(settings.part), json.dumps(summary.report(settings.part), indent=2).encode())
    return summary


def dry_run(source: Path | str, cache: Path | str, vae: Any,
            settings: BuildSettings) -> tuple[SourceTotals, list[str]]:
    """Return what a build would do: totals, and a table of the buckets. Files are probed and nothing is encoded; the
    results are kept in the cache's folder, so that the build need not probe again."""
    storage = open_storage(cache)
    encoder = _encoder(storage, vae, settings)
    totals, reused = SourceTotals(), 0
    with (_prepare(source, storage, encoder, settings) as (context, listings, resources),
          open_executor(encoder, storage, settings, source, resources) as executor):
        for number, listing in listings.items():
            plan = make_partition_plan(context, number, listing, executor)
            totals.add(plan, plan.set_aside, context)
            stored = set(read_partition(storage, number, ("id",)).with_uncommitted().ids)
            reused += sum(clip.id in stored for clip in plan.items)
        lines = totals.lines(context.header.transform) + format_left_out(listings.left_out)
    return totals, [*lines, f"to encode: {totals.clips - reused} clips; in the cache already: {reused}"]


def _encoder(storage: Storage, vae: Any, settings: BuildSettings) -> LatentEncoder:
    return LatentEncoder(vae, settings.store, choose_precision(settings.precision, storage, vae, settings.devices),
                         compiled_batch=settings.compiled_batch)


@contextmanager
def _prepare(source: Path | str, storage: Storage, encoder: LatentEncoder, settings: BuildSettings
             ) -> Iterator[tuple[BuildContext, PartitionListings, Resources]]:
    """List a source, and hold the cache. Nothing is written to it before everything is validated."""
    header, backoff = make_header(encoder, settings), Backoff(settings.patience)
    count = fmt.read_header(storage).partitions if storage.exists(fmt.HEADER) else settings.partitions
    i, n = settings.part

    def keep(key: int) -> bool:
        return count is None or key % count % n == i - 1

    with scan_source(source, settings.columns, backoff, keep) as scanned:
        header = check_folder(storage, header, count or _count_partitions(scanned, settings))
        with lock_cache(storage, settings.part), open_scratch(settings.scratch_gb) as scratch:
            yield (BuildContext(storage, header, encoder, settings),
                   PartitionListings(scanned, header.partitions, settings.part), Resources(backoff, scratch))


class PartitionListings(Mapping[int, Listing]):
    """What a source holds of each partition of a part; it is read when it is asked for."""

    def __init__(self, source: ScannedSource, count: int, part: tuple[int, int]) -> None:
        self._source, self._count = source, count
        self._numbers = range(part[0] - 1, count, part[1])

    @property
    def left_out(self) -> Mapping[str, int]:
        """Files that are not read, counted by extension, of the partitions that have been read."""
        return self._source.left_out

    def __getitem__(self, number: int) -> Listing:
        return self._source.partition(number, self._count)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


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


def check_folder(storage: Storage, header: fmt.Header, partitions: int) -> fmt.Header:
    """Return the header of the cache, or the one that a new cache will have, with this number of partitions. Raise
    UserError unless the folder is a cache with the same header, or can become one."""
    if storage.exists(fmt.HEADER):
        old = fmt.read_header(storage)
        different = fmt.differences(old, header)
        if different:
            raise UserError(f"{storage.root} was built with another VAE or transform ({'; '.join(different)}); build "
                            "into another folder, or use the same VAE and options")
        return old
    if storage.exists(fmt.MERGE_PLAN):
        fmt.read_header(storage)  # raises an error that says so
    others = {*storage.sizes(""), *storage.folders("")} - {"partitions", fmt.WORK, "text"}
    if others or any(storage.exists(f"{folder_of(number)}/{INDEX}") for number in partition_numbers(storage)):
        raise UserError(f"{storage.root} exists and is not a latent cache; give an empty or a new folder")
    return header.model_copy(update={"partitions": partitions})


def _count_partitions(source: ScannedSource, settings: BuildSettings) -> int:
    """Choose the number of partitions of a new cache: such that what a partition holds, and the next one, fit into
    memory, and their files onto the local scratch."""
    by_bytes = 2 * source.remote_bytes / (settings.scratch_gb * 1e9) if settings.scratch_gb else 0.0
    least = max(int(source.files) / FILES_A_PARTITION, by_bytes, 1)
    return min(MAX_PARTITIONS, 1 << math.ceil(math.log2(least)))


def _remove_temporaries(storage: Storage, settings: BuildSettings) -> None:
    """Remove the unfinished files of workers that died, unless other parts of the build write here."""
    if isinstance(storage, LocalStorage) and settings.part[1] == 1:
        storage.remove_temporaries()


def _build(context: BuildContext, listings: Mapping[int, Listing], executor: Executor, summary: BuildSummary,
           progress: Any) -> None:
    """Build partition after partition: while one is encoded, the next is planned."""
    running: dict[int, PartitionBuild] = {}
    begin: float | None = None

    def units() -> Iterator[Any]:
        nonlocal begin
        planned = 0
        for k, build in enumerate(_plan_ahead(context, listings, executor), 1):
            begin = begin or time.monotonic()
            running[build.number] = build
            planned += sum(len(unit.clips) for unit in build.units)
            progress.total = round(planned * len(listings) / k)  # the other partitions as those up to here
            if build.complete:
                finish(build)
            yield from build.units

    def finish(build: PartitionBuild) -> None:
        del running[build.number]
        summary.add(build.plan, build.commit(), context)
        summary.reused += sum(clip.id in build.stored for clip in build.plan.items)

    for unit, added in executor.encode(units()):
        build = running[unit.partition]
        build.add(added)
        summary.done += added.shard.clips
        summary.written += added.shard.bytes
        summary.frames_encoded += sum(added.table["frames"].to_pylist())
        if build.complete:
            finish(build)
    summary.encode_seconds = time.monotonic() - (begin or time.monotonic())


def _plan_ahead(context: BuildContext, listings: Mapping[int, Listing],
                executor: Executor) -> Iterator[PartitionBuild]:
    """Plan the partitions in order, in a thread, one ahead."""
    with ThreadPoolExecutor(1) as thread:
        numbers = iter(listings)

        def submit() -> Any:
            number = next(numbers, None)
            return None if number is None else thread.submit(
                lambda: PartitionBuild(context, number, listings[number], executor))

        ahead = submit()
        try:
            while ahead is not None:
                build = ahead.result()
                ahead = submit()
                yield build
        except BaseException:
            executor.cancel()
            raise
