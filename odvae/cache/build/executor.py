"""Where the units of a build run: on this machine. An executor probes files and encodes shards, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ...data.sources import MediaRef
from ...data.video.reader import VideoError
from ...utils.storage import Storage
from ..encoder import LatentEncoder
from ..partition import CommittedShard
from .decode_pool import DecodePool
from .decode_worker import MediaInfo
from .settings import BuildSettings
from .shard_encoder import EncodeUnit, ShardEncoder


class Executor(Protocol):
    """Runs the units of a build."""

    def probe(self, refs: Sequence[MediaRef]) -> Iterator[MediaInfo | VideoError]:
        """Probe files, and yield what is known of each, in order."""

    def encode(self, units: Iterable[EncodeUnit]) -> Iterator[tuple[EncodeUnit, CommittedShard]]:
        """Encode and commit shards, and yield each once it is committed, in any order. Units are taken as they can be
        run."""

    def cancel(self) -> None:
        """End all work as soon as possible."""


class LocalExecutor:
    """Runs units in this process, which encodes, and in worker processes, which decode.

    Args:
        on_progress: called with the number of clips that are done.
    """

    def __init__(self, encoder: LatentEncoder, storage: Storage, settings: BuildSettings, workers: DecodePool,
                 on_progress: Callable[[int], object] = lambda _: None) -> None:
        self.encoder, self.storage, self.settings, self.workers = encoder, storage, settings, workers
        self.on_progress = on_progress

    def probe(self, refs: Sequence[MediaRef]) -> Iterator[MediaInfo | VideoError]:
        return probe_each(self.workers, self.settings, refs)

    def encode(self, units: Iterable[EncodeUnit]) -> Iterator[tuple[EncodeUnit, CommittedShard]]:
        yield from ShardEncoder(self.encoder, self.storage, self.settings, self.workers,
                                self.on_progress).encode(units)

    def cancel(self) -> None:
        self.workers.cancel()


def probe_each(workers: DecodePool, settings: BuildSettings,
               refs: Sequence[MediaRef]) -> Iterator[MediaInfo | VideoError]:
    """Probe files in worker processes, and yield what is known of each, in order."""
    def probe(ref: MediaRef) -> MediaInfo | VideoError:
        try:
            return workers.probe(ref, keep_truncated=settings.keep_truncated, scenes=settings.clips == "scenes")
        except VideoError as error:
            return error

    if not refs:
        return
    with ThreadPoolExecutor(workers.count) as pool:
        try:
            yield from pool.map(probe, refs)
        except BaseException:
            workers.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
