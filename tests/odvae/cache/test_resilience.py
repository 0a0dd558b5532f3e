"""Builds survive anything: kill -9, other builds at the same time, decoders that crash or hang, damaged files."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import torch
from tiny_cache import read_files, tiny_vae, write_noise

from odvae.cache import LatentCache, build_cache
from odvae.cache.build.decode_pool import DecodePool, DecodeWorker
from odvae.cache.build.decode_worker import MediaInfo
from odvae.cache.maintain.rejects import read_rejects
from odvae.data.sources import MediaRef, local_version_tag
from odvae.data.video.reader import VideoError, VideoReader
from odvae.utils.errors import UserError

FILES, SHARD_CLIPS = 44, 4  # more shards than two builds claim before the third starts
KINDS = {"empty", "no video", "codec", "truncated", "corrupt", "too short", "too long", "hang", "crash",
         "size"}
LIMIT = 600.0  # s that a test waits for another process

# A build in a process of its own. It logs which clips its VAE encoded, by the checksums that the index will have, and
# cannot decode a few files, which shows only after they were probed. If there is a gate, it stops in the middle of a
# shard until the gate's file exists. Its fork server is itself forked: importing torch takes longer than the build.
SCRIPT = """
import hashlib, os, socket, sys, threading, time
from pathlib import Path
import torch
from odvae.cache import build_cache
from odvae.cache.build import decode_pool, decode_worker, probe
from odvae.cache.build.decode_pool import DecodePool
from odvae.data.video.reader import VideoError
from odvae.model.autoencoder import AutoencoderKLODVAE

torch.set_num_threads(1)
torch.manual_seed(0)
vae = AutoencoderKLODVAE(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2).eval()
encode, decode_frames = vae.encode, DecodePool.decode_frames

def slow(x):
    slow.calls += 1
    time.sleep(0.01)
    while job["gate"] and slow.calls > 3 and not Path(job["gate"]).exists():
        time.sleep(0.01)
    encoded = encode(x)
    sums = [hashlib.sha256(z.contiguous().numpy().tobytes()).hexdigest() for z in encoded.latent_dist.mode().half()]
    with open(job["log"], "a") as log:
        log.write("".join(f"{checksum}\\n" for checksum in sums))
    return encoded

def failing(self, ref, **arguments):
    if Path(ref.name).stem in ("clip_7", "clip_13", "clip_20"):
        raise VideoError(f"{ref} cannot be decoded beyond frame 3", "leave it out")
    return decode_frames(self, ref, **arguments)

class ForkedServer(decode_pool._ForkServer):
    alive = True

    def __init__(self):
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            if os.fork() == 0:
                self._control.close()
                sys.argv = ["decode_worker", str(theirs.detach())]
                decode_worker.main()
                os._exit(0)

decode_pool._fork_servers[:] = [ForkedServer()]
slow.calls = 0
vae.encode, DecodePool.decode_frames, probe.CHUNK = slow, failing, 4
build_cache(job["source"], job["cache"], vae, frames=[5], sizes=[(16, 16)], shard_clips=job["shard_clips"], batch=2,
            workers=1, psnr_clips=2, partitions=job["partitions"], part=job["part"])
"""


def media_ref(path: Path) -> MediaRef:
    return MediaRef(path.name, str(path), local_version_tag(path))


def count_files(cache: Path) -> int:
    """Measure the progress of a build by its files."""
    return sum(path.suffix != ".lock" for path in cache.rglob("*.*"))


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


@dataclass
class Build:
    """A build running in another process."""

    process: Any
    log: Path

    @property
    def encoded(self) -> list[str]:
        """The clips that were encoded, in order; of a killed build the last ones may be missing."""
        return self.log.read_text().split() if self.log.exists() else []

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> None:
        self.process.join(LIMIT)
        assert self.process.exitcode == 0


class Builds:
    """Starts processes that build from one source, forked from one that has imported torch already."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "source"
        for k in range(FILES):
            write_noise(self.source / f"clip_{k}.mp4", k)
        (self.source / "text.mp4").write_text("no video")
        self.script = folder / "build.py"
        self.script.write_text(SCRIPT)
        multiprocessing.set_forkserver_preload(["odvae.cache.build.builder"])  # where it does not run yet
        self.context: Any = multiprocessing.get_context("forkserver")
        self.all: list[Build] = []
        self.expected = {partitions: folder / f"expected-{partitions}" for partitions in (1, 4)}
        for partitions, cache in self.expected.items():  # the results of uninterrupted builds
            self.start(cache, partitions).end()

    def start(self, cache: Path, partitions: int = 1, part: tuple[int, int] = (1, 1),
              gate: Path | None = None) -> Build:
        log = self.folder / f"log-{len(self.all)}"
        job = {"source": str(self.source), "cache": str(cache), "log": str(log), "gate": gate and str(gate),
               "shard_clips": SHARD_CLIPS, "partitions": partitions, "part": part}
        process = self.context.Process(target=runpy.run_path, args=(str(self.script), {"job": job}), daemon=True)
        process.start()
        self.all.append(Build(process, log))
        return self.all[-1]


@pytest.fixture(scope="module")
def all_builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("builds"))


@pytest.fixture
def builds(all_builds: Builds) -> Iterator[Builds]:
    yield all_builds
    for build in all_builds.all:
        build.kill()


def assert_same_cache(cache: Path, builds: Builds, partitions: int = 1) -> None:
    """The cache has the same files, byte for byte, as the cache of an uninterrupted build."""
    names = {path.name for path in cache.iterdir() if not path.name.startswith("build-report")}
    assert names == {"header.json", "partitions"}
    assert read_files(cache) == read_files(builds.expected[partitions])
    ids = LatentCache(cache).ids
    assert len(ids) == len(set(ids)) == FILES - 3
    assert len(read_rejects(cache)) == 4


@pytest.mark.parametrize("partitions, count", [(1, 2), (4, 2), pytest.param(1, 50, marks=pytest.mark.slow),
                                               pytest.param(4, 50, marks=pytest.mark.slow)])
def test_build_survives_kill_9_at_any_moment(builds: Builds, tmp_path: Path, partitions: int, count: int) -> None:
    rng, cache, total = random.Random(count), tmp_path / "cache", count_files(builds.expected[partitions])
    for k in range(count):
        target = int(total * (k + rng.random()) / count)  # spread over the whole build
        build = builds.start(cache, partitions)
        wait_until(lambda target=target, build=build: count_files(cache) >= target or build.ended)
        time.sleep(rng.expovariate(1 / 0.05))
        build.kill()
    builds.start(cache, partitions).end()
    assert_same_cache(cache, builds, partitions)


@pytest.mark.parametrize("count, kills", [(2, 1), pytest.param(4, 20, marks=pytest.mark.slow)])
def test_parts_of_a_build_side_by_side(builds: Builds, tmp_path: Path, count: int, kills: int) -> None:
    """Some of them are killed at random moments and started again."""
    rng, cache = random.Random(count), tmp_path / "cache"
    running = {i: builds.start(cache, 4, (i, count)) for i in range(1, count + 1)}
    for _ in range(kills):
        i = rng.randint(1, count)
        time.sleep(rng.expovariate(1 / 0.5))
        running[i].kill()
        running[i] = builds.start(cache, 4, (i, count))
    for build in running.values():
        build.end()
    late = builds.start(cache, 4)  # its statistics are those of all parts
    late.end()
    assert late.encoded == []
    assert_same_cache(cache, builds, 4)


def test_a_second_build_into_a_cache_that_is_being_built_says_so(builds: Builds, tmp_path: Path) -> None:
    cache, gate = tmp_path / "cache", tmp_path / "gate"
    first = builds.start(cache, gate=gate)
    wait_until(lambda: len(first.encoded) > SHARD_CLIPS)
    with pytest.raises(UserError, match="another process is changing"):
        build_cache(builds.source, cache, tiny_vae(), frames=[5], sizes=[(16, 16)], shard_clips=SHARD_CLIPS)
    first.kill()
    gate.touch()
    second = builds.start(cache)  # the lock is gone with its process
    second.end()
    assert_same_cache(cache, builds)
    assert len(set(first.encoded) & set(second.encoded)) <= 2 * SHARD_CLIPS  # of shards that were not committed


def test_a_decoder_that_hangs_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    good = [write_noise(source / f"clip_{k}.mp4", k).name for k in range(3)]
    os.mkfifo(source / "pipe.mp4")  # opening it blocks
    names = [good[0], "pipe.mp4", *good[1:]]
    (source / "list.jsonl").write_text("".join(json.dumps({"path": name, "caption": name}) + "\n" for name in names))
    shape: dict[str, Any] = {"frames": [5], "sizes": [(16, 16)], "workers": 2, "file_seconds": 4.0}
    summary = build_cache(source / "list.jsonl", tmp_path / "cache", tiny_vae(), **shape)
    [rejected] = summary.set_aside
    assert (rejected.path, rejected.kind, summary.done) == ("pipe.mp4", "hang", 3)
    assert "timed out after 4 s" in rejected.reason and "--file-seconds" in rejected.advice
    assert sorted(LatentCache(tmp_path / "cache").index["path"].to_pylist()) == good
    tried: list[str] = []

    def probe(self: DecodePool, ref: MediaRef, **options: Any) -> MediaInfo:
        tried.append(ref.name)
        raise VideoError(f"{ref} timed out after {self.seconds} s", "raise the limit", "hang")

    monkeypatch.setattr(DecodePool, "probe", probe)
    for seconds, expected in ((4.0, []), (2.0, []), (6.0, ["pipe.mp4"]), (6.0, []), (8.0, ["pipe.mp4"])):
        again = build_cache(source / "list.jsonl", tmp_path / "cache", tiny_vae(), **shape | {"file_seconds": seconds})
        assert tried == expected and again.done == 0  # only a build with a higher limit tries it again
        assert [(entry.path, entry.kind) for entry in again.set_aside] == [("pipe.mp4", "hang")]
        tried.clear()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_decoder_that_crashes_loses_only_its_file(tmp_path: Path, number: signal.Signals) -> None:
    good, pipe = write_noise(tmp_path / "good.mp4", 0), tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    with DecodePool(1) as workers, ThreadPoolExecutor(1) as pool:
        [worker] = workers._idle
        future = pool.submit(workers.probe, media_ref(pipe))
        with open(pipe, "wb"):  # opens when the worker does, which then waits for data
            first = worker._process
            assert first is not None
            os.kill(first, number)
            with pytest.raises(VideoError, match=r"pipe.mp4 crashed the decoder") as caught:
                future.result()
        assert caught.value.kind == "crash"
        assert workers.probe(media_ref(good)).frames == 5
        assert worker._process != first


MEDIA = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "png": "png"}


def good_files() -> dict[str, bytes]:
    """Return a small file of each kind by extension, 32x32, videos of 9 frames."""
    from PIL import Image

    pictures = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    files = {}
    for kind, codec in MEDIA.items():
        file = io.BytesIO()
        if kind == "png":
            Image.fromarray(pictures[0]).save(file, "PNG")
        else:
            with av.open(file, "w", format={"mkv": "matroska"}.get(kind, kind)) as container:
                stream = container.add_stream(codec, rate=8)
                stream.width = stream.height = 32
                stream.pix_fmt = "yuv420p"
                for picture in pictures:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                container.mux(stream.encode())
        files[kind] = file.getvalue()
    return files


def mutate(good: dict[str, bytes], rng: random.Random) -> tuple[str, bytes]:
    """Return the extension and the bytes of a damaged copy of one of the files."""
    kind = rng.choice(list(good))
    data = bytearray(good[kind])
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        size = len(data)
        # Headers and indices are at the beginning or the end.
        at = rng.choice([rng.randrange(size), rng.randrange(min(size, 200)), size - 1 - rng.randrange(
            min(size, 900))])
        run = rng.randint(1, max(1, size // 4))
        match rng.choice(["flip", "flip", "cut", "swap", "zero", "double", "drop"]):
            case "flip":
                for _ in range(rng.choice([1, 4, 30])):
                    data[min(size - 1, at + rng.randrange(64))] ^= 1 << rng.randrange(8)
            case "cut":
                del data[max(1, at):]
            case "swap":
                head = rng.randint(4, 64)
                data[:head] = good[rng.choice(list(good))][:head]
            case "zero":
                data[at:at + run] = bytes(len(data[at:at + run]))
            case "double":
                data[at:at] = data[at:at + run]
            case "drop":
                del data[at:at + min(run, 64)]
                data = data or bytearray(b"\0")
    return kind, bytes(data)


class Memory:
    """The resident memory of this process in MB, at each request to a decoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.probes, self.frames = list[float](), list[float]()
        for name, samples in (("probe", self.probes), ("decode_frames", self.frames)):
            monkeypatch.setattr(DecodePool, name, self._sampled(getattr(DecodePool, name), samples))

    @staticmethod
    def _sampled(method: Callable[..., Any], samples: list[float]) -> Callable[..., Any]:
        def sampled(self: DecodePool, ref: MediaRef, **arguments: Any) -> Any:
            samples.append(psutil.Process().memory_info().rss / 1e6)
            return method(self, ref, **arguments)

        return sampled

    @staticmethod
    def growth(samples: list[float], since: int) -> float:
        """Return the growth from a request, by its number, to the last ones."""
        return float(np.median(samples[-20:]) - np.median(samples[since:since + 20]))


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_are_encoded_or_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    rng, good, source, seen = random.Random(0), good_files(), tmp_path / "source", set[bytes]()
    source.mkdir()
    names = []
    while len(names) < count:
        kind, data = mutate(good, rng)
        if data not in seen:
            seen.add(data)
            names.append(f"{len(names):04}.{kind}")
            (source / names[-1]).write_bytes(data)
    memory = Memory(monkeypatch)
    summary = build_cache(source, tmp_path / "cache", tiny_vae(), frames=[5, 9], sizes=[(16, 16)], workers=2,
                          psnr_clips=0, file_seconds=60.0)
    for entry in summary.set_aside:
        assert entry.kind in KINDS and entry.reason and entry.advice, entry
        assert Path(entry.path).name in entry.reason
    cache = LatentCache(tmp_path / "cache")
    stored, rejected = set(cache.index["path"].to_pylist()), {entry.path for entry in summary.set_aside}
    assert stored | rejected == set(names) and stored and rejected
    assert len(cache) == len(set(cache.ids)) == summary.done
    assert all(torch.isfinite(cache.entry(i)).all() for i in range(len(cache)))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"build-report.json", "header.json", "partitions"}
    if count > 1000:
        assert memory.growth(memory.probes, count // 2) < 30
        assert memory.growth(memory.frames, len(memory.frames) // 2) < 30


@pytest.mark.parametrize("count", [40, pytest.param(5000, marks=pytest.mark.slow)])
def test_memory_is_constant_over_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    source = tmp_path / "source"
    clip = write_noise(source / "clip_0.mp4", 0).read_bytes()
    for k in range(1, count):
        (source / f"clip_{k}.mp4").write_bytes(clip + b"\0\0\0\x10free" + k.to_bytes(8, "big"))  # decoders skip it
    memory = Memory(monkeypatch)
    summary = build_cache(source, tmp_path / "cache", tiny_vae(), frames=[5], sizes=[(16, 16)], workers=2, psnr_clips=0)
    assert (summary.done, summary.set_aside, len(LatentCache(tmp_path / "cache"))) == (count, [], count)
    assert len(memory.probes) == len(memory.frames) == count
    if count > 1000:
        assert memory.growth(memory.probes, 1000) < 50
        assert memory.growth(memory.frames, 1000) < 50


def test_a_decoder_that_dies_while_idle_loses_no_file(tmp_path: Path) -> None:
    with DecodePool(1) as workers:
        workers.probe(media_ref(write_noise(tmp_path / "first.mp4", 0)))
        pid = workers._idle[0]._process
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(pid))
        assert workers.probe(media_ref(write_noise(tmp_path / "second.mp4", 1))).frames == 5


def test_a_truncated_response_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(peer: Connection) -> None:
        peer.recv_bytes()
        peer.send_bytes(json.dumps({"shape": [1000]}).encode())
        os.write(peer.fileno(), (1000).to_bytes(4, "big") + b"half")
        peer.close()

    def start(self: DecodeWorker) -> None:
        ours, theirs = socket.socketpair()
        self._connection, self._process = Connection(ours.detach()), 0
        threading.Thread(target=answer, args=[Connection(theirs.detach())]).start()

    monkeypatch.setattr(DecodeWorker, "_start", start)
    with pytest.raises(VideoError, match="crashed the decoder"):
        DecodeWorker(60.0).request(media_ref(write_noise(tmp_path / "clip.mp4", 0)), "decode_frames")


def test_a_frame_that_lasts_days_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "far.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        packets = [packet for _ in range(9) for packet in stream.encode(picture)] + stream.encode()
        for k, packet in enumerate(packets):
            packet.pts = packet.dts = k if k < 8 else 8 * 86400 * 5
            container.mux(packet)
    with DecodePool(1) as workers, pytest.raises(VideoError, match=r"far.mkv .*damaged") as caught:
        workers.probe(media_ref(path))
    assert caught.value.kind == "corrupt"


def test_a_title_in_latin_1_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "title.mkv"
    with av.open(path, "w") as container:
        container.metadata["title"] = "Cafe noir"
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Cafe noir", b"Caf\xe9 noir"))
    with VideoReader(path) as video:
        assert video.info.frames == 1
