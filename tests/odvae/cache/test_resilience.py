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
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from odvae.cache import LatentCache, build_cache, lease
from odvae.cache.build import probe
from odvae.cache.build.decode_pool import DecodePool, DecodeWorker
from odvae.cache.build.decode_worker import MediaInfo
from odvae.cache.build.shard_index import ShardIndex
from odvae.cache.format import committed_shards
from odvae.cache.lease import CLAIMS, DEAD_AFTER, BuildLease, process_start_time
from odvae.data.sources import MediaRef
from odvae.data.video.reader import VideoError, VideoReader, write_video
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import UserError

FILES, SHARD_CLIPS = 48, 4
KINDS = {"empty", "no video", "codec", "truncated", "corrupt", "too short", "too long", "hang", "crash",
         "size"}
LIMIT = 600.0  # s that a test waits for another process, which it never should

# A build in a process of its own. It says which clips its VAE encoded, by the checksums that the index will have, and
# cannot decode a few files, which shows only after they were probed. Where there is a gate, it stops in mid-shard
# until the gate is there.
SCRIPT = """
import hashlib, time
from pathlib import Path
import torch
from odvae.cache import build_cache
from odvae.cache.build import probe
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
    if Path(ref.name).stem in ("clip_7", "clip_20", "clip_33"):
        raise VideoError(f"{ref} cannot be decoded beyond frame 3", "leave it out")
    return decode_frames(self, ref, **arguments)

slow.calls = 0
vae.encode, DecodePool.decode_frames, probe.FILES_A_UNIT = slow, failing, 4
build_cache(job["source"], job["cache"], vae, frames=[5], sizes=[(16, 16)], shard_clips=job["shard_clips"], batch=2,
            workers=1, psnr_clips=2)
"""


def tiny_vae() -> AutoencoderKLODVAE:
    torch.manual_seed(0)
    return AutoencoderKLODVAE(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2).eval()


def write_noise(path: Path, seed: int, frames: int = 5) -> Path:
    noise = np.random.default_rng(seed).integers(0, 255, (frames, 4, 4, 3), np.uint8)
    write_video(path, [noise.repeat(4, 1).repeat(4, 2)], 8.0)
    return path


def place_of(path: Path) -> MediaRef:
    found = path.stat()
    return MediaRef(path.name, str(path), f"{found.st_size}:{found.st_mtime_ns}")


def content(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def progress(cache: Path) -> int:
    """How much of a build is on the disk."""
    return sum(len(list((cache / folder).glob("*"))) for folder in ("files", "shards"))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@dataclass
class Build:
    """A build at work in another process."""

    process: Any
    log: Path

    @property
    def encoded(self) -> list[str]:
        """The clips that were encoded, in order; of a build that is killed perhaps all but the last ones."""
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
    """Starts processes that build from one source. They are forked from one that has torch imported already."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "source"
        for k in range(FILES):
            write_noise(self.source / f"clip_{k}.mp4", k)
        (self.source / "text.mp4").write_text("no video")
        self.script = folder / "build.py"
        self.script.write_text(SCRIPT)
        self.context: Any = multiprocessing.get_context("forkserver")
        self.process_start_time: list[Build] = []
        self.whole = folder / "whole"  # what an uninterrupted build makes
        self.start(self.whole).end()

    def start(self, cache: Path, gate: Path | None = None) -> Build:
        log = self.folder / f"log-{len(self.process_start_time)}"
        job = {"source": str(self.source), "cache": str(cache), "log": str(log),
               "gate": gate and str(gate), "shard_clips": SHARD_CLIPS}
        process = self.context.Process(target=runpy.run_path, args=(str(self.script), {"job": job}), daemon=True)
        process.start()
        self.process_start_time.append(Build(process, log))
        return self.process_start_time[-1]


@pytest.fixture(scope="module")
def all_builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("builds"))


@pytest.fixture
def builds(all_builds: Builds) -> Iterator[Builds]:
    yield all_builds
    for build in all_builds.process_start_time:
        build.kill()


def assert_whole(cache: Path, builds: Builds) -> None:
    """The cache is the same, byte for byte, as one that was built at one go, and nothing else lies in it."""
    assert sorted(path.name for path in cache.iterdir()) == ["files", "header.json", "rejects.parquet", "shards"]
    found, expected = content(cache), content(builds.whole)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name] and name != "rejects.parquet"] == []
    assert rejects(cache) == rejects(builds.whole)  # their order may be another
    ids = LatentCache(cache).ids
    assert len(ids) == len(set(ids)) == FILES - 3 and ids == LatentCache(builds.whole).ids


def rejects(cache: Path) -> list[tuple[Any, ...]]:
    return sorted(tuple(row.values()) for row in pq.read_table(cache / "rejects.parquet").to_pylist())


@pytest.mark.parametrize("count", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment(builds: Builds, tmp_path: Path, count: int) -> None:
    chance, cache, steps = random.Random(count), tmp_path / "cache", progress(builds.whole)
    for k in range(count):
        target = int(steps * (k + chance.random()) / count)  # spread over the whole build
        build = builds.start(cache)
        until(lambda target=target, build=build: progress(cache) >= target or build.ended)
        time.sleep(chance.expovariate(1 / 0.05))
        build.kill()
    builds.start(cache).end()
    assert_whole(cache, builds)


@pytest.mark.parametrize("count, killed", [pytest.param(2, 0, marks=pytest.mark.slow), (3, 1)])
def test_several_processes_share_one_build(builds: Builds, tmp_path: Path, count: int, killed: int) -> None:
    """One of them is killed in the middle. What it had not committed is encoded once more, and nothing else twice."""
    cache, gate = tmp_path / "cache", tmp_path / "gate"
    processes = [builds.start(cache, gate)]
    until(lambda: any((cache / "files").glob("*.parquet")))
    while len(processes) < count - 1:
        processes.append(builds.start(cache, gate))
    until(lambda: all(len(process.encoded) > SHARD_CLIPS for process in processes))
    processes.append(builds.start(cache))  # which nothing holds up
    until(lambda: processes[-1].encoded)
    victim = processes.pop(killed)
    os.kill(victim.process.pid, signal.SIGSTOP)  # so that what it committed can be told from what others did after it
    before = committed_shards(cache)
    victim.kill()
    gate.touch()
    for process in processes:
        process.end()
    late = builds.start(cache)
    late.end()
    assert late.encoded == []
    assert_whole(cache, builds)

    shard_of = {checksum: name for name in committed_shards(cache) for checksum in
                pq.read_table(cache / "shards" / f"{name}.parquet")["checksum"].to_pylist()}
    theirs = Counter(checksum for process in processes for checksum in process.encoded)
    assert len(shard_of) == FILES - 3 and theirs.keys() | set(victim.encoded) == shard_of.keys()
    assert set(theirs.values()) == set(Counter(victim.encoded).values()) == {1}
    assert {shard_of[checksum] for checksum in theirs.keys() & set(victim.encoded)}.isdisjoint(before)


def another(work: Path, pid: int, host: str | None = None, start: int = 1) -> str:
    """The traces of another process that is at work on the unit "u", and has half a file written."""
    name = f"{lease._host_id() if host is None else host}-{pid}-{start}-00000000"
    (work / CLAIMS).mkdir(parents=True, exist_ok=True)
    (work / name).mkdir()
    (work / name / "half").write_bytes(b"half")
    os.symlink(name, work / CLAIMS / "u")
    return name


def ended_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_living_processes_exclude_each_other(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with BuildLease(work) as first, BuildLease(work) as second:
        assert first.name != second.name
        assert first.live_peers() == [second.name] and second.live_peers() == [first.name]
        assert first.claim("a") and second.claim("b")
        os.utime(first.folder, (0, 0))  # of this host it is known that it is alive, though it did nothing for long
        assert not second.claim("a") and not first.claim("b") and not first.claim("a")
        second.release("a")  # not its own
        assert not second.claim("a")
        first.release("a")
        assert second.claim("a") and not first.claim("a")
        first.write(tmp_path / "deep" / "file", b"whole")
    assert content(tmp_path) == {"deep/file": b"whole"} and not work.exists()


def test_a_dead_process_is_buried_on_entry(tmp_path: Path) -> None:
    name = another(tmp_path / "work", ended_pid())
    with BuildLease(tmp_path / "work") as here:
        assert here.live_peers() == [] and not (here.work / name).exists()
        assert not os.path.lexists(here.work / CLAIMS / "u") and here.claim("u")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number_is_taken", [False, True])
def test_the_claim_of_a_dead_process_is_taken_over(tmp_path: Path, number_is_taken: bool) -> None:
    """Also where its number is another process's now."""
    start = (process_start_time(os.getpid()) or 0) - 60 if number_is_taken else 1
    with BuildLease(tmp_path / "work") as here, BuildLease(tmp_path / "work") as rival:
        name = another(here.work, os.getpid() if number_is_taken else ended_pid(), start=start)
        assert here.claim("u") and not rival.claim("u")
        assert not (here.work / name).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_another_host_is_alive_while_it_touches_its_folder(tmp_path: Path) -> None:
    with BuildLease(tmp_path / "work") as here:
        name = another(here.work, ended_pid(), host="elsewhere-12345678")
        assert here.live_peers() == [name] and not here.claim("u")
        here.reap_dead()
        before = time.time() - DEAD_AFTER
        os.utime(here.work / name, (before + 30, before + 30))
        assert here.live_peers() == [name] and not here.claim("u")
        os.utime(here.work / name, (before - 1, before - 1))
        assert here.live_peers() == [] and here.claim("u")
        assert not (here.work / name).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_buried_in_its_sleep_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 1e6)
    work, target = tmp_path / "work", tmp_path / "shard"
    with monkeypatch.context() as patch:
        patch.setattr(lease, "_host_id", lambda: "elsewhere-12345678")
        sleeper = BuildLease(work).__enter__()
        assert sleeper.claim("u")
    with BuildLease(work) as here:
        assert not here.claim("u")
        os.utime(sleeper.folder, (0, 0))
        assert here.claim("u")
        with pytest.raises(UserError, match="stood still for more than 60 s"):
            sleeper.write(target, b"late")
        sleeper.__exit__()
        assert not target.exists() and not sleeper.folder.exists()
        with BuildLease(work) as third:
            assert not third.claim("u")  # the sleeper took nothing along
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    good = [write_noise(source / f"clip_{k}.mp4", k).name for k in range(3)]
    os.mkfifo(source / "pipe.mp4")  # to open it never ends
    names = [good[0], "pipe.mp4", *good[1:]]
    (source / "list.jsonl").write_text("".join(json.dumps({"path": name, "caption": name}) + "\n" for name in names))
    shape: dict[str, Any] = {"frames": [5], "sizes": [(16, 16)], "workers": 2, "file_seconds": 4.0}
    summary = build_cache(source / "list.jsonl", tmp_path / "cache", tiny_vae(), **shape)
    [aside] = summary.set_aside
    assert (aside.path, aside.kind, summary.done) == ("pipe.mp4", "hang", 3)
    assert "took more than 4 s" in aside.reason and "--file-seconds" in aside.advice
    assert sorted(LatentCache(tmp_path / "cache").index["path"].to_pylist()) == good
    tried: list[str] = []

    def probe(self: DecodePool, ref: MediaRef, **options: Any) -> MediaInfo:
        tried.append(ref.name)
        raise VideoError(f"{ref} took more than {self.seconds} s", "allow more", "hang")

    monkeypatch.setattr(DecodePool, "probe", probe)
    for seconds, expected in ((4.0, []), (2.0, []), (5.0, ["pipe.mp4"]), (5.0, []), (6.0, ["pipe.mp4"])):
        again = build_cache(source / "list.jsonl", tmp_path / "cache", tiny_vae(), **shape | {"file_seconds": seconds})
        assert tried == expected and again.done == 0  # only a build that allows more waits for it again
        assert [(entry.path, entry.kind) for entry in again.set_aside] == [("pipe.mp4", "hang")]
        tried.clear()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_decoder_that_crashes_costs_its_file_alone(tmp_path: Path, number: signal.Signals) -> None:
    good, pipe = write_noise(tmp_path / "good.mp4", 0), tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    with DecodePool(1) as workers, ThreadPoolExecutor(1) as pool:
        [worker] = workers._idle
        asked = pool.submit(workers.probe, place_of(pipe))
        with open(pipe, "wb"):  # opens when the worker does, which then reads in vain
            first = worker._process
            assert first is not None
            os.kill(first, number)
            with pytest.raises(VideoError, match=r"pipe.mp4 made the decoder crash") as caught:
                asked.result()
        assert caught.value.kind == "crash"
        assert workers.probe(place_of(good)).frames == 5
        assert worker._process != first


def test_what_was_healed_stays_so(tmp_path: Path) -> None:
    """Of two records of one file the good one counts, whichever is read first."""
    good, bad = MediaInfo("0" * 64, 16, 16), VideoError("hangs", "wait", "hang")
    with BuildLease(tmp_path / "work") as here:
        records = probe._Records(tmp_path / "files")
        for k in range(8):
            records.write({f"a{k}": bad, f"b{k}": good}, here)
            records.write({f"a{k}": good}, here)
    known = probe._Records(tmp_path / "files").known
    assert len(known) == 16 and set(known.values()) == {good}


MEDIA = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "png": "png"}


def good_files() -> dict[str, bytes]:
    """One small file of each kind, 32x32, videos of 9 frames, by extension."""
    from PIL import Image

    pictures = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    made = {}
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
        made[kind] = file.getvalue()
    return made


def mutant(good: dict[str, bytes], chance: random.Random) -> tuple[str, bytes]:
    """A damaged copy of one of the files, and its extension."""
    kind = chance.choice(list(good))
    data = bytearray(good[kind])
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        size = len(data)
        # Most of what a decoder trusts stands at the beginning or the end.
        at = chance.choice([chance.randrange(size), chance.randrange(min(size, 200)), size - 1 - chance.randrange(
            min(size, 900))])
        run = chance.randint(1, max(1, size // 4))
        match chance.choice(["flip", "flip", "cut", "swap", "zero", "double", "drop"]):
            case "flip":
                for _ in range(chance.choice([1, 4, 30])):
                    data[min(size - 1, at + chance.randrange(64))] ^= 1 << chance.randrange(8)
            case "cut":
                del data[max(1, at):]
            case "swap":
                head = chance.randint(4, 64)
                data[:head] = good[chance.choice(list(good))][:head]
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
            monkeypatch.setattr(DecodePool, name, self._noted(getattr(DecodePool, name), samples))

    @staticmethod
    def _noted(ask: Callable[..., Any], samples: list[float]) -> Callable[..., Any]:
        def noted(self: DecodePool, ref: MediaRef, **arguments: Any) -> Any:
            samples.append(psutil.Process().memory_info().rss / 1e6)
            return ask(self, ref, **arguments)

        return noted

    @staticmethod
    def grown(samples: list[float], since: int) -> float:
        """From the request of that number on to the last ones."""
        return float(np.median(samples[-20:]) - np.median(samples[since:since + 20]))


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_are_encoded_or_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    chance, good, source, seen = random.Random(0), good_files(), tmp_path / "source", set[bytes]()
    source.mkdir()
    names = []
    while len(names) < count:
        kind, data = mutant(good, chance)
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
    stored, aside = set(cache.index["path"].to_pylist()), {entry.path for entry in summary.set_aside}
    assert stored | aside == set(names) and stored and aside
    assert len(cache) == len(set(cache.ids)) == summary.done
    assert all(torch.isfinite(cache.entry(i)).all() for i in range(len(cache)))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["files", "header.json", "rejects.parquet",
                                                                           "shards"]
    if count > 1000:
        assert memory.grown(memory.probes, count // 2) < 30
        assert memory.grown(memory.frames, len(memory.frames) // 2) < 30


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_memory_stays_the_same_over_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    source = tmp_path / "source"
    clip = write_noise(source / "clip_0.mp4", 0).read_bytes()
    for k in range(1, count):
        (source / f"clip_{k}.mp4").write_bytes(clip + b"\0\0\0\x10free" + k.to_bytes(8, "big"))  # decoders skip it
    memory = Memory(monkeypatch)
    summary = build_cache(source, tmp_path / "cache", tiny_vae(), frames=[5], sizes=[(16, 16)], workers=2, psnr_clips=0)
    assert (summary.done, summary.set_aside, len(LatentCache(tmp_path / "cache"))) == (count, [], count)
    assert len(memory.probes) == len(memory.frames) == count
    if count > 1000:
        assert memory.grown(memory.probes, 1000) < 50
        assert memory.grown(memory.frames, 1000) < 50


def test_a_killed_process_that_nobody_reaps_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    start = process_start_time(process.pid)
    assert start is not None
    process.kill()
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    with BuildLease(tmp_path / "work") as here:
        another(here.work, process.pid, start=start)
        claimed = here.claim("u")
    process.wait()
    assert claimed


def test_a_process_that_was_buried_buries_nobody(tmp_path: Path) -> None:
    with BuildLease(tmp_path / "work") as sleeper:
        another(sleeper.work, 1, host="elsewhere-12345678")
        os.rename(sleeper.folder, tmp_path / "buried")
        with pytest.raises(UserError, match="stood still"):
            sleeper.live_peers()


def test_one_comes_while_the_last_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir, left = Path.mkdir, iter([True, False, True])

    def raced(self: Path, *args: Any, **options: Any) -> None:
        mkdir(self, *args, **options)
        if self.name == CLAIMS and next(left, False):
            self.rmdir()
            self.parent.rmdir()

    monkeypatch.setattr(Path, "mkdir", raced)
    with BuildLease(tmp_path / "work") as here:
        (here.work / CLAIMS).rmdir()
        here.reap_dead()
        assert here.claim("u")


def test_folders_that_are_no_processes_are_let_alone(tmp_path: Path) -> None:
    (tmp_path / "work" / "lost+found").mkdir(parents=True)
    with BuildLease(tmp_path / "work") as here:
        assert here.live_peers() == []
    assert (tmp_path / "work" / "lost+found").exists()


def test_a_decoder_that_dies_while_idle_costs_no_file(tmp_path: Path) -> None:
    with DecodePool(1) as workers:
        workers.probe(place_of(write_noise(tmp_path / "first.mp4", 0)))
        number = workers._idle[0]._process
        assert number is not None
        os.kill(number, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(number))
        assert workers.probe(place_of(write_noise(tmp_path / "second.mp4", 1))).frames == 5


def test_an_answer_that_breaks_off_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(VideoError, match="made the decoder crash"):
        DecodeWorker(60.0).request(place_of(write_noise(tmp_path / "clip.mp4", 0)), "decode_frames")


def test_rejects_have_one_order(builds: Builds) -> None:
    contents = ShardIndex(builds.whole)
    whole = contents.failures(contents.failed)
    for name in [name for name, shard in contents.shards.items() if shard.notes.set_aside]:
        del contents.shards[name]
        contents.update()
        assert contents.failures(contents.failed) == whole


def test_a_frame_that_is_shown_for_days_is_damage(tmp_path: Path) -> None:
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
        workers.probe(place_of(path))
    assert caught.value.kind == "corrupt"


def test_a_title_in_latin_1_does_no_harm(tmp_path: Path) -> None:
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
