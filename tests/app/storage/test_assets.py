"""Assets lie below the roots, and an id leads nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.storage.assets import AssetCatalog
from odvae.utils.errors import UserError

CACHE = {"format": "odvae-latent-cache", "version": 2, "measured": {"clips": 3},
         "transform": {"sizes": [[64, 64]], "frame_rate": 8.0, "frames": [33]}}


@pytest.fixture
def root(tmp_path) -> Path:
    """Videos, a cache, two runs, and files that must not be listed."""
    def write(name: str, text: str = "x") -> None:
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    for name in ("videos/cats/a.mp4", "videos/cats/b.png", "videos/dogs/c.MOV", "shards/one/0.tar", "lists/notes.csv",
                 ".hidden/a.mp4", "venv/pyvenv.cfg", "venv/a.mp4", "app/jobs.sqlite3", "app/jobs/0/final.mp4",
                 "node_modules/a.mp4", "a/b/c/d/e/f/too_deep.mp4"):
        write(name)
    write("lists/clips.jsonl", json.dumps({"path": "a.mp4"}) + "\n")
    write("caches/one/header.json", json.dumps(CACHE))
    write("caches/broken/header.json", json.dumps({"format": "odvae-latent-cache", "transform": {"sizes": 3}}))
    for run, step in ("old", 200), ("new", 1000):
        write(f"runs/{run}/config.yaml", "output: x\nwindows:\n  a: 1\nmodel: {}\nloop: {}\n")
        write(f"runs/{run}/metrics.jsonl", f'{{"step": {step}, "loss": 1}}\n{{"step": {step + 1}, "lo')
        write(f"runs/{run}/samples/step-000200.png")
        write(f"runs/{run}/pipeline/model_index.json", json.dumps({"_class_name": ["pipeline", "LVDMPipeline"]}))
    write("runs/other/model_index.json", json.dumps({"_class_name": "StableDiffusionPipeline"}))
    write("vaes/mine/config.json", json.dumps({"_class_name": "AutoencoderKLODVAE", "latent_channels": 16}))
    write("vaes/mine/model.safetensors")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.mp4").write_text("x")
    (tmp_path / "root/link").symlink_to(outside)
    (tmp_path / "root/videos/loop").symlink_to(tmp_path / "root")
    return tmp_path / "root"


def details(catalog: AssetCatalog, kind: str) -> dict[str, str]:
    return {asset.name: asset.detail for asset in catalog.list(kind)}


def test_catalog_lists_assets_with_details(root):
    os.utime(root / "runs/old/pipeline", (1, 1))
    catalog = AssetCatalog([root])
    assert details(catalog, "videos") == {"root": "1 tar or more", "shards/one": "1 tar", "videos": "3 files",
                                      "lists/clips.jsonl": "list of clips", "videos/cats": "2 files",
                                      "videos/dogs": "1 file"}
    assert details(catalog, "cache") == {"caches/one": "3 clips, 64x64, 8 fps", "caches/broken": "damaged header"}
    assert list(details(catalog, "pipeline").items()) == [("runs/new/pipeline", "step 1000"),
                                                      ("runs/old/pipeline", "step 200")]
    assert details(catalog, "run") == {"runs/new": "LVDM, step 1000", "runs/old": "LVDM, step 200"}
    assert details(catalog, "vae")["vaes/mine"] == "16 channels" and "demo" in details(catalog, "vae")


def test_ids_are_stable_and_lead_nowhere_else(root):
    catalog = AssetCatalog([root])
    cats = next(asset for asset in catalog.list("videos") if asset.name == "videos/cats")
    assert catalog.find(cats.id, "videos") == root / "videos/cats"
    # A root within another changes no name; another root does.
    assert details(AssetCatalog([root, root / "videos"]), "videos") == details(catalog, "videos")
    assert "root/videos/cats" in details(AssetCatalog([root, root.parent / "elsewhere"]), "videos")
    assert AssetCatalog([root]).find(cats.id, "videos") == cats.path  # in another process too
    for wrong in ("", "..", "/etc", str(cats.path), cats.id.upper() + "0", "\0", "x" * 10_000):
        with pytest.raises(UserError, match="no such folder of videos"):
            catalog.find(wrong, "videos")
    with pytest.raises(UserError, match="no such cache"):
        catalog.find(cats.id, "cache")
    every = [asset.path for kind in ("videos", "cache", "pipeline", "run") for asset in catalog.list(kind)]
    assert all(path.resolve().is_relative_to(root) for path in every)
    (root / "videos/cats").rename(root / "videos/lions")
    with pytest.raises(UserError):
        catalog.find(cats.id, "videos")


def test_names_of_new_assets(root, tmp_path):
    catalog, workspace = AssetCatalog([root]), tmp_path / "work"
    assert catalog.reserve_path("cache", "a-1_b.c", workspace) == workspace / "caches/a-1_b.c"
    for wrong in ("", ".", "..", "../up", "a/b", "a\\b", "/etc", ".hidden", "a" * 61, "a b", "ä", "a\n", "-x"):
        with pytest.raises(UserError, match="The name must"):
            catalog.reserve_path("run", wrong, workspace)
    (workspace / "caches/dry/work").mkdir(parents=True)
    assert catalog.reserve_path("cache", "dry", workspace)  # of which only a dry run has message
    (workspace / "caches/dry/header.json").touch()
    with pytest.raises(UserError, match="already"):
        catalog.reserve_path("cache", "dry", workspace)
    (workspace / "runs").mkdir()
    (workspace / "runs/gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already"):
        catalog.reserve_path("run", "gone", workspace)


def test_scanning_imports_no_torch_and_knows_the_extensions_of_odvae():
    code = "import sys, app.storage.assets, app.tasks.cache, app.tasks.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
    from app.storage.asset_scanner import MANIFEST_EXTENSIONS, MEDIA_EXTENSIONS, PATH_COLUMNS
    from odvae.data import files, manifests
    assert set(MEDIA_EXTENSIONS) == {*files.VIDEO_EXTENSIONS, *files.IMAGE_EXTENSIONS}
    assert set(MANIFEST_EXTENSIONS) <= set(manifests.READERS)
    assert manifests.DEFAULT_NAMES["path"] == PATH_COLUMNS
