"""Context parallelism: a clip's tokens spread over processes, by diffusers' hooks."""

import pytest
from processes import run_forked


@pytest.mark.parametrize("processes", [2])
def test_a_clip_spread_over_processes_has_the_same_velocity_history_and_gradient(tmp_path, processes):
    run_forked("tiny_context_parallel", log=tmp_path / "log", count=processes)
