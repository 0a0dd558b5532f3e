"""Scan a folder for assets: folders of videos, caches, runs, pipelines, VAEs and LoRAs that users may pick."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lvdm.adapter_files import DEFAULT_NAME, read_lora_header
from lvdm.capabilities import PIPELINES, class_name

AssetKind = Literal["videos", "cache", "pipeline", "vae", "run", "lora"]

MAX_DEPTH = 5  # levels of folders below a root
MAX_ENTRIES = 50_000  # of all folders below a root together
SKIPPED = {"node_modules", "__pycache__", "site-packages"}
# Copies of the lists in odvae.data, which takes a second to import; a test keeps them equal.
MEDIA_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".wmv", ".flv",
                    ".3gp", ".gif", ".apng", ".png", ".jpg", ".jpeg", ".webp", ".bmp")  # fmt: skip
MANIFEST_EXTENSIONS = (".jsonl", ".csv")
PATH_COLUMNS = ("path", "file_name")


@dataclass(frozen=True)
class Asset:
    """A file or folder that may be picked."""

    id: str  # a hash of its absolute path
    kind: AssetKind
    name: str  # the path below its root; if there are several roots, with the root's name
    path: Path
    detail: str  # a description in a few words
    time: float = 0.0  # of its last change, in seconds since 1970; 0 if that is meaningless


ASSET_LABELS = {"videos": "folder of videos", "cache": "cache", "pipeline": "pipeline", "vae": "VAE", "run": "training",
                "lora": "LoRA"}
assert set(ASSET_LABELS) == set(get_args(AssetKind))


def asset_id(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


@dataclass
class _MediaCount:
    """The media in a folder and in the folders below it."""

    files: int = 0
    tars: int = 0
    folders: int = 0  # folders directly below it that hold media
    partial: bool = False  # there may be more

    def __str__(self) -> str:
        more = " or more" if self.partial else ""
        return _count(self.tars, "tar") + more if self.tars else _count(self.files, "file") + more


class DirectoryScanner:
    """One scan of one root."""

    def __init__(self, root: Path, roots: Sequence[Path]) -> None:
        self.root = root
        # A root inside another root is scanned on its own, deeper; its assets are named relative to the outer one.
        outer = [path for path in roots if not any(path != other and path.is_relative_to(other) for other in roots)]
        self._base = next(path for path in outer if root.is_relative_to(path))
        self._prefix = self._base.name + "/" if len(outer) > 1 else ""
        self._real_roots = [os.path.realpath(path) for path in roots]
        # A link from a root back to an outer root leads nowhere new.
        self._seen = {os.path.realpath(path) for path in roots if path != root and root.is_relative_to(path)}
        self._entries_left = MAX_ENTRIES

    def scan(self) -> list[Asset]:
        """Return the assets below the root."""
        assets: list[Asset] = []
        self._scan_folder(str(self.root), 0, assets)
        return assets

    def _asset(self, kind: AssetKind, path: str, detail: str, changed: float = 0.0) -> Asset:
        below = os.path.relpath(path, self._base)
        name = f"{self._prefix}{below}" if below != "." else self._base.name or str(self._base)
        return Asset(asset_id(Path(path)), kind, name, Path(path), detail, changed)

    def _scan_folder(self, folder: str, depth: int, assets: list[Asset]) -> _MediaCount:
        """Add the assets of a folder and return the media that belong to no other asset."""
        media = _MediaCount()
        real = os.path.realpath(folder)
        if real in self._seen or not any(os.path.commonpath([real, root]) == root for root in self._real_roots):
            return media
        self._seen.add(real)
        files: set[str] = set()
        folders: list[str] = []
        for entry in self._entries(folder):
            (folders.append if os.path.isdir(entry.path) else files.add)(entry.name)  # entry.is_dir can raise
        if files & {"pyvenv.cfg", "jobs.sqlite3"}:  # a virtual environment; an app's own folder
            return media
        asset = self._identify(folder, files, set(folders))
        if asset is not None:
            assets.append(asset)
            if asset.kind not in ("run", "pipeline"):
                return media
            inside = ("pipeline", "vae", "stopped", "lora") if asset.kind == "run" else ("lora",)
            folders = [name for name in folders if name in inside]
        else:
            assets += self._loras(folder, files)
            manifests = sorted(name for name in files if _is_manifest(f"{folder}/{name}"))
            assets += [self._asset("videos", f"{folder}/{name}", "list of clips") for name in manifests]
            media.files = sum(name.lower().endswith(MEDIA_EXTENSIONS) for name in files)
            media.tars = sum(name.endswith(".tar") for name in files)
        has_own_media = media.files + media.tars > 0
        media.partial = self._entries_left <= 0 or (depth == MAX_DEPTH and len(folders) > 0)
        for name in sorted(folders) if depth < MAX_DEPTH else ():
            below = self._scan_folder(f"{folder}/{name}", depth + 1, assets)
            if below.files or below.tars:
                media.folders += 1
            media.files, media.tars = media.files + below.files, media.tars + below.tars
            media.partial |= below.partial
        if asset is not None:
            return _MediaCount()
        # A folder whose media all lie in one folder below it would offer the same media twice.
        if has_own_media or media.folders > 1:
            assets.append(self._asset("videos", folder, str(media)))
        return media

    def _loras(self, folder: str, files: set[str]) -> Iterator[Asset]:
        """The adapters in a folder; one with diffusers' default name is named after its folder."""
        for name in sorted(name for name in files if name.endswith(".safetensors")):
            path = f"{folder}/{name}"
            if header := read_lora_header(Path(path)):
                asset = self._asset("lora", path, f"rank {header.rank}", _modified(path))
                short = asset.name.removesuffix(f"/{DEFAULT_NAME}").removesuffix(".safetensors")
                yield replace(asset, name=short)

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if self._entries_left <= 0:
                        return
                    self._entries_left -= 1
                    if not entry.name.startswith(".") and entry.name not in SKIPPED:
                        yield entry
        except OSError:
            return  # not readable, or gone

    def _identify(self, folder: str, files: set[str], folders: set[str]) -> Asset | None:
        """Return the folder as a pipeline, cache, run or VAE; None if it is none of these."""
        if "model_index.json" in files:
            kind = class_name(_json(f"{folder}/model_index.json"))
            if kind not in PIPELINES:
                return None
            if kind != "LVDMPipeline":
                return self._asset("pipeline", folder, str(kind), _modified(folder))
            step = _last_step(f"{os.path.dirname(folder)}/metrics.jsonl")
            match = re.fullmatch(r"step-(\d+)", os.path.basename(folder))
            step = int(match[1]) if match else step
            return self._asset("pipeline", folder, "" if step is None else f"step {step}", _modified(folder))
        if "header.json" in files and _json(f"{folder}/header.json").get("format") == "odvae-latent-cache":
            return self._asset("cache", folder, _describe_cache(_json(f"{folder}/header.json")),
                               _modified(f"{folder}/header.json"))
        if "config.yaml" in files and ("metrics.jsonl" in files or "checkpoints" in folders):
            model = run_model(Path(folder))
            step = _last_step(f"{folder}/metrics.jsonl")
            if model:
                detail = f"{_MODEL_LABELS[model]}, step {step or 0}"
                return self._asset("run", folder, detail, _modified(f"{folder}/config.yaml"))
        if "config.json" in files:
            config = _json(f"{folder}/config.json")
            if config.get("_class_name") == "AutoencoderKLODVAE" and any(name.endswith(".safetensors")
                                                                         for name in files):
                return self._asset("vae", folder, f"{config.get('latent_channels')} channels", _modified(folder))
        return None


_MODEL_LABELS = {"lvdm": "LVDM", "odvae": "OD-VAE"}


def run_model(run: Path) -> Literal["lvdm", "odvae"] | None:
    """Return which model a run trains, by its config; None if it is no config of ours."""
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
            value = json.load(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _last_step(path: str) -> int | None:
    """Return the step on the last complete line of a run's log."""
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


def _describe_cache(header: dict[str, object]) -> str:
    try:
        transform, measured = cast(Any, header["transform"]), cast(Any, header.get("measured"))
        details = [_count(measured["clips"], "clip")] if measured else []
        details += [f"{height}x{width}" for height, width in transform["sizes"][:2]]
        return ", ".join([*details, f"{transform['frame_rate']:g} fps"])
    except (KeyError, TypeError, ValueError):
        return "damaged header"


def _is_manifest(path: str) -> bool:
    """Whether the first row of a .csv or .jsonl names a file."""
    if not path.endswith(MANIFEST_EXTENSIONS):
        return False
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline(10_000)
        if path.endswith(".csv"):
            return any(name.strip() in PATH_COLUMNS for name in next(csv.reader([first]), []))
        row = json.loads(first)
    except (OSError, ValueError, csv.Error):
        return False
    return isinstance(row, dict) and any(name in row for name in PATH_COLUMNS)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
