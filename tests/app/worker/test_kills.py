"""kill -9 of the server, the worker or both at any moment: no job is lost or repeated, no file is corrupt."""

from __future__ import annotations

import random

import httpx
import pytest
from safetensors.torch import load_file
from server_process import ServerProcess
from waiting import wait_for

from app.storage.jobs import JobKind, JobState
from app.storage.store import JobStore
from odvae.data.video.reader import VideoReader


@pytest.mark.parametrize(("kills", "jobs"), [(1, 1), pytest.param(20, 5, marks=pytest.mark.slow)])
def test_kills_lose_and_repeat_no_work_and_corrupt_no_file(tmp_path, pipeline_folder, harness, kills, jobs):
    harness.start_worker()
    references = [
        harness.wait(harness.submit(f"slowly {i}", seconds=4, num_inference_steps=3, seed=i)) for i in range(jobs)
    ]
    harness.stop_workers()
    expected = [load_file(harness.file(job, "final.safetensors"))["latents"] for job in references]

    rng, data = random.Random(kills), tmp_path / "killed"
    server = ServerProcess(data, pipeline_folder)
    store = JobStore(data / "jobs.sqlite3")
    rounds = -(-kills // 8)  # 15 steps a job, so some ten kills fit into five of them
    ids: list[str] = []
    done_kills = 0
    for _ in range(rounds):
        for i in range(jobs):
            answer = httpx.post(
                server.url + "/api/jobs",
                json={"prompt": f"slowly {i}", "seconds": 4, "num_inference_steps": 3, "seed": i},
            )
            ids.append(answer.json()["id"])
        while done_kills < kills and store.find(states=[JobState.QUEUED, JobState.RUNNING]):
            target = rng.uniform(0, 1)

            def far(target: float = target) -> bool:
                running = store.find(states=[JobState.RUNNING])
                return bool(running and running[0].progress.fraction >= target) or not store.find(
                    states=[JobState.QUEUED, JobState.RUNNING])

            wait_for(far, "the job is so far")
            server.kill(rng.choice(["server", "worker", "both"]))
            done_kills += 1
            if server.process.poll() is not None:
                server = ServerProcess(data, pipeline_folder)
        wait_for(lambda: not store.find(states=[JobState.QUEUED, JobState.RUNNING]), "all end", 300)
    assert done_kills == kills, "there was work enough for all the kills"
    for number, job_id in enumerate(ids):
        job = store.get(job_id)
        assert job is not None and job.state is JobState.DONE and job.kind is JobKind.GENERATE, (job.state, job.error)
        folder = data / "jobs" / job_id
        assert {path.name for path in folder.iterdir()} - {"chunks", "preview.webp"} == {
            "final.mp4", "final.safetensors", "log.txt", "params.json", "poster.webp"}
        assert (folder / "log.txt").read_text().count("done after") == 1
        assert load_file(folder / "final.safetensors")["latents"].equal(expected[number % jobs])
        with VideoReader(folder / "final.mp4") as video:
            assert sum(len(chunk) for chunk in video.iter_chunks()) == 33
    assert sorted(path.name for path in (data / "jobs").iterdir()) == sorted(ids)
    server.stop()


@pytest.mark.slow
def test_a_job_that_crashes_its_worker_fails_and_others_run(tmp_path, pipeline_folder):
    server = ServerProcess(tmp_path / "data", pipeline_folder)
    settings = {"seconds": 2, "num_inference_steps": 2, "seed": 1}
    ids = [httpx.post(server.url + "/api/jobs", json=settings | {"prompt": prompt}).json()["id"]
           for prompt in ("crashes", "crashes once", "red")]
    store = JobStore(tmp_path / "data" / "jobs.sqlite3")
    wait_for(lambda: not store.find(states=[JobState.QUEUED, JobState.RUNNING]), "all end", 300)
    crashed, once, good = map(store.get, ids)
    assert crashed.state is JobState.FAILED and "The worker crashed" in crashed.error and "memory" in crashed.advice
    assert once.state is JobState.DONE and good.state is JobState.DONE
    server.stop()
    assert server.process.returncode == 0
