"""The format of a latent cache, version 3; docs/cache-format.md tells it in words.

    header.json                       which VAE and which transform made it, and what was measured on it
    shards/NAME.safetensors           one tensor a clip, named by the clip's id
    shards/NAME.parquet               one row a clip; the shard's moments, and the clips that were set aside
    text/ENCODER/                     captions' embeddings, in shards of the same kind (`cache.text`)
    files/NAME.parquet                what is known of source files, so that they are not read again (`build.probe`)
    rejects.parquet                   what was set aside, why, and what can be done
    work/                             of builds that are at work (`cache.lease`)

A shard counts from the moment its .parquet has its name: it is written last, and both are renamed into place when
whole. A .safetensors without it is the rest of an interrupted build. No other file has to agree with it: the others can
be made again from the shards and the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from ..data.failures import as_damage
from ..data.transforms import RESIZE
from ..inference.fingerprint import Dtype, vae_config, vae_fingerprint
from ..utils.errors import UserError
from ..utils.files import fingerprint, read_json
from ..utils.format import format_problem
from .moments import Moments

FORMAT, VERSION = "odvae-latent-cache", 3
Stored = Literal["mean", "moments"]  # the posterior's mean (c, ...), or its mean and log-variance (2c, ...)

SCHEMA = pa.schema([
    ("id", pa.string()),  # see `clip_id`; also the tensor's key in the shard
    ("path", pa.string()),  # relative to the source of the last build that saw the file
    ("content", pa.string()),  # SHA-256 of the file
    ("start", pa.float64()),  # s
    ("seconds", pa.float64()),  # frames / frame_rate; 0 for a photo
    ("frames", pa.int32()),  # of the video, 1 for a photo
    ("frame_rate", pa.float64()),  # frames a second
    ("height", pa.int32()),  # pixels, after the transform
    ("width", pa.int32()),
    ("bucket", pa.string()),  # frames x height x width: latents of one bucket have one shape
    ("captions", pa.list_(pa.string())),  # one at least; a training draws one for each sample
    ("caption_hashes", pa.list_(pa.string())),  # of each, see `caption_hash`
    ("caption_from_name", pa.bool_()),  # there was no other
    ("dtype", pa.string()),
    ("shape", pa.list_(pa.int32(), 4)),  # of the tensor as stored: (c, t, h, w), or (2c, t, h, w)
    ("checksum", pa.string()),  # SHA-256 of the tensor's bytes
    ("brightness", pa.float32()),  # of the pixels that were encoded, see `cache.build.decode_worker.figures`
    ("contrast", pa.float32()),
    ("sharpness", pa.float32()),
    ("motion", pa.float32()),
    ("psnr", pa.float32()),  # dB, encoded and decoded again; null where this was not measured
])
MERGING = Path("work", "merge.json")  # in the folder of a merge that is not whole yet, see `cache.maintain`
REJECTS = pa.schema([("path", pa.string()), ("start", pa.float64()), ("kind", pa.string()), ("reason", pa.string()),
                     ("advice", pa.string())])


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VaeHeader(_Strict):
    fingerprint: str  # of weights and config, see `vae_fingerprint`
    weights: str  # of the weights alone
    kind: str  # class name
    config: dict[str, Any]  # what counts of it, see `vae_config`
    latent_channels: int
    temporal_compression_ratio: int
    spatial_compression_ratio: int


class TransformHeader(_Strict):
    """What is done to pixels. Which spans are cut is not a part of it: a cache may be grown by others."""

    frame_rate: float  # frames a second
    frames: list[int]  # lengths of clips; none: any
    sizes: list[tuple[int, int]]  # (height, width) of clips
    resize: str = RESIZE


class Measured(_Strict):
    """Of all clips, when the last build ended. The shards know better."""

    clips: int
    latents_mean: list[float]  # per channel, of the mean latent
    latents_std: list[float]
    psnr: float | None  # dB, mean over the clips that were decoded again
    psnr_clips: int


class Header(_Strict):
    format: Literal["odvae-latent-cache"] = "odvae-latent-cache"
    version: Literal[3] = 3
    vae: VaeHeader
    transform: TransformHeader
    stored: Stored
    dtype: Dtype
    made_with: dict[str, str]  # library versions; recorded, not compared
    measured: Measured | None = None

    def key(self) -> str:
        """All that a latent depends on beside its file, span and size, as canonical JSON."""
        return json.dumps([self.vae.fingerprint, self.transform.resize, self.stored, self.dtype])


@dataclass(frozen=True)
class ShardNotes:
    """What a shard's Parquet file says beside its rows."""

    moments: Moments | None  # None: no clips
    tensor_bytes: int  # of the .safetensors
    set_aside: list[dict[str, Any]]  # clips that could not be encoded: id, path, start, kind, reason, advice, limit
    replaces: list[str] = field(default_factory=list)  # shards that count no more since this one is there

    def encode(self) -> dict[bytes, bytes]:
        m = self.moments
        moments = None if m is None else {"count": m.count, "mean": m.mean.tolist(), "squares": m.squares.tolist()}
        return {b"odvae": json.dumps({"version": VERSION, "moments": moments, "bytes": self.tensor_bytes,
                                      "set_aside": self.set_aside, "replaces": self.replaces}).encode()}

    @classmethod
    def decode(cls, metadata: Mapping[bytes, bytes] | None) -> ShardNotes:
        """Raises ValueError, KeyError."""
        raw = json.loads((metadata or {})[b"odvae"])
        m = raw["moments"]
        moments = None if m is None else Moments(m["count"], np.array(m["mean"]), np.array(m["squares"]))
        return cls(moments, raw["bytes"], raw["set_aside"], raw.get("replaces", []))


def header_path(cache: Path) -> Path:
    return cache / "header.json"


def shard_paths(cache: Path, name: str) -> tuple[Path, Path]:
    """Of the tensors and of the index."""
    return cache / "shards" / f"{name}.safetensors", cache / "shards" / f"{name}.parquet"


def committed_shards(cache: Path) -> list[str]:
    """The names of the finished shards, in order."""
    try:
        names = os.listdir(cache / "shards")  # not glob, to which a folder that cannot be read is an empty one
    except FileNotFoundError:
        return []
    return sorted(name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and name[0] != ".")


def bucket_name(frames: int, height: int, width: int) -> str:
    return f"{frames}x{height}x{width}"


def shard_name(bucket: str, ids: Sequence[str]) -> str:
    """The bucket of its first clip, and a digest of its clips: the same work has the same name everywhere."""
    return f"{bucket}-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:16]}"


def clip_id(content: str, start: float, frames: int, frame_rate: float, size: tuple[int, int], key: str) -> str:
    """Names a latent by all that it depends on: the file's content, the span, the size, the transform and the VAE."""
    span = json.dumps([content, start, frames, frame_rate, *size])
    return hashlib.sha256(f"{span}\n{key}".encode()).hexdigest()[:32]


def caption_hash(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def vae_header(vae: Any, *, latent_channels: int, temporal: int, spatial: int) -> VaeHeader:
    return VaeHeader(fingerprint=vae_fingerprint(vae), weights=fingerprint(vae.state_dict(), {}),
                     kind=type(vae).__name__, config=vae_config(vae), latent_channels=latent_channels,
                     temporal_compression_ratio=temporal, spatial_compression_ratio=spatial)


def _plain(value: Any) -> Any:
    """A tuple and a list are the same in a config."""
    return list(value) if isinstance(value, tuple) else value


def read_header(cache: Path) -> Header:
    """Raises UserError where the folder is no cache, or one of a version that is not known here."""
    path = header_path(cache)
    if not path.is_file():
        if (cache / MERGING).is_file():
            raise UserError(f"{cache} is a merge of caches that was stopped; call the same `odvae cache merge` again, "
                            "which completes it")
        raise UserError(f"{cache} is not a latent cache (it has no header.json); make one with `odvae cache build`")
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path} is not the header of a latent cache; give the folder that `odvae cache build` made")
    if raw.get("version") != VERSION:
        raise UserError(f"{cache} is a latent cache of version {raw.get('version')}, and this program reads version "
                        f"{VERSION}; build it again, or use the program that made it")
    try:
        return Header.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {format_problem(first)}; "
                        "restore it or build the cache again") from error


def differences(old: Header, new: Header) -> list[str]:
    """What of the VAE, the transform and the storage differs, as "transform.frame_rate: 8.0 in the cache, 4.0 now"."""
    found = [("stored", old.stored, new.stored), ("dtype", old.dtype, new.dtype)]
    before, now = old.transform.model_dump(), new.transform.model_dump()
    found += [(f"transform.{field}", before[field], now[field]) for field in now]
    return vae_differences(old.vae, new.vae) + _told(found)


def vae_differences(old: VaeHeader, new: VaeHeader) -> list[str]:
    """Of the VAE alone: the class, the weights, each key of the config."""
    found = [("vae.kind", old.kind, new.kind), ("vae.weights", old.weights, new.weights)]
    found += [(f"vae.config.{key}", old.config.get(key, "default"), new.config.get(key, "default"))
              for key in sorted(old.config.keys() | new.config.keys())]
    return _told(found)


def _told(found: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{field}: {before} in the cache, {now} now" for field, before, now in found if before != now]


def read_index(path: Path, columns: Sequence[str] | None = None) -> tuple[pa.Table, ShardNotes]:
    """The rows of one shard (or some columns of them), and what else it says. Raises UserError."""
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # not mapped: a disk that fails would end the process
            notes = ShardNotes.decode(file.schema_arrow.metadata)
            table = file.read(columns=None if columns is None else list(columns))
        names = SCHEMA.names if columns is None else columns
        return table.replace_schema_metadata(None).cast(pa.schema([SCHEMA.field(name) for name in names])), notes
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        raise as_damage(error, path, "delete it and build again: only its clips are encoded anew") from error


def check_tensors(cache: Path, name: str, notes: ShardNotes) -> None:
    """Raises UserError where a shard's tensors are missing or have another length than its index says."""
    path = shard_paths(cache, name)[0]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = -1
    if notes.tensor_bytes and size != notes.tensor_bytes:
        raise UserError(f"{path} is {'missing' if size < 0 else 'damaged: it was cut off or written to'}; restore it, "
                        "or delete the .parquet of the same name and build again: only its clips are encoded anew")


def index_bytes(table: pa.Table, notes: ShardNotes) -> pa.Buffer:
    """A shard's Parquet file. To rename it into place commits the shard."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(notes.encode()), sink, compression="zstd")
    return sink.getvalue()
