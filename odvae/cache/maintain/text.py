"""Verify the caption embeddings of a cache, and copy them into another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from ...data.failures import cache_file_error
from ...utils.errors import UserError
from ...utils.storage import Storage
from ..text import checksum, read_rows, text_folders, text_stores


def verify_text(cache: Storage | Path | str) -> tuple[int, list[str]]:
    """Verify the embeddings of a cache; returns their number, and what is wrong with them."""
    count, faults = 0, list[str]()
    shards = [(storage, file.removesuffix(".parquet")) for storage in text_folders(cache)
              for file in sorted(storage.sizes("")) if file.endswith(".parquet")]
    for storage, name in shards:
        try:
            rows = read_rows(storage, name).to_pylist()
            faults += _text_faults(storage, name, rows)
            count += len(rows)
        except UserError as error:
            faults.append(str(error))
        except (SafetensorError, OSError) as error:
            advice = f"delete {storage.path(name)}.parquet and embed again"
            faults.append(str(cache_file_error(error, f"{storage.path(name)}.safetensors", advice)))
    return count, faults


def _text_faults(storage: Storage, name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Compare the checksums of a shard's embeddings with its rows."""
    path, tensors = storage.path(name), load(storage.read(f"{name}.safetensors"))
    return [f"{path}.safetensors: the checksum of {row['caption']!r} does not match; delete {path}.parquet and embed "
            "again" for row in rows
            if row["caption_hash"] not in tensors or checksum(tensors[row["caption_hash"]]) != row["checksum"]]


def copy_text(source: Storage, target: Storage) -> None:
    """Copy the embeddings that `target` lacks from a cache. Raises UserError if they are damaged."""
    text_stores(source)
    for folder in (f"text/{name}" for name in source.folders("text")):
        there = target.sizes(folder)
        # Rows last: they commit.
        for name in sorted(source.sizes(folder).keys() - there, key=lambda name: (name.endswith(".parquet"), name)):
            target.write(f"{folder}/{name}", source.read(f"{folder}/{name}"))
