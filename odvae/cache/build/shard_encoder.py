"""Decoding, encoding and writing at the same time: worker processes decode ahead, a thread writes behind."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from .. import format as fmt
from ..encoder import LatentEncoder
from ..lease import BuildLease
from .decode_pool import Workers
from .plan import PlannedClip
from .shard_index import ShardIndex

if TYPE_CHECKING:
    from .settings import BuildSettings

LONG = 2**28  # bytes of a clip as float32, above which it is encoded in pieces
PIECE = 2**25  # bytes of uint8 that one request of a long clip brings
Decoded = tuple[dict[str, float], np.ndarray]


@dataclass
class Encoded:
    """What this process has done."""

    clips: int = 0
    frames: int = 0


@dataclass
class _Shard:
    """One that is being made."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    moments: list[fmt.Moments] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


def encode_shards(shards: Iterable[tuple[str, list[PlannedClip]]], encoder: LatentEncoder, contents: ShardIndex,
                  settings: BuildSettings, here: BuildLease, workers: Workers, probes: set[str], done: Encoded,
                  tell: Callable[[int], object]) -> None:
    """Encode and commit shards as they are claimed; each is released when it is committed.

    Args:
        shards: (name, clips); the next one is asked for while the last batches of the one before are decoded.
        probes: ids of the clips whose PSNR is measured.
        done: counts.
        tell: is called with the number of clips that were just done.
    """
    dtype = DTYPES[settings.dtype]

    def store(shard: _Shard, item: PlannedClip, latent: Tensor, figures: dict[str, float], psnr: float | None) -> None:
        if not torch.isfinite(latent).all():
            fail(shard, item, VideoError(f"{item.place}: the latent of the clip at {item.start:g} s is not finite in "
                                         f"{settings.dtype}", "check the VAE, or store float32", "not finite"))
            return
        data = latent.view(torch.uint8).numpy().tobytes()
        rate = settings.frame_rate
        shard.tensors[item.id] = latent
        shard.moments.append(fmt.Moments.of(encoder.mean(latent).float().numpy()))
        shard.rows.append({
            "id": item.id, "path": item.place.name, "content": item.content, "start": item.start,
            "seconds": item.frames / rate if item.frames > 1 else 0.0, "frames": item.frames, "frame_rate": rate,
            "height": item.height, "width": item.width, "bucket": item.bucket,
            "captions": list(item.captions), "caption_hashes": list(map(fmt.caption_hash, item.captions)),
            "caption_from_name": item.caption_from_name,
            "dtype": settings.dtype, "shape": list(latent.shape), "checksum": hashlib.sha256(data).hexdigest(),
            "psnr": psnr, **figures})
        done.clips += 1
        done.frames += item.frames

    def fail(shard: _Shard, item: PlannedClip, error: VideoError) -> None:
        shard.failed.append({"id": item.id, "path": item.place.name, "start": item.start, "kind": error.kind,
                             "reason": error.reason, "advice": error.advice, "limit": settings.file_seconds})

    def encode(shard: _Shard, batch: Sequence[tuple[PlannedClip, Decoded]]) -> None:
        videos = torch.stack([to_tensor(video) for _, (_, video) in batch])
        try:
            latents = encoder.encode(videos).to(dtype).cpu()
        except VideoError as error:
            for item, _ in batch:
                fail(shard, item, VideoError(f"{item.place}: {error.reason}", error.advice, error.kind))
        else:
            for i, (item, (figures, _)) in enumerate(batch):
                latent = latents[i].clone(memory_format=torch.contiguous_format)
                psnr = _psnr(encoder, latent, videos[i : i + 1]) if item.id in probes else None
                store(shard, item, latent, figures, psnr)
        tell(len(batch))

    def encode_long(shard: _Shard, item: PlannedClip, pieces: Iterator[Decoded]) -> None:
        seen: list[tuple[int, dict[str, float]]] = []

        def tensors() -> Iterator[Tensor]:
            for figures, video in pieces:
                seen.append((len(video), figures))
                yield to_tensor(video)[None]

        try:
            latent = encoder.encode_pieces(tensors())[0].to(dtype).contiguous()
        except VideoError as error:
            fail(shard, item, error)
        else:
            weight = sum(n for n, _ in seen)
            figures = {name: sum(n * some[name] for n, some in seen) / weight for name in seen[0][1]}
            store(shard, item, latent, figures, None)
        tell(1)

    def commit(shard: _Shard) -> None:
        tensors, index = fmt.shard_paths(contents.cache, shard.name)
        data = b""
        if shard.tensors:
            # not safetensors' own save_file: a full disk is to be an OSError here
            data = save(shard.tensors)
            here.write(tensors, data)
        notes = fmt.ShardNotes(fmt.Moments.merged(shard.moments) if shard.moments else None, len(data), shard.failed)
        here.write(index, fmt.index_bytes(pa.Table.from_pylist(shard.rows, schema=fmt.SCHEMA), notes))
        here.release(shard.name)

    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(2 * workers.count) as pool:
        writing: Future[None] | None = None
        shard: _Shard | None = None
        waiting: list[tuple[PlannedClip, Decoded]] = []  # of one bucket

        def flush() -> None:
            if waiting and shard is not None:
                encode(shard, waiting)
                waiting.clear()

        def end() -> None:
            """Hand the shard to the writer, once it is done with the one before."""
            nonlocal writing
            flush()
            if writing is not None:
                writing.result()
            if shard is not None:
                writing = writer.submit(commit, shard)

        try:
            for name, item, found in _decoded(shards, settings, workers, pool):
                if shard is None or shard.name != name:
                    end()
                    shard = _Shard(name)
                if isinstance(found, VideoError):
                    fail(shard, item, found)
                    tell(1)
                elif isinstance(found, tuple):
                    if waiting and waiting[0][0].bucket != item.bucket:
                        flush()
                    waiting.append((item, found))
                    if len(waiting) == settings.batch:
                        flush()
                else:
                    flush()
                    encode_long(shard, item, found)
            end()
            if writing is not None:
                writing.result()
        except BaseException:
            workers.cancel_retries()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _psnr(encoder: LatentEncoder, latent: Tensor, video: Tensor) -> float:
    decoded = encoder.decode(encoder.mean(latent).float(), *video.shape[2:]).clamp(-1, 1)
    error = (decoded - video).square().mean(dim=(0, 1, 3, 4)).clamp(min=1e-10)
    return float((10 * torch.log10(4 / error)).mean())


def _decoded(shards: Iterable[tuple[str, list[PlannedClip]]], settings: BuildSettings, workers: Workers,
             pool: ThreadPoolExecutor) -> Iterator[tuple[str, PlannedClip, Decoded | VideoError | Iterator[Decoded]]]:
    """All clips in order, decoded about two batches ahead; of a long one, its pieces as they are asked for."""

    def load(item: PlannedClip) -> Decoded | VideoError:
        try:
            return _frames(item, 0, item.frames, settings, workers)
        except VideoError as error:
            return error

    def pieces(item: PlannedClip) -> Iterator[Decoded]:
        """One piece is decoded while the one before is encoded."""
        step = max(1, PIECE // (item.height * item.width * 3))
        ahead: deque[Future[Decoded]] = deque()
        for first in range(0, item.frames, step):
            ahead.append(pool.submit(_frames, item, first, min(step, item.frames - first), settings, workers))
            if len(ahead) == 2:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    ahead: deque[tuple[str, PlannedClip, Future[Decoded | VideoError] | None]] = deque()
    depth = max(2 * settings.batch, workers.count)

    def next_out() -> tuple[str, PlannedClip, Decoded | VideoError | Iterator[Decoded]]:
        name, item, future = ahead.popleft()
        return name, item, pieces(item) if future is None else future.result()

    for name, items in shards:
        for item in items:
            long = 12 * item.frames * item.height * item.width > LONG
            ahead.append((name, item, None if long else pool.submit(load, item)))
            while len(ahead) > depth:
                yield next_out()
    while ahead:
        yield next_out()


def _frames(item: PlannedClip, first: int, count: int, settings: BuildSettings, workers: Workers) -> Decoded:
    return workers.frames(item.place, content=item.content, readable=item.readable,
                          start=item.start + first / settings.frame_rate, count=count,
                          frame_rate=settings.frame_rate, height=item.height, width=item.width)
