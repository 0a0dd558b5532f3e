"""Decode, encode and write shards at the same time: worker processes decode ahead, a thread writes behind."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor

from ...data.transforms import to_tensor
from ...data.video.reader import VideoError
from ...inference.fingerprint import DTYPES
from ...utils.storage import Storage
from .. import format as fmt
from ..encoder import LatentEncoder
from ..moments import Moments
from ..partition import CommittedShard, Failure, Shard, write_shard
from .decode_pool import DecodePool
from .plan import PlannedClip

if TYPE_CHECKING:
    from .settings import BuildSettings

LONG_BYTES = 2**28  # of a clip as float32, above which it is encoded in chunks
CHUNK_BYTES = 2**25  # of uint8 frames per request for a long clip
Decoded = tuple[dict[str, float], np.ndarray]  # pixel statistics, and frames uint8 (T, H, W, 3)
DecodeResult = Decoded | VideoError | Iterator[Decoded]  # an iterator for the chunks of a long clip


@dataclass(frozen=True)
class EncodeUnit:
    """A shard to encode: a pure function of its clips and the settings, whoever encodes it."""

    partition: int
    generation: int  # of the partition's index that will hold it
    name: str
    clips: tuple[PlannedClip, ...]
    psnr_clips: frozenset[str] = frozenset()  # IDs of the clips whose PSNR is measured


@dataclass
class _ShardContent:
    """A shard that is being filled."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    moments: list[Moments] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class ShardEncoder:
    """Encodes clips and commits their shards: worker processes decode ahead, a thread writes behind.

    Args:
        on_progress: called with the number of clips that are done.
    """

    def __init__(self, encoder: LatentEncoder, storage: Storage, settings: BuildSettings, workers: DecodePool,
                 on_progress: Callable[[int], object]) -> None:
        self.encoder, self.storage, self.settings = encoder, storage, settings
        self.workers, self.on_progress = workers, on_progress
        self.dtype = DTYPES[settings.dtype]
        # One thread a stage, so that shards pass them in order.
        self._feeder, self._encoder, self._writer = (ThreadPoolExecutor(1) for _ in range(3))
        self._pool = ThreadPoolExecutor(2 * workers.count)
        self._decode_ahead = _DecodeAhead(workers, settings, self._pool)

    def submit(self, unit: EncodeUnit) -> Future[CommittedShard]:
        """Encode a shard and commit it, after those submitted before. The future fails with an OSError if the shard
        cannot be written; the shards committed before stay."""
        clips: queue.SimpleQueue[_Ahead | None] = queue.SimpleQueue()
        try:
            self._feeder.submit(self._decode_ahead.feed, unit, clips)
            content = self._encoder.submit(self._encode_shard, unit, iter(clips.get, None))
            return self._writer.submit(lambda: self._commit(unit, content.result()))
        except RuntimeError:  # closed
            cancelled: Future[CommittedShard] = Future()
            cancelled.cancel()
            return cancelled

    def close(self) -> None:
        """End all work; waits for the batch that is being encoded."""
        self._decode_ahead.cancel()
        self._feeder.shutdown()  # all feeds end at once, each with the None that the encoder may wait for
        for stage in (self._encoder, self._writer):
            stage.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def _encode_shard(self, unit: EncodeUnit, clips: Iterable[_Ahead]) -> _ShardContent:
        try:
            return self._encode_clips(unit, self._decode_ahead.results(clips))
        except BaseException:  # nobody takes the clips that were decoded ahead
            self._decode_ahead.cancel()
            raise

    def _encode_clips(self, unit: EncodeUnit, clips: Iterable[tuple[PlannedClip, DecodeResult]]) -> _ShardContent:
        shard = _ShardContent()
        batch: list[tuple[PlannedClip, Decoded]] = []  # of one bucket
        for clip, result in clips:
            if isinstance(result, VideoError):
                self._reject(shard, clip, result)
                continue
            if batch and (not isinstance(result, tuple) or batch[0][0].bucket != clip.bucket):
                self._encode_batch(unit, shard, batch)
                batch = []
            if not isinstance(result, tuple):
                self._encode_long(shard, clip, result)
                continue
            batch.append((clip, result))
            if len(batch) == self.settings.batch:
                self._encode_batch(unit, shard, batch)
                batch = []
        if batch:
            self._encode_batch(unit, shard, batch)
        return shard

    def _encode_batch(self, unit: EncodeUnit, shard: _ShardContent,
                      batch: Sequence[tuple[PlannedClip, Decoded]]) -> None:
        videos = to_tensor(np.stack([video for _, (_, video) in batch]), self.encoder.model.device)
        try:
            with self.workers.usage.timed("encode_seconds"):
                latents = self.encoder.encode(videos).to(self.dtype).cpu()
        except VideoError as error:
            for clip, _ in batch:
                self._reject(shard, clip, VideoError(f"{clip.ref}: {error.reason}", error.advice, error.kind))
            return
        for i, (clip, (statistics, _)) in enumerate(batch):
            latent = latents[i].clone(memory_format=torch.contiguous_format)
            psnr = _psnr(self.encoder, latent, videos[i : i + 1].cpu()) if clip.id in unit.psnr_clips else None
            self._store(shard, clip, latent, statistics, psnr)

    def _encode_long(self, shard: _ShardContent, clip: PlannedClip, chunks: Iterator[Decoded]) -> None:
        seen: list[tuple[int, dict[str, float]]] = []  # frames and statistics of each chunk
        usage = self.workers.usage

        def tensors() -> Iterator[Tensor]:
            waiting = time.monotonic()  # for a decoder, which is not encoding
            for statistics, video in chunks:
                usage.add({"encode_seconds": waiting - time.monotonic()})
                seen.append((len(video), statistics))
                yield to_tensor(video, self.encoder.model.device)[None]
                waiting = time.monotonic()

        try:
            with usage.timed("encode_seconds"):
                latent = self.encoder.encode_chunks(tensors())[0].to(self.dtype).contiguous()
        except VideoError as error:
            self._reject(shard, clip, error)
            return
        weight = sum(n for n, _ in seen)
        statistics = {name: sum(n * chunk[name] for n, chunk in seen) / weight for name in seen[0][1]}
        self._store(shard, clip, latent, statistics, None)

    def _store(self, shard: _ShardContent, clip: PlannedClip, latent: Tensor, statistics: dict[str, float],
               psnr: float | None) -> None:
        dtype, rate = self.settings.dtype, self.settings.frame_rate
        if not torch.isfinite(latent).all():
            self._reject(shard, clip, VideoError(
                f"{clip.ref}: the latent of the clip at {clip.start:g} s is not finite in {dtype}",
                "check the VAE, or store float32", "not finite"))
            return
        data = latent.view(torch.uint8).numpy().tobytes()
        shard.tensors[clip.id] = latent
        shard.moments.append(Moments.of(self.encoder.mean(latent).float().numpy()))
        shard.rows.append({
            "id": clip.id, "path": clip.ref.name, "content": clip.content, "start": clip.start,
            "seconds": clip.frames / rate if clip.frames > 1 else 0.0, "frames": clip.frames, "frame_rate": rate,
            "height": clip.height, "width": clip.width, "bucket": clip.bucket,
            "captions": list(clip.captions), "caption_hashes": list(map(fmt.caption_hash, clip.captions)),
            "caption_from_name": clip.caption_from_name,
            "dtype": dtype, "shape": list(latent.shape), "checksum": hashlib.sha256(data).hexdigest(),
            "psnr": psnr, **statistics})
        self.on_progress(1)

    def _reject(self, shard: _ShardContent, clip: PlannedClip, error: VideoError) -> None:
        shard.failures.append({"id": clip.id, "path": clip.ref.name, "start": clip.start, "kind": error.kind,
                               "reason": error.reason, "advice": error.advice, "limit": self.settings.file_seconds})
        self.on_progress(1)

    def _commit(self, unit: EncodeUnit, content: _ShardContent) -> CommittedShard:
        data = save(content.tensors) if content.tensors else b""  # not save_file: a full disk must raise OSError here
        moments = Moments.merged(content.moments) if content.moments else None
        added = CommittedShard(Shard(unit.name, len(content.rows), len(data), moments),
                               pa.Table.from_pylist(content.rows, schema=fmt.SCHEMA), tuple(content.failures))
        write_shard(self.storage, unit.partition, unit.generation, added, data)
        return added


def _psnr(encoder: LatentEncoder, latent: Tensor, video: Tensor) -> float:
    decoded = encoder.decode(encoder.mean(latent).float(), *video.shape[2:]).clamp(-1, 1)
    error = (decoded - video).square().mean(dim=(0, 1, 3, 4)).clamp(min=1e-10)
    return float((10 * torch.log10(4 / error)).mean())


_Ahead = tuple[PlannedClip, "Future[Decoded | VideoError] | None"]  # None: a long clip, decoded as it is encoded


class _DecodeAhead:
    """Decodes the clips of shards in order, about two batches ahead of their consumer."""

    def __init__(self, workers: DecodePool, settings: BuildSettings, pool: ThreadPoolExecutor) -> None:
        self.workers, self.settings, self.pool = workers, settings, pool
        self._free = threading.Semaphore(1 + max(2 * settings.batch, workers.count))  # clips
        self._cancelled = False

    def cancel(self) -> None:
        """End all work as soon as possible: by CancelledError."""
        self._cancelled = True
        self.workers.cancel()
        self._free.release()  # for `feed`, which waits for one

    def feed(self, unit: EncodeUnit, clips: queue.SimpleQueue[_Ahead | None]) -> None:
        """Begin to decode the clips of a shard as there is room for them; at its end comes None."""
        for clip in unit.clips:
            if self._cancelled or (self._free.acquire() and self._cancelled):
                break
            is_long = 12 * clip.frames * clip.height * clip.width > LONG_BYTES
            clips.put((clip, None if is_long else self.pool.submit(self._whole, clip)))
        clips.put(None)

    def results(self, clips: Iterable[_Ahead]) -> Iterator[tuple[PlannedClip, DecodeResult]]:
        """Yield frames; for a long clip an iterator of chunks, which are decoded as they are read."""
        for clip, future in clips:
            self._free.release()
            yield clip, self._chunks(clip) if future is None else future.result()
        if self._cancelled:
            raise CancelledError

    def _whole(self, clip: PlannedClip) -> Decoded | VideoError:
        try:
            return self._frames(clip, 0, clip.frames)
        except VideoError as error:
            return error

    def _chunks(self, clip: PlannedClip) -> Iterator[Decoded]:
        """Decode one chunk while the previous one is encoded."""
        step = max(1, CHUNK_BYTES // (clip.height * clip.width * 3))
        ahead: deque[Future[Decoded]] = deque()
        for first in range(0, clip.frames, step):
            ahead.append(self.pool.submit(self._frames, clip, first, min(step, clip.frames - first)))
            if len(ahead) == 2:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _frames(self, clip: PlannedClip, first: int, count: int) -> Decoded:
        rate = self.settings.frame_rate
        return self.workers.decode_frames(clip.ref, content=clip.content, readable=clip.readable,
                                          start=clip.start + first / rate, count=count, frame_rate=rate,
                                          height=clip.height, width=clip.width)
