"""The latents of a video that is being encoded, kept until all are there."""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from ..model.tiling import Tiling
from ..utils.errors import UserError
from ..utils.files import atomic_folder, atomic_path, read_json, temporary_beside, write_json
from ..utils.locks import lock
from .memory import StreamPlan

logger = logging.getLogger("odvae")
NAMES = {"vae": "another VAE", "dtype": "another precision", "made_with": "other versions of libraries"}


class LatentParts:
    """The latents of a video that is being encoded, kept beside the target so that a run that was stopped can go on:

        NAME.parts/about.json      what they are (what of it differs makes other latents), and the plan
        NAME.parts/000000.latents  latent frames as they lie in the file
        NAME.parts/lock            held by the process that works here

    Opens what is there, or makes it. A context manager: at its end the folder is gone if nothing is kept.

    Args:
        about: anything that JSON holds, without the plan.

    Attributes:
        latents: how many latent frames are kept.
        plan: what those that are kept were made by; None: there are none that can be gone on with, so `begin`.
        unlike: why not, where there are some.

    Raises:
        UserError: NAME.parts is something else; another process works there.
        OSError: nothing can be written there.
    """

    def __init__(self, target: Path, about: dict[str, Any], latent_bytes: int) -> None:
        self.folder, self._latent_bytes = target.with_suffix(".parts"), latent_bytes
        self._about = {"format": "odvae-latent-parts"} | about
        self._lock = self._take(f"{target} is being encoded by another process; let it end, or choose another name for "
                                "the output")
        there = self._read_about()
        self.latents = sum(path.stat().st_size for path in self._paths()) // latent_bytes
        self.unlike = _differences(there, self._about)
        if any(path.stat().st_size % latent_bytes for path in self._paths()):
            self.unlike = "a file in it is damaged"
        self.plan = _plan_of(there) if self.latents and not self.unlike else None

    def __enter__(self) -> LatentParts:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.latents:
            away = temporary_beside(self.folder)  # at once, so that nobody finds half of it
            with contextlib.suppress(OSError):
                self.folder.rename(away)
            for folder in (away, self.folder):
                shutil.rmtree(folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()

    def begin(self, plan: StreamPlan, reason: str = "") -> None:
        """Forget what is kept, for a `reason`, and begin by this plan."""
        if self.latents:
            logger.warning("%s begins anew: %s", self.folder, reason)
        for path in reversed(self._paths()):
            path.unlink()
        tiles = None if plan.tiling is None else astuple(plan.tiling)
        write_json(self.folder / "about.json", self._about | {"frames_at_once": plan.frames, "tiles": tiles})
        self.latents = 0

    def _take(self, taken: str) -> FileLock | None:
        """Open the folder, or make it, and lock it against other processes."""
        while True:
            self._make_folder()
            with contextlib.suppress(FileNotFoundError):  # the one that worked here has ended, and removed it
                self._read_about()
                held = lock(self.folder / "lock", taken)
                self._read_about()
                return held

    def _make_folder(self) -> None:
        if self.folder.exists():
            return
        try:
            with atomic_folder(self.folder) as temporary:
                write_json(temporary / "about.json", self._about)
        except (UserError, OSError):
            if not self.folder.exists():  # else another process was faster
                raise

    def _read_about(self) -> dict[str, Any]:
        about = self.folder / "about.json"
        there = read_json(about) if about.is_file() else None
        if not isinstance(there, dict) or there.get("format") != self._about["format"]:
            self.folder.stat()  # FileNotFoundError where it is gone
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

    def discard(self) -> None:
        """What is kept is needed no more, and goes at the end."""
        self.latents = 0


def _plan_of(about: dict[str, Any]) -> StreamPlan | None:
    frames, tiles = about.get("frames_at_once"), about.get("tiles")
    return None if frames is None else StreamPlan(frames, None if tiles is None else Tiling(*tiles))


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In what kept latents are not those that are wanted, in words; "" where they are."""
    mine, theirs = (about | about["header"] for about in (here, there))
    different = [key for key in mine if key not in ("header", "tiles") and theirs.get(key) != mine[key]]
    return f"it is of {', '.join(dict.fromkeys(NAMES.get(key, 'another video') for key in different))}" if different \
        else ""
