"""What runs on a GPU, on a machine without one: the checks of `inference_checks` and `training_checks`, in one process
with a simulated device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulated_cuda import device

pytestmark = pytest.mark.xdist_group("simulated cuda")  # one process runs all checks
NAMES = ("memory", "history", "pipeline", "denoising_steps", "offload", "autoencoder", "encoders", "cache_build",
         "vae_training", "lvdm_training", "captions", "evaluation", "lvdm_evaluation")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a file for each check that was selected."""
    if device.compiler() is None:
        reason = "the simulated device is compiled with g++, which is not installed (apt-get install g++)"
        pytest.fail(reason) if os.environ.get("ODVAE_REQUIRE_ALL") == "1" else pytest.skip(reason)
    names = [item.callspec.params["name"] for item in request.session.items
             if item.path == request.path and isinstance(item, pytest.Function)]
    folder = tmp_path_factory.mktemp("simulated")
    paths = os.pathsep.join([str(device.ROOT), str(device.ROOT / "tests")])
    process = subprocess.run(
        [sys.executable, "-m", "simulated_cuda", str(device.build()), str(folder), *names], capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert len(list(folder.glob("*.json"))) == len(names), process.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_on_the_simulated_device(results: Path, name: str) -> None:
    result = json.loads((results / f"{name}.json").read_text())
    assert not result["failure"], result["failure"]
