"""A file of latents: a safetensors file with one tensor, "latents" (t, c, h, w): what the encoder's mean said, raw.

Time comes first so that latents are appended as they are made; the header, which safetensors wants in front, is known
beforehand because the video's frames are counted. Its metadata is a `Header`.
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
READ = 16  # frames, or latent frames, that are read at once
STORED_AS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # as safetensors calls them


class Header(BaseModel):
    """What a file of latents says about itself; safetensors stores every value as text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["odvae-latents"] = "odvae-latents"
    version: Literal["1"] = "1"
    vae: str  # `vae_fingerprint`
    frames: int  # that went in; what the encoder saw beyond them, up to 1 + 4k, was the last one again
    frame_rate: float  # frames a second
    height: int  # pixels, as they went in; beyond them, up to multiples of 8, the edge again
    width: int
    source: str  # the file's name
    content: str = ""  # SHA-256 of the file
    tiles: str = ""  # "HxW+overlap" in pixels; "": frames went in whole
    made_with: str  # versions of libraries


def open_latents(path: Path) -> Any:
    """`safe_open`, which takes no names that are not UTF-8; these are opened by number. SafetensorError, OSError."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            return safe_open(f"/proc/self/fd/{file.fileno()}", "pt")
    return safe_open(path, "pt")


def read_header(path: Path) -> Header:
    """Raises UserError where the file is not there, not whole, or not one of latents."""
    try:
        with open_latents(path) as file:
            return Header.model_validate(file.metadata() or {})
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no file of latents that can be read ({error}); encode the video again") from error
    except ValidationError as error:
        wrong = ", ".join(str(e["loc"][0]) for e in error.errors())
        raise UserError(f"{path} was not written by `odvae encode`: its metadata does not fit ({wrong})") from error


def write_header(file: BinaryIO, header: Header, shape: tuple[int, ...], dtype: Dtype) -> int:
    """The front of a safetensors file: the header's length (8 bytes), the header; returns how many bytes that is."""
    size = prod(shape) * DTYPES[dtype].itemsize
    text = json.dumps({"__metadata__": {key: str(value) for key, value in header.model_dump().items()},
                       "latents": {"dtype": STORED_AS[dtype], "shape": shape, "data_offsets": [0, size]}}).encode()
    text += b" " * (-len(text) % 8)  # the tensor begins at a multiple of 8
    return file.write(len(text).to_bytes(8, "little") + text)


def latent_bytes(z: Tensor, dtype: Dtype, source: Path) -> bytes:
    """A latent chunk (1, c, t, h, w) as it lies in the file, (t, c, h, w).

    Raises:
        NonFiniteError: the VAE gave values that are not finite.
        UserError: values beyond `dtype`.
    """
    check_finite(z, "the VAE's encoder", where=f"for {source}")
    stored = z[0].transpose(0, 1).to(DTYPES[dtype])
    if not stored.isfinite().all():
        raise UserError(f"{source}: a latent is beyond what {dtype} can hold; store bfloat16 or float32")
    return stored.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def read_latents(path: Path, vae: AutoencoderKLODVAE) -> Iterator[Tensor]:
    """Chunks (1, c, t, h, w) in the VAE's precision, read as they are asked for."""
    with open_latents(path) as file:
        latents = file.get_slice("latents")
        for start in range(0, latents.get_shape()[0], READ):
            yield latents[start:start + READ].transpose(0, 1)[None].to(vae.device, vae.dtype)
