"""The latents of a video that is being encoded, kept until all are there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from .runtime.errors import UserError
from .runtime.files import atomic_folder, atomic_path, read_json, write_json

logger = logging.getLogger("odvae")


class LatentParts:
    """The latents of a video that is being encoded, kept beside the target so that a run that was stopped can go on:

        NAME.parts/about.json      what they are: what of it differs makes other latents
        NAME.parts/000000.latents  latent frames as they lie in the file

    Opens what is there of the same `about`, or begins anew.

    Args:
        about: anything that JSON holds; the key "frames_at_once" does not count, see there.

    Attributes:
        latents: how many latent frames are kept.
        frames_at_once: that went through the model at once for those that are kept; None where there are none.

    Raises:
        UserError: NAME.parts is something else.
        OSError: nothing can be written there.
    """

    def __init__(self, target: Path, about: dict[str, Any], latent_bytes: int) -> None:
        self.folder, self._latent_bytes = target.with_suffix(".parts"), latent_bytes
        self._about = {"format": "odvae-latent-parts"} | about
        self.frames_at_once: int | None = None
        if self.folder.exists():
            there = self._read_about()
            if _without_plan(there) == _without_plan(self._about) and not any(
                    path.stat().st_size % latent_bytes for path in self._paths()):
                self.frames_at_once = there["frames_at_once"]
            else:
                logger.info("%s is of another video, VAE or precision: begun anew", self.folder)
                self.remove()
        if not self.folder.exists():
            with atomic_folder(self.folder) as temporary:
                write_json(temporary / "about.json", self._about)
        self.latents = sum(path.stat().st_size for path in self._paths()) // latent_bytes

    def _read_about(self) -> dict[str, Any]:
        about = self.folder / "about.json"
        there = read_json(about) if about.is_file() else None
        if not isinstance(there, dict) or there.get("format") != self._about["format"]:
            raise UserError(f"{self.folder} is there already, and is not what `odvae encode` keeps while it works; "
                            "rename it, or choose another name for the output")
        return there

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.latents"))

    def add(self, data: bytes) -> None:
        """Keep the next latent frames. OSError."""
        with atomic_path(self.folder / f"{len(self._paths()):06d}.latents") as temporary:
            temporary.write_bytes(data)
        self.latents += len(data) // self._latent_bytes

    def copy_to(self, file: BinaryIO) -> int:
        """Append all of them to a file; returns how many bytes these are."""
        begin = file.tell()
        for path in self._paths():
            with path.open("rb") as part:
                shutil.copyfileobj(part, file, 2**20)
        return file.tell() - begin

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.latents = 0


def _without_plan(about: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key != "frames_at_once"}
