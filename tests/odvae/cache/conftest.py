"""Fixtures of the tests of latent caches. Modules that need other videos override `videos`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_cache import write_noise


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
