"""Latents stored beside a video, while it is generated and afterwards.

    NAME.parts/about.json              while it is generated: its `LatentMetadata`, and
    NAME.parts/000000.safetensors      "latents" (c, t, h, w), normalized, float32: the context, then a group per file
    NAME.safetensors                   afterwards: all of them as one tensor, `LatentMetadata` in the metadata

A group is written once, so the cost per second does not grow with the length, and every file is whole or absent. A
stopped video is resumed from its parts by the same command, or made longer with --continue.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from odvae.data.video.writer import read_metadata
from odvae.inference.latent_file import SUFFIX
from odvae.utils.config import Config
from odvae.utils.errors import UserError
from odvae.utils.files import atomic_folder, atomic_path, fingerprint, read_json, write_json
from odvae.utils.finite import is_finite
from odvae.utils.precision import HALF

from ..sampling.params import VideoFileParams
from .fingerprints import ADAPTER, fingerprint_model, fingerprints

if TYPE_CHECKING:
    from ..sampling.loading import AnyPipeline


class LatentMetadata(Config):
    """Metadata of stored latents; in a file's metadata every value is JSON."""

    format: Literal["lvdm-latents"] = "lvdm-latents"
    version: Literal[3] = 3
    settings: VideoFileParams
    given: int = Field(ge=0)  # latent frames at the start that are context, not generated
    latents: int = Field(ge=1)  # latent frames of the whole video
    parts: dict[str, str]  # fingerprints of the pipeline's components; of adapters also the weight
    made_with: str = ""  # versions of libraries; they do not count

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines the values."""
        values = self.model_dump(mode="json", exclude={"made_with"}) | {"settings": self.settings.identity}
        return fingerprint({}, values)

    @property
    def comment(self) -> dict[str, Any]:
        """The settings, and where there are any the adapters by name, for the comment of a video."""
        adapters = {name.removeprefix(ADAPTER): value for name, value in self.parts.items()
                    if name.startswith(ADAPTER)}
        return self.settings.model_dump(mode="json") | ({"adapters": adapters} if adapters else {})

    def differences(self, other: LatentMetadata) -> list[str]:
        """List what differs in `other`, which is stored; libraries do not count."""
        mine, theirs = (metadata.settings.model_dump(mode="json") for metadata in (self, other))
        changed = [f"{key}: {theirs[key]!r} there, {own!r} here" for key, own in mine.items() if theirs[key] != own]
        return changed + self.different_parts(other.parts)

    def different_parts(self, parts: Mapping[str, str], names: Sequence[str] | None = None) -> list[str]:
        """List which of a pipeline's components, all or those in `names`, are not those that generated this."""
        names = list(dict.fromkeys([*self.parts, *parts])) if names is None else names
        return [f"another {name}" for name in names if parts.get(name) != self.parts.get(name)]


def is_vae_of(pipeline: AnyPipeline, metadata: LatentMetadata) -> bool:
    """Whether a pipeline's VAE generated latents, in its precision or rounded to half precision."""
    same = not metadata.different_parts(fingerprints(pipeline), ["vae"])
    return same or metadata.parts.get("vae") in [
        fingerprint_model(copy.deepcopy(pipeline.vae).to(half)) for half in HALF]


def made_with() -> str:
    return " ".join(f"{name} {version(name)}" for name in ("odvae-lvdm", "torch", "diffusers"))


class LatentChunks:
    """The stored groups of a video that is being generated. Opens existing ones, or starts with none.

    Args:
        target: NAME.safetensors.
        context_latents: (1, c, t, h, w) that the video continues, stored first.
    """

    def __init__(self, target: Path, metadata: LatentMetadata, context_latents: Tensor | None = None) -> None:
        self.target, self.metadata = target, metadata
        self.folder = parts_folder(target)
        if not self.folder.exists():
            with atomic_folder(self.folder) as temporary:
                write_json(temporary / "about.json", metadata.model_dump(mode="json"))
        self._lengths = [chunk.shape[1] for chunk in _chunks(self.folder)]
        if context_latents is not None and not self._lengths:
            self.add(context_latents[0])

    @property
    def latents(self) -> Tensor | None:
        """All latents (c, t, h, w), read from the files; None: there are none."""
        chunks = _chunks(self.folder)
        return torch.cat(chunks, dim=1) if chunks else None

    @property
    def length(self) -> int:
        """Number of stored latent frames."""
        return sum(self._lengths)

    def truncate(self, length: int) -> None:
        """Delete the groups beyond the first `length` latent frames."""
        while self.length > length:
            self._lengths.pop()
            (self.folder / _name(len(self._lengths))).unlink()

    def add(self, latents: Tensor) -> None:
        """Store the next group, (c, t, h, w)."""
        with atomic_path(self.folder / _name(len(self._lengths))) as temporary:
            temporary.write_bytes(save({"latents": latents.float().cpu().contiguous()}))
        self._lengths.append(latents.shape[1])

    def finalize(self, metadata: LatentMetadata | None = None) -> None:
        """Write all groups to one file. The groups stay; `remove` them once everything else is written.

        Args:
            metadata: of the file; None: the same as of the groups.
        """
        values = {key: json.dumps(value) for key, value in (metadata or self.metadata).model_dump(mode="json").items()}
        with atomic_path(self.target) as temporary:
            temporary.write_bytes(save({"latents": torch.cat(_chunks(self.folder), dim=1)}, values))

    def remove(self) -> None:
        self.remove_of(self.target)

    @staticmethod
    def remove_of(target: Path) -> None:
        shutil.rmtree(parts_folder(target), ignore_errors=True)


def parts_folder(target: Path) -> Path:
    return target.with_suffix(".parts")


def _name(number: int) -> str:
    return f"{number:06d}{SUFFIX}"


def _chunks(folder: Path) -> list[Tensor]:
    chunks: list[Tensor] = []
    while (path := folder / _name(len(chunks))).is_file():
        chunks.append(load_file(path)["latents"])
    return chunks


def read_latent_metadata(path: Path) -> LatentMetadata | None:
    """Read the metadata of latents (NAME.safetensors) or of the parts of a stopped video; None: neither exists.

    Raises:
        UserError: the file is damaged, or `lvdm generate` did not write it.
    """
    folder = parts_folder(path)
    try:
        if path.is_file():
            with safe_open(path, "pt") as file:
                return LatentMetadata.model_validate(
                    {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                )
        return LatentMetadata.model_validate(read_json(folder / "about.json")) if folder.is_dir() else None
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read latents from {path} ({error}); generate the video again with "
                        "--overwrite") from error
    except (ValidationError, ValueError) as error:
        found = path if path.is_file() else folder
        raise UserError(f"{found} was not written by this version of `lvdm generate`; choose another name, or "
                        f"--overwrite") from error


def read_latents(path: Path) -> tuple[LatentMetadata, Tensor]:
    """Read the stored latents (c, t, h, w), as far as they exist, from NAME.safetensors, or for NAME.mp4 from the file
    beside it.

    Raises:
        UserError: there are none, or they are damaged, or not finite.
    """
    file = path.with_suffix(SUFFIX)
    metadata = read_latent_metadata(file)
    if metadata is None:
        hint = "; --video continues from its pixels" if path.is_file() else ""
        raise UserError(f"{file} does not exist: no latents are stored for {path.name}{hint}")
    chunks = [load_file(file)["latents"]] if file.is_file() else _chunks(parts_folder(file))
    if not chunks:
        raise UserError(f"{parts_folder(file)} contains no finished group yet; run the command that started it again")
    latents = torch.cat(chunks, dim=1)
    if not is_finite(latents):
        raise UserError(f"{file} contains NaN or infinity; generate the video again with --overwrite")
    return metadata, latents


def read_settings(path: Path | str) -> dict[str, Any]:
    """Read the settings stored in a file of `lvdm generate`, a video (.mp4) or its latents (.safetensors).

    Raises:
        UserError: the file does not exist, or contains no settings.
    """
    path = Path(path)
    if path.suffix == SUFFIX:
        metadata = read_latent_metadata(path)
        if metadata is None:
            raise UserError(f"{path} does not exist")
        return metadata.comment
    try:
        settings = json.loads(read_metadata(path).get("comment", ""))
    except (OSError, ValueError) as error:  # av's errors derive from either
        raise UserError(f"{path} contains no settings, as videos of `lvdm generate` do ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} contains no settings, as videos of `lvdm generate` do")
    return settings


def read_fingerprint(video: Path) -> str:
    """Read the `LatentMetadata.fingerprint` that `lvdm generate` stored in a video; "" for any other file."""
    try:
        return read_metadata(video).get("description", "")
    except (OSError, ValueError):  # av's errors derive from either
        return ""
