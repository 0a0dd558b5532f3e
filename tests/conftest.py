"""Fixtures shared by all tests: rendered clips, a tiny VAE and a tiny cache, created once per session."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # a run of all tests
    from processes import preload_fork_server

    preload_fork_server()

LONGEST = ("test_browser.py", "test_kills.py", "test_distributed.py", "test_sharded_checkpoints.py",
           "test_executors.py")  # modules


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest modules first, so that at the end no worker waits for another."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Exempt what the imports made from garbage collections, which a training starts at every evaluation."""
    gc.collect()
    gc.freeze()


TINY_VAE = {"block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4, "patch_size": 2}


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten captioned clips of 33 frames at 32x32."""
    from odvae.data.synthetic import write_rendered

    folder = tmp_path_factory.mktemp("clips")
    write_rendered(folder, 10, frames=33, size=32, seed=5)
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OD-VAE with random weights, saved."""
    from odvae import AutoencoderKLODVAE

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKLODVAE(**TINY_VAE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cache(clips: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips, encoded."""
    from odvae.cache.build.builder import build_cache
    from odvae.inference.loading import load_vae

    folder = tmp_path_factory.mktemp("cached") / "cache"
    build_cache(clips, folder, load_vae(vae_folder).eval(), sizes=[(32, 32)])
    return folder
