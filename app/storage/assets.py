"""The catalog of assets: videos, caches, runs, pipelines, VAEs and LoRAs below the roots.

Clients never send a path: an asset is offered under an id, and an id is valid only while a scan of the roots finds it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from app.storage.asset_scanner import ASSET_LABELS, Asset, AssetKind, DirectoryScanner, asset_id
from odvae.utils.errors import UserError
from odvae.weights import DEMO_VAE

SCAN_LIFETIME = 5.0  # seconds for which the result of a scan is reused
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


class AssetCatalog:
    """The assets below `roots`. Cheap to create; may be used in any thread."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [Path(os.path.abspath(root)) for root in roots]
        self._lock = threading.Lock()
        self._assets: Sequence[Asset] = []
        self._scanned_at = -SCAN_LIFETIME  # on the monotonic clock

    def list(self, kind: AssetKind) -> Sequence[Asset]:
        """Return the assets of a kind: caches, runs, pipelines and LoRAs newest first, the others by name."""
        return [asset for asset in self._scan(SCAN_LIFETIME) if asset.kind == kind]

    def find(self, asset_id: str, kind: AssetKind) -> Path:
        """Return the path of an asset. Raises UserError if there is none of that id and kind."""
        return self.get(asset_id, kind).path

    def get(self, asset_id: str, kind: AssetKind) -> Asset:
        """Return an asset. Raises UserError if there is none of that id and kind."""
        for max_age in (SCAN_LIFETIME, 1.0):  # it may be brand new; wrong ids cause at most one scan per second
            for asset in self._scan(max_age):
                if asset.id == asset_id and asset.kind == kind and asset.path.exists():
                    return asset
        raise UserError(f"There is no such {ASSET_LABELS[kind]} here any more. Refresh the list and pick one from it.")

    def invalidate(self) -> None:
        """Scan again at the next request: something was created."""
        with self._lock:
            self._scanned_at = -SCAN_LIFETIME

    def reserve_path(self, kind: Literal["cache", "run"], name: str, workspace: Path) -> Path:
        """Return the path of a new cache or run: WORKSPACE/caches/NAME or WORKSPACE/runs/NAME.

        Raises:
            UserError: the name is invalid or taken. The files that a cache's dry run leaves do not count.
        """
        if not NAME.fullmatch(name):
            raise UserError("The name must begin with a letter or digit, followed by at most 59 letters, digits, dots, "
                            "- and _.")
        path = Path(os.path.abspath(workspace)) / f"{kind}s" / name
        ignored = {"work", "partitions"} if kind == "cache" else set()
        if os.path.lexists(path) and not (path.is_dir() and {entry.name for entry in path.iterdir()} <= ignored):
            raise UserError(f"There is a {ASSET_LABELS[kind]} named {name} already. Choose another name, or pick the "
                            f"existing one to resume it.")
        return path

    def _scan(self, max_age: float) -> Sequence[Asset]:
        with self._lock:
            if time.monotonic() - self._scanned_at >= max_age:
                assets = {asset.path: asset for root in self.roots
                          for asset in DirectoryScanner(root, self.roots).scan()}
                if DEMO_VAE not in assets:
                    detail = "8 channels, shipped; the shipped LVDM uses it"
                    assets[DEMO_VAE] = Asset(asset_id(DEMO_VAE), "vae", "demo", DEMO_VAE, detail)
                self._assets = sorted(assets.values(), key=_order)
                self._scanned_at = time.monotonic()
            return self._assets


def _order(asset: Asset) -> tuple[float, str]:
    return (-asset.time if asset.kind in ("cache", "run", "pipeline", "lora") else 0.0, asset.name)
