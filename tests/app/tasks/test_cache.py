"""Cache jobs: validation, dry runs, inspection, and a build that is stopped and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image
from task_harness import TaskHarness
from waiting import TIMEOUT, has_ended, wait_for

from app.storage.jobs import JobKind, JobSignal, JobState
from app.tasks.cache import validate
from app.tasks.run_command import CommandError, run_command
from odvae import AutoencoderKLODVAE
from odvae.cache import LatentCache, build_cache
from odvae.inference.loading import load_vae
from odvae.utils.errors import UserError


@pytest.fixture(scope="module")
def slow_vae(tmp_path_factory) -> Path:
    """A VAE that takes a moment for each clip, so that a build can be stopped."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vaes") / "slow"
    vae = AutoencoderKLODVAE(block_out_channels=(16, 16, 16, 32), layers_per_block=1, norm_num_groups=4)
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path, clips, slow_vae, cache) -> TaskHarness:
    return TaskHarness(tmp_path, clips, tmp_path / "videos", slow_vae.parent, cache.parent, tmp_path / "made")


def test_a_stopped_and_resumed_build_equals_an_uninterrupted_one(tasks, clips, slow_vae, tmp_path):
    videos = tmp_path / "videos"  # eight clips, and one that cannot be read
    videos.mkdir()
    for clip in sorted(clips.glob("*.mp4"))[:8]:
        shutil.copy(clip, videos)
    (videos / "broken.mp4").write_bytes(b"no video")
    job = tasks.submit(JobKind.CACHE, name="mine", source=tasks.asset("videos", videos),
                        vae=tasks.asset("vae", slow_vae), sizes=[[48, 48]], frames=[33], shard_clips=1, batch=1)
    assert job.title == "Build mine" and validate(job.params, tasks.services, "") == (job.params, job.title)

    def stop_after_one(context, changes):
        found = context.services.store.get(context.job.id)
        if found.result.get("shards", 0) >= 1:
            context.services.store.signal(context.job.id, JobSignal.STOP)

    made = tmp_path / "made/caches/mine"
    stopped = tasks.run(stop_after_one)
    assert stopped.state is JobState.STOPPED and 1 <= stopped.result["clips"] < 8
    kept = {path.name: path.stat().st_mtime_ns for path in made.glob("partitions/*/*.safetensors")}
    tasks.service.resume(job.id, "")
    phases = set()
    done = tasks.run(lambda context, changes: phases.add(changes.get("phase")))
    (videos / "broken.mp4").unlink()
    assert done.state is JobState.DONE and "encode" in phases
    folder = made / "partitions/00000"  # nothing in it is written again
    assert all((folder / name).stat().st_mtime_ns == time for name, time in kept.items())

    build_cache(videos, tmp_path / "whole", load_vae(slow_vae).eval(), sizes=[(48, 48)], shard_clips=1, batch=1)
    one, other = LatentCache(made), LatentCache(tmp_path / "whole")
    assert sorted(one.ids) == sorted(other.ids)
    assert all(one.entry(one.ids.index(name)).equal(other.entry(other.ids.index(name))) for name in other.ids)

    result = done.result
    assert result["clips"] == 8 and result["frames"] == 264 and result["raw_bytes"] == 264 * 48 * 48 * 3
    assert result["ratio"] == result["raw_bytes"] / result["bytes"] and result["frames_per_second"] > 0
    assert sum(count for _, count in result["rejected"]) == 1 and "broken.mp4" in result["rejects"][0]["reason"]
    assert "8 clips" in result["stats"][0]
    log = (tasks.services.job_files.folder(job) / "log.txt").read_text()
    assert "$ odvae cache build" in log and "clips encoded" in log
    with Image.open(tasks.services.job_files.folder(job) / "sheet.webp") as sheet:
        assert sheet.format == "WEBP" and sheet.width > 4 * 48
    # The same job may be queued again: it resumes. Another job may not have the same name.
    tasks.service.duplicate(job.id, "")
    with pytest.raises(UserError, match="mine is already queued or running"):
        tasks.submit(JobKind.CACHE, **{**job.params, "frames": [17]})


def test_a_dry_run_only_reports(tasks, clips, tmp_path):
    tasks.submit(JobKind.CACHE, source=tasks.asset("videos", clips), name="later", dry_run=True, sizes=[[32, 32]])
    done = tasks.run()
    assert any("33x32x32" in line for line in done.result["report"])
    assert done.result["report"][-1].startswith("to encode: 10 clips") and "clips" not in done.result
    assert tasks.submit(JobKind.CACHE, source=tasks.asset("videos", clips), name="later")  # the name is still free


def test_inspect_a_cache_with_its_own_vae(tasks, cache, vae_folder, tmp_path):
    asset = tasks.asset("cache", cache)
    tasks.submit(JobKind.CACHE, inspect=True, cache=asset)
    with pytest.raises(UserError, match=r"The VAE of cache .* is not below the app\'s folders"):
        tasks.run()
    tasks = TaskHarness(tmp_path / "second", cache.parent, vae_folder)
    tasks.submit(JobKind.CACHE, inspect=True, cache=asset)
    done = tasks.run()
    assert done.title == f"Inspect {cache.parent.name}/cache" and done.result["clips"] == 10 and done.result["sheet"]


def test_what_is_refused(tasks, clips, cache):
    source, old = tasks.asset("videos", clips), tasks.asset("cache", cache)
    for raw, message in [
        ({}, "Pick a folder of videos"),
        ({"source": source}, "a name"),
        ({"source": source, "name": "a", "cache": old}, "not both"),
        ({"source": "../../etc", "name": "a"}, "no such folder of videos"),
        ({"source": old, "name": "a"}, "no such folder of videos"),
        ({"source": source, "name": "../a"}, "The name must"),
        ({"source": source, "name": "a", "vae": "/etc"}, "no such VAE"),
        ({"source": source, "name": "a", "frames": [32]}, r"1 \+ 4k frames, such as 29 or 33"),
        ({"source": source, "name": "a", "sizes": [[60, 64]]}, "multiple of 8"),
        ({"source": source, "name": "a", "sizes": [[64, 64]] * 99}, "at most 8"),
        ({"source": source, "name": "a", "frame_rate": float("nan")}, "frame_rate"),
        ({"source": source, "name": "a", "frame_rate": float("inf")}, "frame_rate"),
        ({"source": source, "name": "a", "clips": "every:0"}, "must be back-to-back"),
        ({"source": source, "name": "a", "clips": "uniform:2; rm -rf /"}, "must be back-to-back"),
        ({"source": source, "name": "a", "batch": 10**9}, "batch"),
        ({"source": source, "name": "a", "shardclips": 3}, "unknown key"),
        ({"source": source, "name": "x" * 10**6}, "name"),
        ({"source": source, "cache": old, "frame_rate": 4}, "was built with frame rate 8.0, not 4.0"),
        ({"inspect": True}, "Pick the cache to inspect"),
    ]:
        with pytest.raises(UserError, match=message) as found:
            tasks.submit(JobKind.CACHE, **raw)
        assert len(str(found.value)) < 500
    params = tasks.submit(JobKind.CACHE, source=source, cache=old).params
    assert (params["sizes"], params["frames"], params["store"]) == ([[32, 32]], [33], "mean")


def test_a_user_error_of_the_command_is_the_error_of_the_job(tasks, clips, cache, slow_vae):
    """The cache was built with another VAE."""
    job = tasks.submit(JobKind.CACHE, source=tasks.asset("videos", clips), cache=tasks.asset("cache", cache),
                        vae=tasks.asset("vae", slow_vae))
    with pytest.raises(UserError, match=r"was built with another VAE or transform .*build into another folder"):
        tasks.run()
    assert "error: " in (tasks.services.job_files.folder(job) / "log.txt").read_text()


@pytest.mark.parametrize(("code", "error", "message"), [
    ("sys.exit('error: the VAE gave NaN')", UserError, r"^the VAE gave NaN$"),
    ("sys.stderr.write('error: no such folder\\n'); sys.exit(2)", UserError, r"^no such folder$"),
    ("raise MemoryError('CPU out of memory')", UserError, "not enough memory"),
    ("sys.exit(3)", CommandError, "failed with exit status 3"),
    ("os.kill(os.getpid(), 9)", CommandError, "killed by signal 9.* may have run out of memory"),
])  # fmt: skip
def test_the_outcome_of_a_command_is_reported(tasks, tmp_path, monkeypatch, code, error, message):
    (tmp_path / "ending.py").write_text(f"import os, sys\nprint('said')\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    context = SimpleNamespace(folder=tmp_path, report_progress=lambda **changes: None, log=lambda line: None,
                              models=SimpleNamespace(unload=lambda: None, device=torch.device("cpu")))
    with pytest.raises(error, match=message):
        run_command(context, "ending", [])


def test_the_child_ends_with_the_worker(tmp_path):
    """A worker that is killed while its command runs takes the command with it."""
    (tmp_path / "endless.py").write_text("import time\nprint('started', flush=True)\ntime.sleep(1000)\n")
    worker = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(tmp_path)!r}]
from pathlib import Path
from types import SimpleNamespace
from app.tasks import run_command
run_command.PRELOADED_MODULES = ()
context = SimpleNamespace(folder=Path({str(tmp_path)!r}), report_progress=lambda **changes: None,
                          log=lambda line: print(line, flush=True),
                          models=SimpleNamespace(unload=lambda: None, device=SimpleNamespace(type="cpu")))
run_command.run_command(context, "endless", [])
"""
    process = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parents[3])
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["$ endless", "started"]
    started = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(TIMEOUT)
    assert len(started) >= 2, "the command, and what it was forked from"
    wait_for(lambda: all(map(has_ended, started)), "they end")
