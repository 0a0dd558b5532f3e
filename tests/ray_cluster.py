"""A cluster of Ray on this machine, with two CPUs; a missing ray skips a test, or fails it if ODVAE_REQUIRE_ALL is
set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


def start_cluster() -> Iterator[Any]:
    """Yield the module ray, connected to a cluster, for a fixture: `yield from start_cluster()`."""
    if os.environ.get("ODVAE_REQUIRE_ALL") != "1":
        pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        from odvae.cache.build.executors.ray_actors import WORKER_NICENESS

        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20,
                 log_to_driver=False, logging_level="ERROR",
                 _system_config={"worker_niceness": WORKER_NICENESS})  # Ray's own starves them beside other tests
        yield ray
        ray.shutdown()
