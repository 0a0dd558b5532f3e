"""Export a cache's latents for other programs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save

from ...utils.files import atomic_folder
from ...utils.progress import track
from ..reader import LatentCache

TAR_BYTES = 2**28


def export(path: Path, out: Path, kind: Literal["safetensors", "webdataset"]) -> int:
    """Write every clip into a new folder; returns the number of clips.

    safetensors: ID.safetensors with `latents` as stored, ID.json with the row and ID.txt with the first caption.
    webdataset: 00000.tar ... with ID.npy (bfloat16 as float32, because numpy lacks it), ID.json and ID.txt.

    Raises:
        UserError: no cache; `out` exists.
    """
    cache = LatentCache(path)
    rows = cache.index
    with atomic_folder(out) as folder:
        tar: tarfile.TarFile | None = None
        size = number = 0
        for i in track(range(len(cache)), "export", "clip"):
            row: dict[str, Any] = rows.slice(i, 1).to_pylist()[0]
            latent = cache.stored(i)
            texts = {"json": json.dumps(row, ensure_ascii=False).encode(), "txt": row["captions"][0].encode()}
            if kind == "safetensors":
                files = {"safetensors": save({"latents": latent.clone()})} | texts
                for suffix, data in files.items():
                    (folder / f"{row['id']}.{suffix}").write_bytes(data)
                continue
            buffer = io.BytesIO()
            np.save(buffer, (latent.float() if latent.dtype == torch.bfloat16 else latent).numpy())
            if tar is None or size > TAR_BYTES:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(folder / f"{number:05d}.tar", "w")  # noqa: SIM115, closed when full
                size, number = 0, number + 1
            for suffix, data in ({"npy": buffer.getvalue()} | texts).items():
                info = tarfile.TarInfo(f"{row['id']}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                size += len(data)
        if tar is not None:
            tar.close()
    return len(cache)
