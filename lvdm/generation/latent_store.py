"""Latents that are stored beside a video, while it is generated and afterwards.

    NAME.parts/about.json              while it is generated: its `LatentMetadata`, and
    NAME.parts/000000.safetensors      "latents" (c, t, h, w), normalised, float32: the context, then a group a file
    NAME.safetensors                   afterwards: all of them as one tensor, `LatentMetadata` in the metadata

A group is written once, so the cost of a second does not grow with the length, and every file is whole or not there.
A stopped video is resumed from its parts, by the same command, or made longer with --continue.
"""

from __future__ import annotations

import inspect
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

from ..sampling.module_state import module_state
from ..sampling.params import VideoFileParams

if TYPE_CHECKING:
    from ..sampling.pipeline import LVDMPipeline


class LatentMetadata(Config):
    """What stored latents say about themselves; in a file's metadata every value is JSON."""

    format: Literal["lvdm-latents"] = "lvdm-latents"
    version: Literal[3] = 3
    settings: VideoFileParams
    given: int = Field(ge=0)  # latent frames at the start that were not generated but continued
    latents: int = Field(ge=1)  # latent frames of the whole video
    parts: dict[str, str]  # fingerprints of the pipeline's parts
    made_with: str = ""  # versions of libraries; no part of what decides the values

    @property
    def fingerprint(self) -> str:
        """Of all that decides the values."""
        return fingerprint({}, self.model_dump(mode="json", exclude={"made_with"}))

    def differences(self, other: LatentMetadata) -> list[str]:
        """What of `other`, that is there, is not as here; libraries do not count."""
        mine, theirs = (one.settings.model_dump(mode="json") for one in (self, other))
        differences = [f"{key}: {theirs[key]!r} there, {value!r} here"
                       for key, value in mine.items() if theirs[key] != value]
        return differences + self.other_parts(other.parts)

    def other_parts(self, parts: Mapping[str, str], names: Sequence[str] | None = None) -> list[str]:
        """Which of a pipeline's parts, of all or of those with `names`, are not those that made this."""
        names = list(dict.fromkeys([*self.parts, *parts])) if names is None else names
        return [f"another {name}" for name in names if parts.get(name) != self.parts.get(name)]


def fingerprints(pipeline: LVDMPipeline) -> dict[str, str]:
    """Of a pipeline's parts: other ones, other values. Reads every weight once, in the precision that it is computed
    in."""
    pipeline.upcast_weights()
    encoder, vae = pipeline.caption_encoder, pipeline.vae
    state = {} if pipeline.text_encoder is None else module_state(pipeline.text_encoder)
    parts = {"vae": _fingerprint(vae), "transformer": _fingerprint(pipeline.transformer),
             "text encoder": "" if encoder is None else encoder.fingerprint,
             "scheduler": fingerprint({}, {"class": type(pipeline.scheduler).__name__, **_config(pipeline.scheduler)})}
    if state:
        parts["text encoder"] = fingerprint({}, {"encoder": parts["text encoder"], **state})
    if vae.use_tiling:  # a part of its own: the latents are the same, and can be decoded otherwise
        parts["tiling"] = f"{vae.tiling.height}x{vae.tiling.width}+{vae.tiling.overlap}"
    return parts


def _fingerprint(model: Any) -> str:
    return fingerprint(model.state_dict(), _config(model) | module_state(model))


def _config(model: Any) -> dict[str, Any]:
    """What of a config is not the class's default, so that an option added later changes no fingerprint."""
    defaults = {name: one.default for name, one in inspect.signature(type(model).__init__).parameters.items()}
    plain = {key: list(value) if isinstance(value, tuple) else value.to_dict() if hasattr(value, "to_dict") else value
             for key, value in model.config.items()}  # a quantisation's config is an object
    return {key: value for key, value in plain.items() if not key.startswith("_")
            and value != (list(d) if isinstance(d := defaults.get(key), tuple) else d)}


def made_with() -> str:
    return " ".join(f"{name} {version(name)}" for name in ("odvae-lvdm", "torch", "diffusers"))


class LatentChunks:
    """The stored groups of a video that is being generated. Opens those that are there, or begins with none.

    Args:
        target: NAME.safetensors.
        context_latents: (1, c, t, h, w) what the video continues, stored first.
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
        """All of them, (c, t, h, w), read from the files; None: there are none."""
        chunks = _chunks(self.folder)
        return torch.cat(chunks, dim=1) if chunks else None

    @property
    def length(self) -> int:
        """Latent frames that are stored."""
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
        """Write all groups as one file. The groups stay; `remove` them when all else is written too.

        Args:
            metadata: of the file; None: that of the groups.
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
    """The metadata of latents (NAME.safetensors), or else of the parts of a stopped video; None: neither is there.

    Raises:
        UserError: the file is broken, or not one that `lvdm generate` wrote.
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
        raise UserError(f"{path} cannot be read as latents ({error}); make the video again with --overwrite") from error
    except (ValidationError, ValueError) as error:
        place = path if path.is_file() else folder
        raise UserError(f"{place} was not written by this version of `lvdm generate`; choose another name, or "
                        f"--overwrite") from error


def read_latents(path: Path) -> tuple[LatentMetadata, Tensor]:
    """Stored latents (c, t, h, w), as far as they exist: of NAME.safetensors, or of NAME.mp4 from the file beside it.

    Raises:
        UserError: there are none, or they are broken, or not finite.
    """
    beside = path.with_suffix(SUFFIX)
    metadata = read_latent_metadata(beside)
    if metadata is None:
        hint = "; --video goes on from its pixels" if path.is_file() else ""
        raise UserError(f"{beside} is not there: no latents were kept for {path.name}{hint}")
    chunks = [load_file(beside)["latents"]] if beside.is_file() else _chunks(parts_folder(beside))
    if not chunks:
        raise UserError(f"{parts_folder(beside)} holds no finished group yet; run the command that began it again")
    latents = torch.cat(chunks, dim=1)
    if not is_finite(latents):
        raise UserError(f"{beside} holds NaN or infinity; make the video again with --overwrite")
    return metadata, latents


def read_settings(path: Path | str) -> dict[str, Any]:
    """What a file of `lvdm generate` was made with: a video's (.mp4) or its latents' (.safetensors) settings.

    Raises:
        UserError: the file is not there, or does not say.
    """
    path = Path(path)
    if path.suffix == SUFFIX:
        metadata = read_latent_metadata(path)
        if metadata is None:
            raise UserError(f"{path} is not there")
        return metadata.settings.model_dump(mode="json")
    try:
        found = json.loads(read_metadata(path).get("comment", ""))
    except (OSError, ValueError) as error:  # av's errors derive from either
        raise UserError(f"{path} does not say how it was made, as videos of `lvdm generate` do ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not say how it was made, as videos of `lvdm generate` do")
    return found


def read_made_by(video: Path) -> str:
    """The `LatentMetadata.fingerprint` of the run of `lvdm generate` that wrote a video; "" for any other file."""
    try:
        return read_metadata(video).get("description", "")
    except (OSError, ValueError):  # av's errors derive from either
        return ""
