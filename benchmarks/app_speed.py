"""How fast does the app start, and how fast does it respond while it generates videos? A server with the shipped
weights, which gets the page's requests while it generates ten videos.

    python benchmarks/app_speed.py [--videos 10]

Target: a page within 8 s of the start on two cores, no connection to another machine, responses within .2 s.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
from common import record, table

REQUEST = {"prompt": "a red circle moving left over a striped background", "seconds": 4}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--videos", type=int, default=10)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        server = subprocess.Popen([sys.executable, "-m", "app", "--port", str(port), "--data-dir", folder],
                                  cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        page = _first_answer(client) - begin
        while {worker["state"] for worker in client.get("/api/server").json()["workers"]} != {"ready"}:
            time.sleep(0.05)
        model = time.monotonic() - begin
        strangers = _remote_addresses(server.pid)
        begin = time.monotonic()
        ids = [client.post("/api/jobs", json=REQUEST | {"seed": seed}).json()["id"] for seed in range(args.videos)]
        latencies: dict[str, list[float]] = {}
        first = 0.0
        while True:
            for path in ("/", "/api/queue", "/api/jobs?limit=12", f"/api/jobs/{ids[0]}"):
                start = time.monotonic()
                response = client.get(path)
                latencies.setdefault(path.replace(ids[0], "ID"), []).append(time.monotonic() - start)
            states = [job["state"] for job in client.get("/api/jobs", params={"limit": 100}).json()]
            if not first and response.json()["result"].get("chunks"):
                first = time.monotonic() - begin
            if not set(states) & {"queued", "running"}:
                break
            strangers |= _remote_addresses(server.pid)
        whole = time.monotonic() - begin
        memory = sum(process.memory_info().rss for process in _processes(server.pid)) / 2**20
        server.terminate()
        server.wait(30)
    rows = [["the page answers after the start", f"{page:.1f} s"], ["the model is ready", f"{model:.1f} s"],
            ["first frames after a job is queued", f"{first:.2f} s"],
            [f"{args.videos} videos of 4.1 s", f"{whole:.1f} s"], ["server and worker", f"{memory:.0f} MiB"],
            ["connections to other machines", str(len(strangers))]]
    for path, seconds in latencies.items():
        text = f"{1e3 * statistics.median(seconds):.0f} ms, worst of {len(seconds)} {1e3 * max(seconds):.0f} ms"
        rows.append([f"GET {path}", text])
    table(["", ""], rows)
    record("app", {"videos": args.videos}, {
        "page_seconds": page, "model_seconds": model, "first_frames_seconds": first, "videos_seconds": whole,
        "mib": memory, "strangers": sorted(strangers),
        "answers": {path: [statistics.median(seconds), max(seconds)] for path, seconds in latencies.items()}})


def _first_answer(client: httpx.Client) -> float:
    while True:
        try:
            if client.get("/").status_code == 200:
                return time.monotonic()
        except httpx.HTTPError:
            time.sleep(0.02)


def _processes(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def _remote_addresses(pid: int) -> set[str]:
    """Return the addresses of other machines that the server or its worker is connected to."""
    addresses = {connection.raddr.ip for process in _processes(pid) for connection in process.net_connections("inet")
                 if connection.raddr}
    return addresses - {"127.0.0.1"}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "2"
    main()
