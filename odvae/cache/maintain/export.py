"""Export a cache's latents for other programs."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...data.failures import cache_file_error
from ...utils.errors import UserError
from ...utils.files import atomic_folder
from ...utils.progress import track
from ...utils.storage import Storage, open_storage
from .. import format as fmt
from ..partition import iter_partitions, tensors_of

TAR_BYTES = 2**28
Row = dict[str, Any]


def export(path: Path | str, out: Path, kind: Literal["safetensors", "webdataset"]) -> int:
    """Write every clip into a new folder; returns the number of clips. One partition's rows and one shard's tensors are
    in memory at a time.

    safetensors: ID.safetensors with `latents` as stored, ID.json with the row and ID.txt with the first caption.
    webdataset: 00000.tar ... with ID.npy (bfloat16 as float32, because numpy lacks it), ID.json and ID.txt.

    Raises:
        UserError: no cache, no clips, a damaged shard; `out` exists.
    """
    storage = open_storage(path)
    header = fmt.read_header(storage)
    count = 0
    with atomic_folder(out) as folder, ExitStack() as stack:
        add = partial(_add_files, folder) if kind == "safetensors" else _TarWriter(folder, stack).add
        for row, latent in track(_clips(storage), "export", "clip",
                                 header.measured.clips if header.measured else None):
            add(row["id"], latent, {"json": json.dumps(row, ensure_ascii=False).encode(),
                                    "txt": row["captions"][0].encode()})
            count += 1
        if not count:
            raise UserError(f"{storage.root} has no clips yet; finish it with `odvae cache build`")
    return count


def _clips(storage: Storage) -> Iterator[tuple[Row, Tensor]]:
    """Yield each row with its latent."""
    for partition in iter_partitions(storage):
        for shard, table in partition.tables():
            if not shard.clips:
                continue
            name = tensors_of(partition.number, shard.name)
            try:
                latents = load(storage.read(name))
                yield from ((row, latents[row["id"]]) for row in table.to_pylist())
            except (SafetensorError, OSError, KeyError) as error:
                raise cache_file_error(error, storage.path(name), f"run `odvae cache verify {storage.root} --repair` "
                                       "and build again: only its clips are re-encoded") from error


def _add_files(folder: Path, name: str, latent: Tensor, texts: dict[str, bytes]) -> None:
    for suffix, data in ({"safetensors": save({"latents": latent.clone()})} | texts).items():
        (folder / f"{name}.{suffix}").write_bytes(data)


class _TarWriter:
    """Writes tars, each until it is full; `stack` closes the last one."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.tar: tarfile.TarFile | None = None
        self.size = self.number = 0

    def add(self, name: str, latent: Tensor, texts: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        np.save(buffer, (latent.float() if latent.dtype == torch.bfloat16 else latent).numpy())
        if self.tar is None or self.size > TAR_BYTES:
            self.stack.close()  # closes the tar that is full
            self.tar = self.stack.enter_context(tarfile.TarFile(self.folder / f"{self.number:05d}.tar", "w"))
            self.size, self.number = 0, self.number + 1
        for suffix, data in ({"npy": buffer.getvalue()} | texts).items():
            info = tarfile.TarInfo(f"{name}.{suffix}")
            info.size = len(data)
            self.tar.addfile(info, io.BytesIO(data))
            self.size += len(data)
