"""Build a latent cache, or go on with one: list, hash, plan, decode, encode, commit shard after shard.

Work is cut into shards in the order of what has not been tried yet, and batches do not cross a shard's end. So a build
that was interrupted, between shards or inside one, ends with the same files as one that was not.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor

from ..data.clips import SetAside
from ..data.lists import list_clips
from ..runtime.errors import UserError
from ..runtime.files import atomic_path, write_json
from ..runtime.progress import bar
from . import format as fmt
from .source import Item, decoded, plan

logger = logging.getLogger("odvae")


@dataclass(frozen=True)
class BuildSummary:
    """What one build did, and what the cache holds after it."""

    done: int  # clips encoded by this build
    reused: int  # clips of the source that were in the cache already, or that an equal file before them gives as well
    set_aside: list[SetAside]  # files and clips that could not be used, with the reason
    bytes: int  # of the whole cache on disk
    raw_bytes: int  # of all its clips as uint8 RGB, at the size at which they were encoded
    frames: int  # of video, in the whole cache
    seconds: float  # that this build took
    captions_from_names: int  # files of the source that had no other caption


def build_cache(source: Path | str, cache: Path | str, vae: Any, *, frames: int = 33, frame_rate: float = 8.0,
                height: int = 64, width: int = 64, batch: int = 8, shard_mb: float = 256, dtype: fmt.Dtype = "float16",
                shard_clips: int = 64, workers: int | None = None) -> BuildSummary:
    """Encode every clip of the videos and photos of `source` that `cache` does not hold yet.

    Clips are cut back to back; what is stored is the posterior's mean, raw. A file that was renamed, or whose caption
    changed, is not encoded again: its rows are brought up to date. Clips whose file is gone stay.

    Args:
        source: folder of videos and photos, searched with the folders below it; or a list of them (.jsonl, .csv,
            .parquet: `odvae.data.lists`), whose spans are cut and whose captions count. Elsewhere a caption is the .txt
            beside a file, else the class in a folder of class folders, else the file's name.
        cache: the cache folder; made where it is missing.
        vae: `AutoencoderKLODVAE`, or a model with the same interface; runs where it is and in its dtype.
        frames, frame_rate, height, width: of each clip; frames is 1 + 4k, the sides are multiples of 8. A photo gives
            one frame.
        batch: clips that are encoded at once.
        shard_mb, shard_clips: a shard ends at whichever comes first; an interruption costs at most one shard's work.
        dtype: of the stored latents.
        workers: threads that decode while the VAE encodes (None: one a core, at most 8).

    Raises:
        UserError: an empty folder or a list that cannot be read, sizes that do not fit the VAE, a cache of another VAE
            or transform (naming the field), a folder that is something else, another build at work in it.
        OSError: the disk is full or fails; the shards before stay, and the next build goes on after them.
    """
    began = time.monotonic()
    source, cache = Path(source), Path(cache)
    if min(batch, shard_clips, shard_mb, 1 if workers is None else workers) < 1:
        raise UserError(f"batch={batch}, shard_clips={shard_clips}, shard_mb={shard_mb}, workers={workers}: "
                        "all must be at least 1")
    workers = workers or min(8, os.cpu_count() or 1)
    header = _header(vae, frames, frame_rate, height, width, dtype)
    listed = list_clips(source, images=True)
    _prepare(cache, header)
    with _locked(cache):
        state = _committed(cache)
        items, aside = plan(source if source.is_dir() else source.parent, listed, header, workers)
        unique = {item.id: item for item in reversed(items)}  # of equal files the first one counts
        unique = dict(reversed(unique.items()))
        _refresh(cache, state, unique)
        missing = sorted((item for item in unique.values() if item.id not in state.ids),
                         key=lambda item: item.clip.frames)  # equal shapes together
        clip_bytes = fmt.DTYPES[dtype].itemsize * header.vae.latent_channels * vae.latent_frames(frames) * (
            height * width // header.vae.spatial_compression_ratio**2)
        size = max(1, min(shard_clips, int(shard_mb * 1e6 / clip_bytes)))
        # What failed before is tried again, but last, so that it does not shift the shards of the others.
        chunks = [part[cut:cut + size]
                  for part in ([item for item in missing if item.id not in state.failed],
                               [item for item in missing if item.id in state.failed])
                  for cut in range(0, len(part), size)]
        done, failed = _encode_chunks(cache, state, chunks, vae, header, batch, workers) if chunks else (0, [])
        aside += failed
        stored = _totals(cache, header)
    for entry in aside[:20]:
        logger.warning("set aside: %s", entry.reason)
    if len(aside) > 20:
        logger.warning("set aside: %d more", len(aside) - 20)
    return BuildSummary(done=done, reused=len(items) - len(missing), set_aside=aside,
                        seconds=time.monotonic() - began, **stored,
                        captions_from_names=len({item.name for item in items if item.clip.caption_from_name}))


def _header(vae: Any, frames: int, frame_rate: float, height: int, width: int, dtype: fmt.Dtype) -> fmt.Header:
    if dtype not in fmt.DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; choose one of {', '.join(fmt.DTYPES)}")
    if not frame_rate > 0:
        raise UserError(f"frame_rate={frame_rate} must be above 0")
    vae.latent_frames(frames)  # the VAE knows what fits it, and says so
    vae.check_size(height, width)
    return fmt.Header(
        vae=fmt.VaeHeader(fingerprint=fmt.vae_fingerprint(vae), kind=type(vae).__name__,
                          latent_channels=vae.latent_channels,
                          temporal_compression_ratio=vae.temporal_compression_ratio,
                          spatial_compression_ratio=vae.spatial_compression_ratio),
        clip=fmt.ClipHeader(frames=frames, frame_rate=frame_rate, height=height, width=width),
        dtype=dtype,
        made_with={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "decord2", "av")},
    )


def _prepare(cache: Path, header: fmt.Header) -> None:
    """Make the folder, or see that the one there was made in the same way."""
    if fmt.header_path(cache).exists():
        different = fmt.differences(fmt.read_header(cache), header)
        if different:
            raise UserError(f"{cache} was made with another VAE or transform ({'; '.join(different)}); build into "
                            "another folder, or give what it was made with")
        return
    if cache.exists() and (not cache.is_dir() or any(p.name != "shards" and not p.name.startswith(".")
                                                     for p in cache.iterdir()) or fmt.committed_shards(cache)):
        raise UserError(f"{cache} is there already and is not a latent cache; give an empty or a new folder")
    (cache / "shards").mkdir(parents=True, exist_ok=True)
    write_json(fmt.header_path(cache), header.model_dump())


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One build at a time; the lock goes with the process, however that ends. (Windows has no such lock.)"""
    if os.name != "posix":
        yield
        return
    import fcntl

    folder = os.open(cache, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another build is at work in {cache}; wait for it, or stop it") from error
        yield
    finally:
        os.close(folder)


@dataclass
class _State:
    """What the finished shards hold."""

    tables: dict[str, pa.Table] = field(default_factory=dict)  # by shard
    aside: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # by shard
    ids: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)  # ids of clips that were tried in vain


def _committed(cache: Path) -> _State:
    """Read the finished shards, and remove what an interrupted build left of an unfinished one."""
    state = _State()
    (cache / "shards").mkdir(exist_ok=True)
    for name in fmt.committed_shards(cache):
        table, aside = fmt.read_index(fmt.shard_paths(cache, name)[1])
        state.tables[name], state.aside[name] = table, aside
        state.ids.update(table["id"].to_pylist())
        state.failed.update(entry["id"] for entry in aside)
    for path in [*cache.glob(".*.tmp-*"), *(cache / "shards").iterdir()]:
        if path.name.startswith(".") or path.stem not in state.tables:
            path.unlink()
    return state


def _refresh(cache: Path, state: _State, items: dict[str, Item]) -> None:
    """Bring names and captions of clips that are in the cache up to date."""
    columns = ("path", "caption", "caption_from_name")
    for name, table in state.tables.items():
        rows = table.to_pylist()
        for row in rows:
            if row["id"] in items:
                item = items[row["id"]]
                row.update(zip(columns, (item.name, item.clip.caption, item.clip.caption_from_name), strict=True))
        fresh = pa.Table.from_pylist(rows, schema=fmt.SCHEMA)
        if not fresh.equals(table):
            fmt.write_index(fmt.shard_paths(cache, name)[1], fresh, state.aside[name])


def _encode_chunks(cache: Path, state: _State, chunks: Sequence[Sequence[Item]], vae: Any, header: fmt.Header,
                   batch: int, workers: int) -> tuple[int, list[SetAside]]:
    """Encode and commit one shard a chunk. How many clips were encoded, and which could not be."""
    done, aside = 0, []
    number = 1 + max((int(name.split("-")[0]) for name in state.tables), default=-1)
    everything = [item for chunk in chunks for item in chunk]
    with (bar(len(everything), "encode", "clip") as progress,
          decoded(everything, header.clip, vae.dtype, batch=batch, workers=workers) as videos):
        for chunk in chunks:
            latents: list[tuple[Item, Tensor]] = []
            failed: list[tuple[Item, str]] = []
            waiting: list[tuple[Item, Tensor]] = []  # of one shape
            for item in chunk:
                video = next(videos)
                if not isinstance(video, Tensor):
                    failed.append((item, str(video)))
                    progress.update(1)
                    continue
                if waiting and (len(waiting) == batch or waiting[0][1].shape != video.shape):
                    latents += _encode(vae, waiting, fmt.DTYPES[header.dtype])
                    progress.update(len(waiting))
                    waiting = []
                waiting.append((item, video))
            if waiting:
                latents += _encode(vae, waiting, fmt.DTYPES[header.dtype])
                progress.update(len(waiting))
            failed += [(item, f"{item.clip.path}: the VAE's latent of the clip at {item.clip.start:g} s is not finite "
                              f"in {header.dtype}; check the VAE, or store float32")
                       for item, latent in latents if not torch.isfinite(latent).all()]
            latents = [(item, latent) for item, latent in latents if torch.isfinite(latent).all()]
            if latents or any(item.id not in state.failed for item, _ in failed):
                _commit(cache, fmt.shard_name(number, [item.id for item in chunk]), latents, failed)
                number += 1
            done += len(latents)
            aside += [SetAside(item.clip.path, reason) for item, reason in failed]
    return done, aside


@torch.inference_mode()
def _encode(vae: Any, videos: Sequence[tuple[Item, Tensor]], dtype: torch.dtype) -> list[tuple[Item, Tensor]]:
    """Videos (C, T, H, W) of one shape -> latents (c, t, h, w) in the stored dtype."""
    x = torch.stack([video for _, video in videos]).to(vae.device)
    z = vae.encode(x).latent_dist.mean.to(dtype).cpu()
    return [(item, latent.contiguous()) for (item, _), latent in zip(videos, z.unbind(), strict=True)]


def _commit(cache: Path, name: str, latents: Sequence[tuple[Item, Tensor]], failed: Sequence[tuple[Item, str]]) -> None:
    """Write one shard: the tensors, then the index, whose rename makes it count."""
    rows = []
    for item, latent in latents:
        mean, squares = fmt.channel_moments(latent.float().numpy())
        rows.append({"id": item.id, "path": item.name, "content": item.content, "start": item.clip.start,
                     "frames": item.clip.frames, "caption": item.clip.caption,
                     "caption_from_name": item.clip.caption_from_name, "shape": list(latent.shape),
                     "mean": mean, "squares": squares})
    tensors, index = fmt.shard_paths(cache, name)
    if latents:
        with atomic_path(tensors) as temporary:
            # not safetensors' own save_file: a full disk is to be an OSError here
            temporary.write_bytes(save({item.id: latent for item, latent in latents}))
    fmt.write_index(index, pa.Table.from_pylist(rows, schema=fmt.SCHEMA),
                    [{"id": item.id, "path": item.name, "reason": reason} for item, reason in failed])


def _totals(cache: Path, header: fmt.Header) -> dict[str, int]:
    indexes = [fmt.read_index(fmt.shard_paths(cache, name)[1])[0] for name in fmt.committed_shards(cache)]
    frames = sum(sum(table["frames"].to_pylist()) for table in indexes)
    return {"bytes": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
            "raw_bytes": frames * header.clip.height * header.clip.width * 3, "frames": frames}
