"""Latents of an unfinished encoding, kept on disk so that it can resume."""

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
from ..utils.files import atomic_folder, atomic_path, read_json, temporary_path, write_json
from ..utils.locks import lock
from .memory import StreamPlan

logger = logging.getLogger("odvae")
MISMATCHES = {"vae": "another VAE", "dtype": "another precision",
              "precision": "another precision of the computation", "made_with": "other library versions"}


class LatentParts:
    """Finished latents of a video that is being encoded, kept beside the target so that an interrupted run can resume:

        NAME.parts/about.json      all that determines the latents, and the plan
        NAME.parts/000000.latents  latent frames as stored in the latent file
        NAME.parts/lock            held by the process that encodes

    Opens the folder, or creates it. A context manager: on exit an empty folder is removed.

    Args:
        about: anything that JSON can hold, without the plan.

    Attributes:
        latents: number of latent frames kept.
        plan: the plan that the kept latents were encoded by; None: there are none to resume from, so `restart`.
        mismatch: why the kept latents cannot be used.

    Raises:
        UserError: NAME.parts is something else; another process is encoding there.
        OSError: the folder cannot be written to.
    """

    def __init__(self, target: Path, about: dict[str, Any], latent_bytes: int) -> None:
        self.folder, self._latent_bytes = target.with_suffix(".parts"), latent_bytes
        self._about = {"format": "odvae-latent-parts"} | about
        self._lock = self._acquire(f"{target} is being encoded by another process; wait for it, or choose another "
                                   "output name")
        stored = self._read_about()
        self.latents = sum(path.stat().st_size for path in self._paths()) // latent_bytes
        self.mismatch = _mismatch(stored, self._about)
        if any(path.stat().st_size % latent_bytes for path in self._paths()):
            self.mismatch = "a file in it is damaged"
        self.plan = _plan_of(stored) if self.latents and not self.mismatch else None

    def __enter__(self) -> LatentParts:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.latents:
            hidden = temporary_path(self.folder)  # atomically, so that nobody sees half of it
            with contextlib.suppress(OSError):
                self.folder.rename(hidden)
            for folder in (hidden, self.folder):
                shutil.rmtree(folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()

    def restart(self, plan: StreamPlan, reason: str = "") -> None:
        """Discard the kept latents, for `reason`, and start with this plan."""
        if self.latents:
            logger.warning("encoding starts over, %s cannot be used: %s", self.folder, reason)
        for path in reversed(self._paths()):
            path.unlink()
        tiles = None if plan.tiling is None else astuple(plan.tiling)
        write_json(self.folder / "about.json", self._about | {"frames_at_once": plan.frames, "tiles": tiles})
        self.latents = 0

    def _acquire(self, message: str) -> FileLock | None:
        """Open the folder, or create it, and lock it; UserError with `message` if another process holds the lock."""
        while True:
            self._make_folder()
            with contextlib.suppress(FileNotFoundError):  # another process has just finished and removed it
                self._read_about()
                file_lock = lock(self.folder / "lock", message)
                self._read_about()
                return file_lock

    def _make_folder(self) -> None:
        if self.folder.exists():
            return
        try:
            with atomic_folder(self.folder) as temporary:
                write_json(temporary / "about.json", self._about)
        except (UserError, OSError):
            if not self.folder.exists():  # otherwise another process was faster
                raise

    def _read_about(self) -> dict[str, Any]:
        about = self.folder / "about.json"
        stored = read_json(about) if about.is_file() else None
        if not isinstance(stored, dict) or stored.get("format") != self._about["format"]:
            self.folder.stat()  # FileNotFoundError if it is gone
            raise UserError(f"{self.folder} exists already and was not created by `odvae encode`; rename it, or choose "
                            "another output name")
        return stored

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.latents"))

    def add(self, data: bytes) -> None:
        """Keep the next latent frames. OSError."""
        with atomic_path(self.folder / f"{len(self._paths()):06d}.latents") as temporary:
            temporary.write_bytes(data)
        self.latents += len(data) // self._latent_bytes

    def copy_to(self, file: BinaryIO) -> int:
        """Append all kept latents to a file; returns the number of bytes."""
        start = file.tell()
        for path in self._paths():
            with path.open("rb") as part:
                shutil.copyfileobj(part, file, 2**20)
        return file.tell() - start

    def discard(self) -> None:
        """Remove the kept latents on exit."""
        self.latents = 0


def _plan_of(about: dict[str, Any]) -> StreamPlan | None:
    frames, tiles = about.get("frames_at_once"), about.get("tiles")
    return None if frames is None else StreamPlan(frames, None if tiles is None else Tiling(*tiles))


def _mismatch(stored: dict[str, Any], expected: dict[str, Any]) -> str:
    """Say how kept latents differ from the expected ones; "" if they do not."""
    old, new = (about | about["header"] for about in (stored, expected))
    different = [key for key in new if key not in ("header", "tiles") and old.get(key) != new[key]]
    reasons = dict.fromkeys(MISMATCHES.get(key, "another video") for key in different)
    return f"it is from {', '.join(reasons)}" if reasons else ""
