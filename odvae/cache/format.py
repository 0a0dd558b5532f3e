"""The format of a latent cache, version 5; docs/cache-format.md specifies it.

    header.json                            the VAE, the transform, the number of partitions, statistics of the latents
    partitions/NUMBER/index.parquet        one row per clip; the partition's shards and failed clips (`partition`)
    partitions/NUMBER/SHARD.safetensors    one tensor per clip, named by the clip's ID
    partitions/NUMBER/SHARD.parquet        the rows of a shard that the index does not hold yet
    partitions/NUMBER/files.parquet        probe results of source files, so that they are not read again
    partitions/NUMBER/rejects.parquet      rejected files and clips, with reason and advice
    text/ENCODER/                          caption embeddings, in shards (`cache.text`)
    work/                                  locks of running builds, and plans of running commands
    build-report.json                      what the last build did (`build.report`); of a part build-report-I-of-N.json

A shard is committed once its .parquet is written, after its .safetensors; a partition once its index is written, which
then holds the rows of all shards. A .safetensors that neither names is a leftover of an interrupted build.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from ..data.transforms import RESIZE
from ..inference.fingerprint import Dtype, vae_config, vae_fingerprint
from ..utils.errors import UserError
from ..utils.files import fingerprint
from ..utils.format import format_problem
from ..utils.precision_names import Computed
from ..utils.storage import Storage, open_storage

FORMAT, VERSION = "odvae-latent-cache", 5
Stored = Literal["mean", "moments"]  # the posterior's mean (c, ...), or its mean and log-variance (2c, ...)

SCHEMA = pa.schema([
    ("id", pa.string()),  # see `clip_id`; also the tensor's key in the shard
    ("path", pa.string()),  # relative to the source of the last build that saw the file
    ("content", pa.string()),  # SHA-256 of the file
    ("start", pa.float64()),  # s
    ("seconds", pa.float64()),  # frames / frame_rate; 0 for a photo
    ("frames", pa.int32()),  # of the video, 1 for a photo
    ("frame_rate", pa.float64()),  # frames per second
    ("height", pa.int32()),  # pixels, after the transform
    ("width", pa.int32()),
    ("bucket", pa.string()),  # frames x height x width: latents of one bucket have one shape
    ("captions", pa.list_(pa.string())),  # at least one; training draws one for each sample
    ("caption_hashes", pa.list_(pa.string())),  # of each caption, see `caption_hash`
    ("caption_from_name", pa.bool_()),  # the only caption is the file's name
    ("dtype", pa.string()),
    ("shape", pa.list_(pa.int32(), 4)),  # of the tensor as stored: (c, t, h, w), or (2c, t, h, w)
    ("checksum", pa.string()),  # SHA-256 of the tensor's bytes
    ("brightness", pa.float32()),  # of the encoded pixels, see `cache.build.decode_worker.pixel_statistics`
    ("contrast", pa.float32()),
    ("sharpness", pa.float32()),
    ("motion", pa.float32()),
    ("psnr", pa.float32()),  # dB, of the decoded latent; null if it was not measured
])
HEADER, WORK = "header.json", "work"
MERGE_PLAN = f"{WORK}/merge.json"  # in the folder of an unfinished merge, see `cache.maintain.merge`
REJECTS = pa.schema([("path", pa.string()), ("start", pa.float64()), ("kind", pa.string()), ("reason", pa.string()),
                     ("advice", pa.string())])


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VaeHeader(_StrictModel):
    fingerprint: str  # of weights and config, see `vae_fingerprint`
    weights: str  # of the weights alone
    kind: str  # class name
    config: dict[str, Any]  # see `vae_config`
    latent_channels: int
    temporal_compression_ratio: int
    spatial_compression_ratio: int
    precision: Computed  # that it encoded in


class TransformHeader(_StrictModel):
    """The preprocessing of pixels. Time spans are not part of it: a later build may add other spans."""

    frame_rate: float  # frames per second
    frames: list[int]  # lengths of clips; empty: any
    sizes: list[tuple[int, int]]  # (height, width) of clips
    resize: str = RESIZE


class Measured(_StrictModel):
    """Statistics of all clips at the end of the last build; those of the partitions are always up to date."""

    clips: int
    latents_mean: list[float]  # per channel, of the mean latent
    latents_std: list[float]
    psnr: float | None  # dB, mean over the clips on which it was measured
    psnr_clips: int


class Header(_StrictModel):
    format: Literal["odvae-latent-cache"] = "odvae-latent-cache"
    version: Literal[5] = 5
    vae: VaeHeader
    transform: TransformHeader
    stored: Stored
    dtype: Dtype
    made_with: dict[str, str]  # library versions; recorded, not compared
    partitions: int = 1  # a power of two; a source's file belongs to one by the hash of its path
    measured: Measured | None = None

    def key(self) -> str:
        """Return everything that a latent depends on except its file, span and size, as canonical JSON."""
        return json.dumps([self.vae.fingerprint, self.vae.precision, self.transform.resize, self.stored, self.dtype])


def bucket_name(frames: int, height: int, width: int) -> str:
    return f"{frames}x{height}x{width}"


def shard_name(bucket: str, ids: Sequence[str]) -> str:
    """Return the bucket of the first clip and a digest of the clip IDs: equal shards have equal names everywhere."""
    return f"{bucket}-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:16]}"


def clip_id(content: str, start: float, frames: int, frame_rate: float, size: tuple[int, int], key: str) -> str:
    """Hash all that a latent depends on: the file's content, the span, the size, the transform and the VAE."""
    span = json.dumps([content, start, frames, frame_rate, *size])
    return hashlib.sha256(f"{span}\n{key}".encode()).hexdigest()[:32]


def caption_hash(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def vae_header(vae: Any, *, latent_channels: int, temporal: int, spatial: int, precision: Computed) -> VaeHeader:
    return VaeHeader(fingerprint=vae_fingerprint(vae), weights=fingerprint(vae.state_dict(), {}),
                     kind=type(vae).__name__, config=vae_config(vae), latent_channels=latent_channels,
                     temporal_compression_ratio=temporal, spatial_compression_ratio=spatial, precision=precision)


def read_header(cache: Storage | Path | str) -> Header:
    """Read a cache's header. Raises UserError if the folder is no cache, or of another format version."""
    storage = open_storage(cache)
    path = storage.path(HEADER)
    try:
        raw = json.loads(storage.read(HEADER))
    except (FileNotFoundError, NotADirectoryError) as error:
        if storage.exists(MERGE_PLAN):
            raise UserError(f"{storage.root} is an unfinished merge of caches; run the same `odvae cache merge` again "
                            "to complete it") from error
        raise UserError(f"{storage.root} is not a latent cache (it has no header.json); build one with `odvae cache "
                        "build`") from error
    except ValueError as error:
        raise UserError(f"{path} is broken: it is not JSON ({error}); restore it, or build the cache again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path} is not the header of a latent cache; give a folder built by `odvae cache build`")
    if raw.get("version") != VERSION:
        raise UserError(f"{storage.root} is a latent cache of format version {raw.get('version')}, and this program "
                        f"reads version {VERSION}; build it again, or use the program that built it")
    try:
        return Header.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {format_problem(first)}; "
                        "restore it or build the cache again") from error


def check_header(header: Header, path: Path | str, vae: Any, transform: dict[str, Any]) -> None:
    """Raise UserError, naming each field that differs, if a cache is of another VAE (None: any) or transform."""
    own = header.vae
    if vae is not None and vae_fingerprint(vae) != own.fingerprint:
        other = vae_header(vae, latent_channels=own.latent_channels, temporal=own.temporal_compression_ratio,
                           spatial=own.spatial_compression_ratio, precision=own.precision)
        raise UserError(f"{path} was built with another VAE ({'; '.join(vae_differences(own, other))}); build a cache "
                        "with this VAE, or load the other one")
    stored = header.transform.model_dump()
    different = [f"transform.{key}: {stored.get(key)} in the cache, {value} now" for key, value in transform.items()
                 if stored.get(key) != value]
    if different:
        raise UserError(f"{path} was built with another transform ({'; '.join(different)}); build a cache with this "
                        "one")


def write_header(storage: Storage, header: Header) -> None:
    storage.write(HEADER, (header.model_dump_json(indent=2) + "\n").encode())


def differences(old: Header, new: Header) -> list[str]:
    """Compare VAE, transform and storage; returns lines like "transform.frame_rate: 8.0 in the cache, 4.0 now"."""
    fields = [("stored", old.stored, new.stored), ("dtype", old.dtype, new.dtype)]
    before, after = old.transform.model_dump(), new.transform.model_dump()
    fields += [(f"transform.{field}", before[field], after[field]) for field in after]
    return vae_differences(old.vae, new.vae) + _format_differences(fields)


def vae_differences(old: VaeHeader, new: VaeHeader) -> list[str]:
    """Compare the class, the weights, the precision of the computation and each key of the config of two VAEs."""
    fields = [("vae.kind", old.kind, new.kind), ("vae.weights", old.weights, new.weights),
              ("vae.precision", old.precision, new.precision)]
    fields += [(f"vae.config.{key}", old.config.get(key, "default"), new.config.get(key, "default"))
               for key in sorted(old.config.keys() | new.config.keys())]
    return _format_differences(fields)


def _format_differences(fields: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{field}: {before} in the cache, {after} now" for field, before, after in fields if before != after]
