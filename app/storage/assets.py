"""Folders that users may pick: videos, caches, trainings, pipelines, VAEs, as they lie below the roots.

Nobody sends a path: a place is offered under an id, and an id counts only if looking below the roots finds it again.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from odvae.utils.errors import UserError
from odvae.weights import DEMO_VAE

AssetKind = Literal["videos", "cache", "pipeline", "vae", "run"]

DEPTH = 5  # folders below a root that are looked into
ENTRIES = 50_000  # of all folders below a root together, that are looked at
FRESH = 5.0  # seconds that what was found holds
SKIPPED = {"node_modules", "__pycache__", "site-packages"}
# As odvae.data has them, which takes a second to import; a test holds them equal.
MEDIA = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".wmv", ".flv", ".3gp",
         ".gif", ".apng", ".png", ".jpg", ".jpeg", ".webp", ".bmp")  # fmt: skip
LISTS = (".jsonl", ".csv")
NAMES_PATH = ("path", "file_name")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


@dataclass(frozen=True)
class Asset:
    """One that may be picked."""

    id: str  # of its absolute path
    kind: AssetKind
    name: str  # the path below its root; where there are several roots, with the root's name
    path: Path
    detail: str  # what is known of it, in a few words
    time: float = 0.0  # seconds since 1970, of its last change where that tells anything


class AssetCatalog:
    """What lies below `roots`. Cheap to make; may be used in any thread."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [Path(os.path.abspath(root)) for root in roots]
        self._lock = threading.Lock()
        self._found: Sequence[Asset] = []
        self._at = -FRESH  # on the monotonic clock

    def list(self, kind: AssetKind) -> Sequence[Asset]:
        """The places of a kind: what is made (caches, runs, pipelines) newest first, else by name."""
        return [place for asset in self._look(FRESH) if asset.kind == kind]

    def find(self, asset_id: str, kind: AssetKind) -> Path:
        """Where the place with that id is. Raises UserError where there is none of that kind."""
        return self.get(asset_id, kind).path

    def get(self, asset_id: str, kind: AssetKind) -> Asset:
        """The place with that id. Raises UserError."""
        for age in (FRESH, 1.0):  # it may have been made this moment; and no stranger makes us look without end
            for asset in self._look(age):
                if asset.id == asset_id and asset.kind == kind and asset.path.exists():
                    return place
        raise UserError(f"There is no such {_WORDS[kind]} here any more. Refresh the list and pick one of it.")

    def invalidate(self) -> None:
        """Look anew when it is next asked for: something was made."""
        with self._lock:
            self._at = -FRESH

    def reserve_path(self, kind: Literal["cache", "run"], name: str, workspace: Path) -> Path:
        """Where a new cache or run of that name is to be made: directly below WORKSPACE/caches or WORKSPACE/runs.

        Raises:
            UserError: the name is none, or is taken; what a cache's dry run left there does not count.
        """
        if not NAME.fullmatch(name):
            raise UserError("The name must begin with a letter or digit and go on with at most 59 of letters, digits, "
                            "dots, - and _.")
        path = Path(os.path.abspath(workspace)) / f"{kind}s" / name
        left = {"work", "files"} if kind == "cache" else set()
        if os.path.lexists(path) and not (path.is_dir() and {one.name for one in path.iterdir()} <= left):
            raise UserError(f"There is a {_WORDS[kind]} of the name {name} already. Choose another name, or pick that "
                            f"one to go on with it.")
        return path

    def _look(self, age: float) -> Sequence[Asset]:
        with self._lock:
            if time.monotonic() - self._at >= age:
                found = {
                    asset.path: place for root in self.roots for asset in _DirectoryScanner(root, self.roots).places()
                }
                made = ("cache", "run", "pipeline")
                if DEMO_VAE not in found:
                    ships = "8 channels, ships; the shipped LVDM speaks it"
                    found[DEMO_VAE] = Asset(_id(DEMO_VAE), "vae", "demo", DEMO_VAE, ships)
                self._found = sorted(found.values(), key=lambda one: (-one.time if one.kind in made else 0, one.name))
                self._at = time.monotonic()
            return self._found


_WORDS = {"videos": "folder of videos", "cache": "cache", "pipeline": "pipeline", "vae": "VAE", "run": "training"}
assert set(_WORDS) == set(get_args(AssetKind))


def _id(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


@dataclass
class _Media:
    """What a folder holds with those below it."""

    files: int = 0
    tars: int = 0
    offered: int = 0  # folders directly below it that were offered, or hold such
    partial: bool = False  # there may be more

    def __str__(self) -> str:
        more = " or more" if self.partial else ""
        return _count(self.tars, "tar") + more if self.tars else _count(self.files, "file") + more


class _DirectoryScanner:
    """One look below one root."""

    def __init__(self, root: Path, roots: Sequence[Path]) -> None:
        self.root = root
        # A root within another is looked into for its own sake, deeper; its places are called as seen from the outer.
        outer = [one for one in roots if not any(one != other and one.is_relative_to(other) for other in roots)]
        self._base = next(one for one in outer if root.is_relative_to(one))
        self._prefix = self._base.name + "/" if len(outer) > 1 else ""
        self._real = [os.path.realpath(one) for one in roots]
        # A link from a root back to one around it leads nowhere new.
        self._seen = {os.path.realpath(one) for one in roots if one != root and root.is_relative_to(one)}
        self._left = ENTRIES

    def places(self) -> list[Asset]:
        found: list[Asset] = []
        self._enter(str(self.root), 0, found)
        return found

    def _place(self, kind: AssetKind, path: str, detail: str, changed: float = 0.0) -> Asset:
        below = os.path.relpath(path, self._base)
        name = f"{self._prefix}{below}" if below != "." else self._base.name or str(self._base)
        return Asset(_id(Path(path)), kind, name, Path(path), detail, changed)

    def _enter(self, folder: str, depth: int, found: list[Asset]) -> _Media:
        media = _Media()
        real = os.path.realpath(folder)
        if real in self._seen or not any(os.path.commonpath([real, root]) == root for root in self._real):
            return media
        self._seen.add(real)
        files: set[str] = set()
        folders: list[str] = []
        for entry in self._entries(folder):
            (folders.append if os.path.isdir(entry.path) else files.add)(entry.name)  # entry.is_dir can raise
        if files & {"pyvenv.cfg", "jobs.sqlite3"}:  # a virtual environment; an app's own folder
            return media
        made = self._made(folder, files, set(folders))
        if made is not None:
            found.append(made)
            if made.kind != "run":
                return media
            folders = [name for name in folders if name in ("pipeline", "vae", "stopped")]
        lists = [] if made else sorted(name for name in files if name.endswith(LISTS) and _is_list(f"{folder}/{name}"))
        found += [self._place("videos", f"{folder}/{name}", "list of clips") for name in lists]
        if not made:
            media.files = sum(name.lower().endswith(MEDIA) for name in files)
            media.tars = sum(name.endswith(".tar") for name in files)
        direct = media.files + media.tars > 0
        media.partial = self._left <= 0 or (depth == DEPTH and len(folders) > 0)
        for name in sorted(folders) if depth < DEPTH else ():
            below = self._enter(f"{folder}/{name}", depth + 1, found)
            if below.files or below.tars:
                media.offered += 1
            media.files, media.tars = media.files + below.files, media.tars + below.tars
            media.partial |= below.partial
        # A folder whose media all lie in one folder below it would offer that one a second time.
        if not made and (direct or media.offered > 1):
            found.append(self._place("videos", folder, str(media)))
        return media if not made else _Media()

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if self._left <= 0:
                        return
                    self._left -= 1
                    if not entry.name.startswith(".") and entry.name not in SKIPPED:
                        yield entry
        except OSError:
            return  # not readable, or gone: nothing to offer

    def _made(self, folder: str, files: set[str], folders: set[str]) -> Asset | None:
        """What the folder is, where it is one thing."""
        if "model_index.json" in files:
            if _json(f"{folder}/model_index.json").get("_class_name") != "LVDMPipeline":
                return None
            step = _last_step(f"{os.path.dirname(folder)}/metrics.jsonl")
            named = re.fullmatch(r"step-(\d+)", os.path.basename(folder))
            step = int(named[1]) if named else step
            return self._place("pipeline", folder, "" if step is None else f"step {step}", _changed(folder))
        if "header.json" in files and _json(f"{folder}/header.json").get("format") == "odvae-latent-cache":
            return self._place("cache", folder, _told_of_cache(_json(f"{folder}/header.json")),
                               _changed(f"{folder}/header.json"))
        if "config.yaml" in files and ("metrics.jsonl" in files or "checkpoints" in folders):
            what = kind_of_run(Path(folder))
            step = _last_step(f"{folder}/metrics.jsonl")
            if what:
                return self._place("run", folder, f"{_RUNS[what]}, step {step or 0}", _changed(f"{folder}/config.yaml"))
        if "config.json" in files:
            config = _json(f"{folder}/config.json")
            if config.get("_class_name") == "AutoencoderKLODVAE" and any(name.endswith(".safetensors")
                                                                         for name in files):
                return self._place("vae", folder, f"{config.get('latent_channels')} channels", _changed(folder))
        return None


_RUNS = {"lvdm": "LVDM", "odvae": "OD-VAE"}


def kind_of_run(run: Path) -> Literal["lvdm", "odvae"] | None:
    """What a training trains, by its config; None where it is no config of ours."""
    try:
        with (run / "config.yaml").open(encoding="utf-8") as file:
            text = file.read(100_000)
    except (OSError, UnicodeDecodeError):
        return None
    keys = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    if not {"output", "model", "loop"} <= keys:
        return None
    return "lvdm" if "windows" in keys else "odvae" if "data" in keys else None


def _json(path: str) -> dict[str, object]:
    try:
        if os.path.getsize(path) > 2**20:
            return {}
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _changed(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _last_step(path: str) -> int | None:
    """The step on the last whole line of a training's log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _told_of_cache(header: dict[str, object]) -> str:
    try:
        transform, measured = cast(Any, header["transform"]), cast(Any, header.get("measured"))
        details = [_count(measured["clips"], "clip")] if measured else []
        details += [f"{height}x{width}" for height, width in transform["sizes"][:2]]
        return ", ".join([*details, f"{transform['frame_rate']:g} fps"])
    except (KeyError, TypeError, ValueError):
        return "its header is damaged"


def _is_list(path: str) -> bool:
    """Does the first row of a .csv or .jsonl name a file?"""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline(10_000)
        if path.endswith(".csv"):
            return any(name.strip() in NAMES_PATH for name in next(csv.reader([first]), []))
        row = json.loads(first)
    except (OSError, ValueError, csv.Error):
        return False
    return isinstance(row, dict) and any(name in row for name in NAMES_PATH)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
