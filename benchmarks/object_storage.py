"""What object storage costs a cache build: CPU seconds a clip with source and cache on S3 (moto's server on loopback,
in a process of its own) against local ones, and an outage of the store in the middle.

    python benchmarks/object_storage.py [--clips 48] [--outage 20]

Needs moto, flask, flask-cors and s3fs. Builds run in processes of their own; the CPU time of a build that has nothing
to do is subtracted, which is mostly imports. Target: within 10 %, and the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import fsspec
import psutil
from common import record, table

from odvae.data.synthetic import write_rendered
from odvae.weights import NATURAL_VAE

TARGET = 1.1


def serve(folder: str) -> None:
    """Serve S3 until killed; with 500 while FOLDER/outage exists. The address is written to FOLDER/url."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        if Path(folder, "outage").exists():
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>outage</Message></Error>"]
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    Path(folder, "url").write_text(f"http://127.0.0.1:{server.port}")
    server.serve_forever()


def build(source: str, cache: str, vae: str) -> tuple[float, float]:
    """Return wall and CPU seconds of a build with all its processes."""
    began = time.perf_counter()
    process = psutil.Popen(
        [sys.executable, "-m", "odvae", "cache", "build", source, cache, "--vae", vae, "--frames", "33", "--size",
         "128", "128", "--workers", "1", "--shard-clips", "8"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    spent: dict[psutil.Process, float] = {}  # nobody waits for decoders, so their times are sampled
    while process.poll() is None:
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                spent[one] = times.user + times.system
        time.sleep(.2)
    assert process.returncode == 0
    return time.perf_counter() - began, sum(spent.values())


def files(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    changing = ("files.parquet", "build-report.json")  # of the sources' times; of the build's
    return {name.removeprefix(root): fs.cat_file(name) for name in fs.find(root) if not name.endswith(changing)}


def with_outage(folder: Path, seconds: float, cache: str, source: str, vae: str) -> tuple[float, float]:
    """Build while the store fails for some seconds after the first shard."""
    fs = fsspec.filesystem("s3")

    def fail() -> None:
        while not fs.glob(f"{cache.removeprefix('s3://')}/partitions/*/*.safetensors"):
            time.sleep(.1)
        (folder / "outage").touch()
        time.sleep(seconds)
        (folder / "outage").unlink()

    thread = threading.Thread(target=fail)
    thread.start()
    taken = build(source, cache, vae)
    thread.join()
    return taken


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    write_rendered(folder / "videos", arguments.clips, frames=33, size=256)
    fsspec.filesystem("s3").mkdir("bucket")
    fsspec.filesystem("s3").put(str(folder / "videos"), "bucket/videos", recursive=True)
    places = {"local": (str(folder / "videos"), str(folder / "cache")), "S3": ("s3://bucket/videos", "s3://bucket/cache")}
    found: dict[str, list[float]] = {name: [] for name in places}
    walls: dict[str, list[float]] = {name: [] for name in places}
    for k in range(arguments.runs):
        for name, (source, cache) in places.items():
            wall, cpu = build(source, f"{cache}-{k}", arguments.vae)
            walls[name].append(wall)
            found[name].append((cpu - build(source, f"{cache}-{k}", arguments.vae)[1]) / arguments.clips)
    same = files(str(folder / "cache-0")) == files("s3://bucket/cache-0")
    wall, cpu = with_outage(folder, arguments.outage, "s3://bucket/outage", places["S3"][0], arguments.vae)
    cpu = (cpu - build(places["S3"][0], "s3://bucket/outage", arguments.vae)[1]) / arguments.clips
    survived = files("s3://bucket/outage") == files("s3://bucket/cache-0")
    a_clip = {name: median(values) for name, values in found.items()} | {"S3, outage": cpu}
    rows = [[name, value, value / a_clip["local"], median(walls.get(name, [wall]))] for name, value in a_clip.items()]
    table(["", "CPU s a clip", f"of local (< {TARGET})", "wall s"], rows)
    print(f"the same bytes: {same}; after an outage of {arguments.outage:g} s: {survived}")
    record("object_storage", {"clips": arguments.clips, "outage": arguments.outage},
           {"CPU seconds a clip": a_clip, "ratio": a_clip["S3"] / a_clip["local"], "same": same, "survived": survived})


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--outage", type=float, default=20, help="s")
    parser.add_argument("--vae", default=str(NATURAL_VAE))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        server = subprocess.Popen([sys.executable, __file__, "--serve", name], stderr=subprocess.DEVNULL)
        try:
            while not Path(name, "url").exists():
                time.sleep(.1)
            os.environ |= {"AWS_ENDPOINT_URL": Path(name, "url").read_text(), "AWS_ACCESS_KEY_ID": "key",
                           "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
            measure(Path(name), arguments)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
