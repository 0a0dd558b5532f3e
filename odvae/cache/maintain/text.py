"""Verify the caption embeddings of a cache, and copy them into another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from ...data.failures import cache_file_error
from ...utils.errors import UserError
from ...utils.storage import Storage
from ..embed import checksum
from ..hashes import hash_keys
from ..text import ENCODER, TextStore, list_shards, read_rows, text_folders, text_storage, text_stores
from ..text_lookup import LOOKUP


def verify_text(cache: Storage | Path | str) -> tuple[int, list[str]]:
    """Verify the embeddings of a cache; returns their number, and what is wrong with them."""
    count, faults = 0, list[str]()
    for storage in text_folders(cache):
        for name in list_shards(storage):
            try:
                rows = read_rows(storage, name).to_pylist()
                faults += _text_faults(storage, name, rows)
                count += len(rows)
            except UserError as error:
                faults.append(str(error))
            except (SafetensorError, OSError) as error:
                advice = f"delete {storage.path(name)}.parquet and embed again"
                faults.append(str(cache_file_error(error, f"{storage.path(name)}.safetensors", advice)))
        faults += [] if faults else _lookup_faults(storage)
    return count, faults


def _lookup_faults(storage: Storage) -> list[str]:
    """Compare the lookup of a store, whose shards are sound, with their rows."""
    try:
        store = TextStore(storage)
        missing = [name for name in list_shards(storage)
                   if not store.has(hash_keys(read_rows(storage, name, ["caption_hash"])["caption_hash"])).all()]
    except UserError as error:
        return [str(error)]
    return [f"{storage.path(LOOKUP)} lacks captions of {missing[0]} and {len(missing) - 1} other shards; delete it: it "
            "is written again when captions are embedded"] if missing else []


def _text_faults(storage: Storage, name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Compare the checksums of a shard's embeddings with its rows."""
    path, tensors = storage.path(name), load(storage.read(f"{name}.safetensors"))
    return [f"{path}.safetensors: the checksum of {row['caption']!r} does not match; delete {path}.parquet and embed "
            "again" for row in rows
            if row["caption_hash"] not in tensors or checksum(tensors[row["caption_hash"]]) != row["checksum"]]


def copy_text(sources: Sequence[Storage], target: Storage) -> None:
    """Copy the embeddings that `target` lacks from caches. Raises UserError if they are damaged."""
    for cache in sources:
        for store in text_stores(cache):  # which reports damage
            _copy(text_storage(cache, store), text_storage(target, store))
    for store in text_stores(target):
        store.update_lookup()


def _copy(here: Storage, there: Storage) -> None:
    if not there.exists(ENCODER):
        there.write(ENCODER, here.read(ENCODER))
    for shard in list_shards(here).keys() - list_shards(there):
        for file in (f"{shard}.safetensors", f"{shard}.parquet"):  # the rows commit
            there.write(file, here.read(file))
