"""The format of a latent cache, version 1.

    header.json                           which VAE and which transform made it; written first, never changed
    shards/00000-1a2b3c4d.safetensors     one tensor (c, t, h, w) a clip, named by the clip's id
    shards/00000-1a2b3c4d.parquet         one row a clip, and the clips that were set aside

A shard counts from the moment its .parquet has its name: it is written last, and both are renamed into place when
whole. A .safetensors without it is the rest of an interrupted build. Rows carry the mean and the squared deviations of
each channel, so that the statistics of any set of shards are exact without reading a tensor.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ..data.clips import ClipSpec
from ..data.transforms import RESIZE
from ..runtime.errors import UserError
from ..runtime.files import atomic_path, fingerprint, read_json

FORMAT, VERSION = "odvae-latent-cache", 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Dtype = Literal["float16", "bfloat16", "float32"]

SCHEMA = pa.schema([
    ("id", pa.string()),
    ("path", pa.string()),  # relative to the folder (or the list's) of the last build that saw the file
    ("content", pa.string()),  # SHA-256 of the file
    ("start", pa.float64()),  # s
    ("frames", pa.int32()),  # of the video, 1 for a photo
    ("caption", pa.string()),
    ("caption_from_name", pa.bool_()),  # there was no other
    ("shape", pa.list_(pa.int32(), 4)),  # of the latent (c, t, h, w)
    ("mean", pa.list_(pa.float64())),  # per channel, of the latent as stored
    ("squares", pa.list_(pa.float64())),  # per channel, sum of squared deviations from that mean
])


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VaeHeader(_Strict):
    fingerprint: str  # see `vae_fingerprint`
    kind: str  # class name
    latent_channels: int
    temporal_compression_ratio: int
    spatial_compression_ratio: int


class ClipHeader(_Strict):
    frames: int
    frame_rate: float
    height: int
    width: int
    resize: str = RESIZE


class Header(_Strict):
    format: Literal["odvae-latent-cache"] = "odvae-latent-cache"
    version: Literal[1] = 1
    vae: VaeHeader
    clip: ClipHeader
    dtype: Dtype
    made_with: dict[str, str]  # library versions; told, not compared

    def key(self) -> str:
        """All that a latent depends on beside its file and span, as canonical JSON."""
        return json.dumps(self.model_dump(include={"vae", "clip", "dtype"}), sort_keys=True)


def header_path(cache: Path) -> Path:
    return cache / "header.json"


def shard_paths(cache: Path, name: str) -> tuple[Path, Path]:
    """Of the tensors and of the index."""
    return cache / "shards" / f"{name}.safetensors", cache / "shards" / f"{name}.parquet"


def committed_shards(cache: Path) -> list[str]:
    """The names of the finished shards, in order."""
    return sorted(path.stem for path in (cache / "shards").glob("[!.]*.parquet"))


def shard_name(number: int, ids: Sequence[str]) -> str:
    """Its number, for the order, and a digest of its clips, so that no two different shards share a name."""
    return f"{number:05d}-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:8]}"


def clip_id(content: str, clip: ClipSpec, key: str) -> str:
    """Names a latent by all that it depends on: the file's content, the span, the transform and the VAE."""
    span = json.dumps([content, clip.start, clip.frames, clip.frame_rate])
    return hashlib.sha256(f"{span}\n{key}".encode()).hexdigest()[:32]


def vae_fingerprint(vae: Any) -> str:
    """SHA-256 of a VAE's stored tensors and its config.

    Private keys do not count, and latents_mean and latents_std do not: what the encoder says does not depend on them,
    and they are measured on a cache. Nor do values that are the class's defaults, so that an option that a later
    version adds does not make every cache another VAE's.
    """
    defaults = {name: field.default for name, field in inspect.signature(type(vae).__init__).parameters.items()}
    config = {key: value for key, value in dict(vae.config).items()
              if not key.startswith("_") and key not in ("latents_mean", "latents_std")
              and _plain(value) != _plain(defaults.get(key, inspect.Parameter.empty))}
    return fingerprint(vae.state_dict(), config)


def _plain(value: Any) -> Any:
    """A tuple and a list are the same in a config."""
    return list(value) if isinstance(value, tuple) else value


def read_header(cache: Path) -> Header:
    """Raises UserError where the folder is no cache, or one of a version that is not known here."""
    path = header_path(cache)
    if not path.is_file():
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
        raise UserError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}; "
                        "restore it or build the cache again") from error


def differences(old: Header, new: Header) -> list[str]:
    """What of the VAE and the transform differs, as "clip.height: 64 in the cache, 128 now"."""
    found = [("dtype", old.dtype, new.dtype)]
    for part in ("vae", "clip"):
        before, now = getattr(old, part).model_dump(), getattr(new, part).model_dump()
        found += [(f"{part}.{field}", before[field], now[field]) for field in now]
    return [f"{field}: {before} in the cache, {now} now" for field, before, now in found if before != now]


def read_index(path: Path) -> tuple[pa.Table, list[dict[str, str]]]:
    """The rows of one shard, and what was set aside while it was made: id, path, reason."""
    try:
        table = pq.read_table(path)
        aside = json.loads((table.schema.metadata or {}).get(b"set_aside", b"[]"))
        return table.replace_schema_metadata(None).cast(SCHEMA), aside
    except (pa.ArrowException, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and build again: only its clips are encoded anew") \
            from error


def write_index(path: Path, table: pa.Table, aside: Sequence[Mapping[str, str]]) -> None:
    """Write a shard's index under its name: this commits the shard."""
    table = table.replace_schema_metadata({"set_aside": json.dumps(list(aside))})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def channel_moments(latent: np.ndarray) -> tuple[list[float], list[float]]:
    """Per channel of (c, t, h, w): the mean, and the sum of squared deviations from it."""
    flat = latent.reshape(len(latent), -1).astype(np.float64)
    mean = flat.mean(1)
    return mean.tolist(), ((flat - mean[:, None]) ** 2).sum(1).tolist()


def merge_moments(table: pa.Table) -> tuple[list[float], list[float]]:
    """Exact mean and standard deviation per channel over all latents of an index (Chan et al. 1979)."""
    shape = np.asarray(table["shape"].to_pylist(), np.float64)
    mean, squares = (np.asarray(table[name].to_pylist(), np.float64) for name in ("mean", "squares"))
    count = shape[:, 1:].prod(1)[:, None]
    total = (count * mean).sum(0) / count.sum()
    deviation = np.sqrt((squares + count * (mean - total) ** 2).sum(0) / count.sum())
    return total.tolist(), deviation.tolist()
