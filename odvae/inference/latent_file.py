"""The latent file: a safetensors file with one tensor, "latents" (t, c, h, w), the raw means of the encoder.

Time comes first so that latents can be appended; the header, which safetensors puts in front, is known beforehand
because the video's frames are counted. Its metadata is a `Header`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..model import AutoencoderKLODVAE
from ..utils.errors import UserError
from ..utils.finite import check_finite
from .fingerprint import DTYPES, Dtype

SUFFIX = ".safetensors"
READ = 16  # frames, or latent frames, per read
STORED_AS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # as safetensors calls them


class Header(BaseModel):
    """Metadata of a latent file; safetensors stores every value as text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["odvae-latents"] = "odvae-latents"
    version: Literal["2"] = "2"
    vae: str  # `vae_fingerprint`
    frames: int  # of the source; for the encoder the last one is repeated up to 1 + 4k
    frame_rate: float  # frames per second
    height: int  # pixels of the source; for the encoder edges are repeated up to multiples of 8
    width: int
    source: str  # the source's file name
    content: str = ""  # SHA-256 of the source
    precision: str = "float32"  # that the VAE computed in, see `utils.precision`; `dtype` of the tensor is that stored
    tiles: str = ""  # "HxW+overlap" in pixels; "": whole frames
    made_with: str  # versions of libraries


def open_latents(path: Path) -> Any:
    """Open by `safe_open`; names that are not UTF-8, which it refuses, by file descriptor. SafetensorError, OSError."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            return safe_open(f"/proc/self/fd/{file.fileno()}", "pt")
    return safe_open(path, "pt")


def read_header(path: Path) -> Header:
    """Read the header. Raises UserError if the file is missing, truncated or not a latent file."""
    try:
        with open_latents(path) as file:
            return Header.model_validate(file.metadata() or {})
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a latent file ({error}); encode the video again") from error
    except ValidationError as error:
        wrong = ", ".join(str(e["loc"][0]) for e in error.errors())
        raise UserError(f"{path} was not written by `odvae encode`: its metadata does not fit ({wrong})") from error


def write_header(file: BinaryIO, header: Header, shape: tuple[int, ...], dtype: Dtype) -> int:
    """Write the start of a safetensors file: the header's length (8 bytes) and the header; returns its size."""
    size = prod(shape) * DTYPES[dtype].itemsize
    text = json.dumps({"__metadata__": {key: str(value) for key, value in header.model_dump().items()},
                       "latents": {"dtype": STORED_AS[dtype], "shape": shape, "data_offsets": [0, size]}}).encode()
    text += b" " * (-len(text) % 8)  # the tensor starts at a multiple of 8
    return file.write(len(text).to_bytes(8, "little") + text)


def latent_bytes(z: Tensor, dtype: Dtype, source: Path) -> bytes:
    """Return a latent chunk (1, c, t, h, w) as stored, (t, c, h, w).

    Raises:
        NonFiniteError: the VAE computed values that are not finite.
        UserError: values out of range for `dtype`.
    """
    check_finite(z, "the VAE's encoder", where=f"for {source}")
    stored = z[0].transpose(0, 1).to(DTYPES[dtype])
    if not stored.isfinite().all():
        raise UserError(f"{source}: a latent is out of range for {dtype}; use --store-dtype bfloat16 or float32")
    return stored.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def read_latents(path: Path, vae: AutoencoderKLODVAE) -> Iterator[Tensor]:
    """Yield chunks (1, c, t, h, w) in the VAE's precision, read on demand."""
    with open_latents(path) as file:
        latents = file.get_slice("latents")
        for start in range(0, latents.get_shape()[0], READ):
            yield latents[start:start + READ].transpose(0, 1)[None].to(vae.device, vae.dtype)
