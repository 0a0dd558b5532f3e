"""Memory and disk stay level over many jobs."""

from __future__ import annotations

import httpx
import pytest
from server_process import ServerProcess
from waiting import wait_for

from app.storage.jobs import JobState
from app.storage.store import JobStore

MIB = 2**20


@pytest.mark.slow
def test_many_jobs_leave_memory_and_disk_level(tmp_path, pipeline_folder):
    count, limit = 200, 2 * MIB  # room for some twenty of these videos
    server = ServerProcess(tmp_path / "data", pipeline_folder, max_disk=limit)
    store = JobStore(tmp_path / "data" / "jobs.sqlite3")
    memory: list[int] = []
    for number in range(count):
        settings = {"prompt": f"red {number}", "seconds": 3, "num_inference_steps": 2, "seed": number,
                    "width": 32 + 32 * (number % 2)}
        job = httpx.post(server.url + "/api/jobs", json=settings).json()["id"]
        wait_for(lambda job=job: store.get(job) is None or store.get(job).state.ended, "the job ends")
        found = store.get(job)
        assert found is not None and found.state is JobState.DONE, found
        worker = server.worker()
        memory.append(worker.memory_info().rss + server.process_memory())
    assert server.worker() is not None
    growth = (max(memory[-5:]) - max(memory[20:25])) / MIB
    assert growth < 48, f"{growth:.0f} MiB more after {count} jobs"
    taken = sum(path.stat().st_size for path in (tmp_path / "data" / "jobs").glob("**/*")
                if path.is_file() and path.parent.name != "chunks")  # those go soon after a video's end
    assert taken < limit + MIB, "the oldest go when there is no room"
    assert len(store.find(limit=-1)) < count
    server.stop()
