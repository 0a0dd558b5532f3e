"""From an object store to a trained model: sources and cache on S3, through failures of the store."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from s3_server import needs_s3, s3_server

from lvdm.training.train import TrainConfig, train
from odvae.cache import LatentCache
from odvae.utils.config import load_config
from odvae.utils.storage import ChangedMeanwhileError, open_storage

TINY = ["windows.held_out=2", "windows.shard_window=1", "model.hidden_size=24", "model.num_layers=1",
        "model.num_attention_heads=2", "sample.count=0", "loop.micro_batch_size=2", "loop.steps=3", "loop.log_every=1",
        "loop.evaluate_every=3", "loop.save_every=1", "loop.keep=9"]


def configured(cache: str, vae: Path, output: Path) -> TrainConfig:
    return load_config(TrainConfig, None, [f"output={output}", f"windows.cache={cache}", f"vae={vae}", *TINY])


@pytest.fixture(autouse=True)
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODVAE_SHARD_CACHE", str(tmp_path / "shards"))


def losses(run: Path) -> str:
    return (run / "metrics.jsonl").read_text()


def test_a_training_at_a_url_resumes_exactly(cache: Path, vae_folder: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(cache), "/trained/cache", recursive=True)
    url = "memory://trained/cache"
    train(configured(url, vae_folder, tmp_path / "whole"))
    assert fs.glob("/trained/cache/text/*/*.safetensors")  # the captions' embeddings
    for name in fs.find("/trained/cache/text"):
        fs.rm(name)
    with monkeypatch.context() as patch:  # a store that cannot be written to
        patch.setattr(type(fs), "pipe_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
        train(configured(url, vae_folder, tmp_path / "cut"))
        for step in (2, 3):
            (checkpoint,) = (tmp_path / "cut/checkpoints").glob(f"*{step}")
            for path in sorted(checkpoint.rglob("*"), reverse=True):
                path.unlink()
            checkpoint.rmdir()
        train(configured(url, vae_folder, tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    fs.rm("/trained", recursive=True)


@needs_s3
def test_source_and_cache_on_s3_with_outages(clips: Path, cache: Path, vae_folder: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(monkeypatch) as server:
        fs = fsspec.filesystem("s3")
        fs.put(str(clips), "bucket/clips", recursive=True)
        puts, gets = itertools.count(), itertools.count()

        def outage(method: str, path: str) -> bool:
            return ((method == "PUT" and path.endswith(".safetensors") and next(puts) < 2)
                    or (method == "GET" and path.endswith(".mp4") and next(gets) in (4, 5)))

        server.fail = outage
        done = subprocess.run(
            [sys.executable, "-m", "odvae", "cache", "build", "s3://bucket/clips", "s3://bucket/cache", "--vae",
             str(vae_folder), "--frames", "33", "--size", "32", "32", "--workers", "1", "--shard-clips", "4"],
            capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert next(puts) > 2 and "retrying in" in done.stderr and "hidden" not in done.stderr
        there, here = LatentCache("s3://bucket/cache"), LatentCache(cache)
        assert sorted(there.ids) == sorted(here.ids)

        monkeypatch.setattr("odvae.utils.backoff.FIRST_DELAY", 0.0)
        reads = itertools.count()
        server.fail = lambda method, path: path.endswith(".safetensors") and next(reads) < 7
        train(configured("s3://bucket/cache", vae_folder, tmp_path / "run"))
        assert next(reads) > 7 and losses(tmp_path / "run").count('"loss_heldout":') == 2

        storage = open_storage("s3://bucket/conditional")
        storage.write_if("index", b"one", None)  # type: ignore[attr-defined]
        old = storage.version("index")  # type: ignore[attr-defined]
        storage.write_if("index", b"two", old)  # type: ignore[attr-defined]
        for version in (None, old):
            with pytest.raises(ChangedMeanwhileError):
                storage.write_if("index", b"three", version)  # type: ignore[attr-defined]
        assert storage.read("index") == b"two" and storage.open("index").read(2) == b"tw"
