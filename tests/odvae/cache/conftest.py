"""Fixtures of the tests of latent caches. Modules that need other videos override `videos`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_cache import NUMBERED, SMALL_SHARDS, tiny_vae, write_noise

from odvae.cache import build_cache


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven videos of 5 frames."""
    folder = tmp_path_factory.mktemp("videos")
    for k in range(7):
        write_noise(folder / f"clip_{k}.mp4", k)
    return folder


@pytest.fixture
def source(videos: Path, tmp_path: Path) -> Path:
    """The videos, to be changed by one test."""
    return Path(shutil.copytree(videos, tmp_path / "source"))


@pytest.fixture(scope="session")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos with a caption each, "caption 0" and so on. Not to be changed."""
    folder = tmp_path_factory.mktemp("numbered")
    for k in range(NUMBERED):
        write_noise(folder / f"clip_{k}.mp4", k).with_suffix(".txt").write_text(f"caption {k}")
    return folder


@pytest.fixture(scope="session")
def partitioned(numbered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of these in four partitions. Not to be changed."""
    cache = tmp_path_factory.mktemp("partitioned") / "cache"
    build_cache(numbered, cache, tiny_vae(), partitions=4, **SMALL_SHARDS)
    return cache
