"""What looks after a cache: verify, stats, show, query, gc, merge, export; and the embeddings of its captions."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_cache import SHAPE, latents_by_id, tiny_vae, write_noise, write_noise_photo
from waiting import TIMEOUT

from odvae.cache import LatentCache, build_cache, embed, format
from odvae.cache.cli import MAX_LISTED
from odvae.cache.embed import embed_captions
from odvae.cache.lock import lock_cache
from odvae.cache.maintain.export import export
from odvae.cache.maintain.garbage import collect_garbage
from odvae.cache.maintain.merge import merge
from odvae.cache.maintain.query import query
from odvae.cache.maintain.statistics import stats
from odvae.cache.maintain.text import verify_text
from odvae.cache.maintain.verify import verify
from odvae.cache.partition import read_partition, tensors_of, write_partition
from odvae.cache.text import TextStore, text_storage
from odvae.cli import main
from odvae.data.video.reader import probe
from odvae.utils.errors import UserError
from odvae.utils.storage import LocalStorage, open_storage

SETTINGS = SHAPE | {"frames": [5, 9], "shard_clips": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos, two of them long enough for 9 frames, and a photo."""
    folder = tmp_path_factory.mktemp("source")
    for k in range(6):
        write_noise(folder / f"clip_{k}.mp4", k, 9 if k < 2 else 5)
        (folder / f"clip_{k}.txt").write_text("red" if k % 2 else f"blue number {k}")
    write_noise_photo(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    tiny_vae().save_pretrained(folder / "vae")
    (source / "bad.mp4").write_text("no video")
    build_cache(source, folder / "cache", tiny_vae(), **SETTINGS)
    (source / "bad.mp4").unlink()
    return folder


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built / "cache", tmp_path / "cache"))


def test_verify_finds_every_damage(cache: Path, built: Path) -> None:
    good = verify(cache, tiny_vae(), 2)
    assert not good.faults and "7 clips in 3 shards" in good.lines[0] and "2 clips decoded" in good.lines[-1]
    embed_captions(cache, Letters(), LatentCache(cache).captions)
    assert verify_text(cache) == (5, [])
    victims = sorted(cache.glob("partitions/00000/*.safetensors")) + sorted((cache / "text").rglob("*.safetensors"))
    rng = np.random.default_rng(0)
    for victim in victims:
        whole = victim.read_bytes()
        begin = 8 + int.from_bytes(whole[:8], "little")
        for _ in range(3):  # one bit, anywhere in the tensors
            ref = int(rng.integers(begin, len(whole)))
            victim.write_bytes(whole[:ref] + bytes([whole[ref] ^ (1 << int(rng.integers(8)))]) + whole[ref + 1:])
            (fault,) = verify(cache).faults
            assert str(victim) in fault and "checksum" in fault
        for broken in (whole[:-1], whole[:20], b"", whole + b"\0"):
            victim.write_bytes(broken)
            assert any(str(victim) in fault for fault in verify(cache).faults)
        victim.write_bytes(whole)
    storage = open_storage(cache)
    partition = read_partition(storage, 0)
    twice = replace(partition, shards=(*partition.shards, partition.shards[0]),
                    table=pa.concat_tables([partition.table, partition.tables()[0][1]]))
    write_partition(storage, twice)
    assert any("is in another shard too" in fault for fault in verify(cache).faults)
    assert main(["cache", "verify", str(cache)]) == 2


def test_repair_removes_faulty_shards_alone(cache: Path, source: Path) -> None:
    before = latents_by_id(cache)
    victim = min(cache.glob("partitions/00000/5x16x16*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert main(["cache", "verify", str(cache), "--repair"]) == 2
    assert not verify(cache).faults and 0 < len(LatentCache(cache)) < 7
    again = build_cache(source, cache, tiny_vae(), **SETTINGS)
    assert again.done == 7 - again.reused > 0 and not verify(cache).faults
    assert all(before[name].equal(latent) for name, latent in latents_by_id(cache).items()) and len(before) == 7


def test_verify_finds_tensors_that_are_not_those_of_the_index(cache: Path) -> None:
    storage = open_storage(cache)
    good = read_partition(storage, 0)
    number = next(i for i, shard in enumerate(good.shards) if shard.name.startswith("5x16x16"))
    shard, rows = good.tables()[number]
    tensors, first = cache / tensors_of(0, shard.name), rows["id"][0].as_py()
    stored = load_file(tensors)

    def faults(latents: dict[str, torch.Tensor], **moments: Any) -> list[str]:
        save_file(latents, tensors)
        changed = replace(shard, bytes=tensors.stat().st_size, moments=replace(shard.moments, **moments))
        write_partition(storage, replace(good, shards=(*good.shards[:number], changed, *good.shards[number + 1:])))
        return verify(cache).faults

    assert faults(stored) == []
    assert "holds other tensors" in faults({name: latent for name, latent in stored.items() if name != first})[0]
    assert "[4, 2, 2, 2], unlike its index" in faults(stored | {first: stored[first].double()})[0]
    assert "its statistics are not those of its tensors" in faults(stored, count=1)[0]
    faults(stored)
    (cache / "partitions/00000/left.safetensors").write_bytes(b"half")
    report = verify(cache)
    assert not report.faults and any("1 leftover files" in line for line in report.lines)


def test_output_of_the_commands(cache: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        assert main(["cache", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    vae = ["--vae", built / "vae"]
    lines = run("stats", cache)
    assert "7 clips of 7 files" in lines and "5x16x16         4" in lines and "1 corrupt" in lines
    assert run("query", cache, "select bucket, count(*) as n from clips group by bucket order by n desc").split() == [
        "bucket", "n", "5x16x16", "4", "9x16x16", "2", "1x16x16", "1"]
    assert "cannot be opened" in run("query", cache, "select reason from rejects")
    run("query", cache, "select id from clips where caption = 'red'", "--out", tmp_path / "red.csv")
    assert len((tmp_path / "red.csv").read_text().split()) == 4
    run("show", cache, tmp_path / "sheet.png", "--where", "caption = 'red'", *vae)
    run("show", cache, tmp_path / "grid.mp4", "--count", "4", *vae)
    assert Image.open(tmp_path / "sheet.png").width > 100
    assert probe(tmp_path / "grid.mp4").frames in (5, 9)
    for wrong in ("select nothing from nowhere", "copy clips to 'x.csv'", "select * from '/etc/passwd'"):
        with pytest.raises(UserError, match="cannot be run"):
            query(cache, wrong)


def test_results_of_a_query_in_a_file(cache: Path, tmp_path: Path) -> None:
    sql = "select path, captions, frames from clips order by path limit 2"
    rows = [{"path": "clip_0.mp4", "captions": ["blue number 0"], "frames": 9},
            {"path": "clip_1.mp4", "captions": ["red"], "frames": 9}]
    assert query(cache, sql, tmp_path / "a.parquet") == [f"2 rows in {tmp_path / 'a.parquet'}"]
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == rows
    query(cache, sql, tmp_path / "a.jsonl")
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows


def test_requests_that_cannot_be_met_say_why(cache: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    def message(*arguments: object) -> str:
        assert main(["cache", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    vae = ["--vae", built / "vae"]
    assert "neither a .png nor a .mp4" in message("show", cache, tmp_path / "a.gif", *vae)
    assert "no clip of" in message("show", cache, tmp_path / "a.png", "--where", "caption = 'green'", *vae)
    assert "none of .csv, .parquet and .jsonl" in message("query", cache, "from clips", "--out", tmp_path / "a.txt")
    assert "begin it with select" in message("query", cache, "-- nothing")
    assert "from 0 to 1" in message("build", tmp_path, tmp_path / "new", *vae, "--max-set-aside", "2")
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert "pip install 'odvae-lvdm[query]'" in message("query", cache, "from clips")
    assert not list(tmp_path.glob("*.*"))


def test_a_long_list_of_rejects_is_shortened(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path / "v" / "good.mp4")
    for k in range(MAX_LISTED + 3):
        (tmp_path / "v" / f"bad_{k:02d}.mp4").write_text("no video")
    assert main(["cache", "build", str(tmp_path / "v"), str(tmp_path / "cache"), "--vae", str(built / "vae"),
                 "--frames", "5", "--size", "16", "16", "--workers", "1", "--max-set-aside", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("cannot be opened") == MAX_LISTED
    assert f"set aside: 3 more (in all: {MAX_LISTED + 3} corrupt)" in printed


def test_a_dry_run_prints_the_plan_and_encodes_nothing(source: Path, built: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--vae", str(built / "vae"), "--frames", "5", "9", "--workers", "1", "--size"]
    assert main(["cache", "build", str(source), str(tmp_path / "cache"), *options, "16", "16", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "5x16x16         4        4" in text and "to encode: 7 clips; in the cache already: 0" in text
    assert not (tmp_path / "cache/header.json").exists() and not (tmp_path / "cache/work").exists()
    # Other sizes may be chosen after it.
    assert main(["cache", "build", str(source), str(tmp_path / "cache"), *options, "24", "24"]) == 0
    assert "7 clips encoded" in capsys.readouterr().out


def test_garbage_is_found_by_content(cache: Path, source: Path, tmp_path: Path) -> None:
    less = Path(shutil.copytree(source, tmp_path / "less"))
    (less / "clip_0.mp4").unlink()
    (less / "clip_3.mp4").unlink()
    (less / "clip_4.mp4").rename(less / "renamed.mp4")
    before = latents_by_id(cache)
    assert collect_garbage(cache, [str(less)], dry_run=True)[0] == 2 and latents_by_id(cache).keys() == before.keys()
    assert collect_garbage(cache, [str(less)])[0] == 2
    after = latents_by_id(cache)
    assert len(after) == 5 and all(before[name].equal(latent) for name, latent in after.items())
    assert not verify(cache).faults and format.read_header(cache).measured.clips == 5
    assert collect_garbage(cache, [str(less), str(source)])[0] == 0
    again = build_cache(source, cache, tiny_vae(), **SETTINGS)
    assert (again.done, again.reused) == (2, 5) and latents_by_id(cache).keys() == before.keys()


@pytest.mark.parametrize("kills", range(4))
def test_a_killed_gc_has_removed_all_or_nothing(cache: Path, source: Path, tmp_path: Path, kills: int) -> None:
    less = Path(shutil.copytree(source, tmp_path / "less"))
    (less / "clip_3.mp4").unlink()
    before, write, left = latents_by_id(cache), LocalStorage.write, iter([True] * kills)

    def killed(self: LocalStorage, name: str, data: Any) -> None:
        if not next(left, False):
            raise KeyboardInterrupt
        write(self, name, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalStorage, "write", killed)
        collect_garbage(cache, [str(less)])
    after = latents_by_id(cache)
    assert len(after) in (6, 7) and all(before[name].equal(latent) for name, latent in after.items())
    assert not verify(cache).faults
    collect_garbage(cache, [str(less)])
    assert len(latents_by_id(cache)) == 6 and not verify(cache).faults
    assert build_cache(less, cache, tiny_vae(), **SETTINGS).done == 0
    assert len(list(cache.glob("partitions/00000/*.safetensors"))) == 3


def test_merge_keeps_every_clip_once(cache: Path, source: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(source / "clip_1.mp4", other / "same.mp4")
    write_noise(other / "new.mp4", 9, 9)
    build_cache(other, tmp_path / "second", tiny_vae(), **SETTINGS)
    embed_captions(tmp_path / "second", Letters(), ["red"])
    assert main(["cache", "merge", str(cache), str(tmp_path / "second"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"8 clips in {tmp_path / 'out'}, 1 duplicates dropped\n"
    merged, parts = latents_by_id(tmp_path / "out"), latents_by_id(cache) | latents_by_id(tmp_path / "second")
    assert merged.keys() == parts.keys() and all(merged[name].equal(parts[name]) for name in parts)
    assert not verify(tmp_path / "out").faults and verify_text(tmp_path / "out") == (1, [])
    flat = torch.cat([latent.flatten(1) for latent in merged.values()], 1).double()
    assert LatentCache(tmp_path / "out").latents_std == pytest.approx(flat.std(1, correction=0).tolist(), rel=1e-9)
    build_cache(other, tmp_path / "third", tiny_vae(1), **SETTINGS)
    with pytest.raises(UserError, match=r"vae\.weights"):
        merge([cache, tmp_path / "third"], tmp_path / "none")


def test_a_folder_in_which_another_process_works_is_left_alone(
        cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_cache(open_storage(cache)), pytest.raises(UserError, match="another process is changing"):
        collect_garbage(cache, [str(source / "clip_0.mp4")], dry_run=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("odvae.cache.maintain.merge._merge_partition", Mock(side_effect=KeyboardInterrupt))
        merge([cache], tmp_path / "out")
    with lock_cache(open_storage(tmp_path / "out")), pytest.raises(UserError, match="another process is changing"):
        merge([cache], tmp_path / "out")
    assert merge([cache], tmp_path / "out") == (7, 0)


def test_parts_of_a_cache_are_built_side_by_side_and_nothing_else(cache: Path) -> None:
    storage = open_storage(cache)
    with lock_cache(storage, (1, 3)), lock_cache(storage, (3, 3)):
        for other in ((1, 3), (1, 1), (2, 2)):
            with pytest.raises(UserError, match="another process is changing"), lock_cache(storage, other):
                pass
    with lock_cache(storage, (2, 2)):
        pass
    assert not (cache / "work").exists()


def test_exports_hold_the_same_latents(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = latents_by_id(cache)
    monkeypatch.setattr("odvae.cache.maintain.export.TAR_BYTES", 2000)
    assert export(cache, tmp_path / "files", "safetensors") == export(cache, tmp_path / "tars", "webdataset") == 7
    for name, latent in stored.items():
        assert load_file(tmp_path / "files" / f"{name}.safetensors")["latents"].equal(latent)
        assert json.loads((tmp_path / "files" / f"{name}.json").read_text())["id"] == name
    paths = sorted((tmp_path / "tars").iterdir())
    assert [path.name for path in paths] == [f"{k:05d}.tar" for k in range(len(paths))] and len(paths) > 1
    found = dict[str, torch.Tensor]()
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name.removesuffix(".npy")] = torch.from_numpy(np.load(io.BytesIO(file.read())))
    assert found.keys() == stored.keys() and all(found[name].equal(latent) for name, latent in stored.items())
    import webdataset

    samples = {one["__key__"]: one for one in webdataset.WebDataset(list(map(str, paths)), shardshuffle=False).decode()}
    assert samples.keys() == stored.keys()
    assert all(torch.from_numpy(one["npy"]).equal(stored[name]) for name, one in samples.items())


class Letters:
    """A text encoder: a vector a letter; counts what it encodes."""

    def __init__(self, name: str = "letters") -> None:
        self.dim, self.fingerprint, self.encoded = 3, name.ljust(64, "0"), list[str]()

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        self.encoded += captions
        length = max(1, *map(len, captions))
        vectors = torch.zeros(len(captions), length, 3)
        mask = torch.arange(length) < torch.tensor([max(1, len(caption)) for caption in captions])[:, None]
        for i, caption in enumerate(captions):
            for k, letter in enumerate(caption):
                vectors[i, k] = torch.tensor([ord(letter), k, 1e6 if letter == "!" else 0.5])
        return vectors, mask


def test_each_caption_is_embedded_once_and_trimmed(cache: Path, source: Path) -> None:
    encoder, captions = Letters(), LatentCache(cache).captions
    store, done = embed_captions(cache, encoder, captions, batch=2)
    assert done == len(encoder.encoded) == len(set(captions)) == 5 and len(captions) == 7
    assert store.embedding("red").tolist() == [[114, 0, .5], [101, 1, .5], [100, 2, .5]]
    assert store.embedding("red").dtype == torch.float16
    encoder.encoded.clear()
    store, done = embed_captions(cache, encoder, [*captions, "", "so large!"])
    assert done == 2 and sorted(encoder.encoded) == ["", "so large!"]
    assert store.embedding("").shape == (1, 3) and store.embedding("so large!").dtype == torch.bfloat16
    assert embed_captions(cache, Letters("others"), ["red"])[1] == 1  # another encoder, another store
    assert len(TextStore(store.folder)) == 7 and not (cache / "work").exists()
    with safe_open(next(store.folder.glob("*.safetensors")), framework="pt") as file:
        assert all(len(name) == 32 for name in file.keys())  # noqa: SIM118, it is no dict
    shard = next(store.folder.glob("*.safetensors"))
    save_file({}, shard)
    assert verify_text(cache)[1]
    shard.with_suffix(".parquet").unlink()
    assert embed_captions(cache, encoder, [*captions, "", "so large!"])[1] > 0 and not verify_text(cache)[1]


def test_embeddings_are_committed_by_and_by(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a crash loses no more than one file of them."""
    monkeypatch.setattr("odvae.cache.embed.SHARD_BYTES", 100)
    monkeypatch.setattr("odvae.cache.embed.BLOCK", 3)
    captions = ["a", "a", "long caption of a clip", "another long caption", "b", "a"]
    store, done = embed_captions(cache, Letters(), iter(captions))
    assert done == len(store) == 4 and len(list(store.folder.glob("*.safetensors"))) == 3
    assert store.embedding("b").tolist() == [[98, 0, .5]] and len(store.embedding("another long caption")) == 20
    with pytest.raises(KeyError, match="c"):
        store.embedding("c")
    assert any("text embeddings by Letters: 4 captions, 3 wide" in line for line in stats(cache))


def test_one_process_embeds_and_others_wait(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, waiting, take = Letters(), threading.Event(), embed.lock

    def announced(*args: Any, **options: Any) -> Any:
        waiting.set()
        return take(*args, **options)

    with ThreadPoolExecutor(1) as thread:
        with embed._locked(text_storage(cache, encoder)):
            monkeypatch.setattr(embed, "lock", announced)
            other = thread.submit(embed_captions, cache, encoder, ["red"])
            assert waiting.wait(TIMEOUT) and not encoder.encoded
        assert other.result()[1] == 1


def test_the_index_can_be_read_by_anything(cache: Path) -> None:
    """The format is written down: what it says holds."""
    table = pq.read_table(cache / "partitions/00000/index.parquet")
    index = json.loads(table.schema.metadata[b"odvae"])
    assert index.keys() == {"version", "generation", "shards", "failures"}
    assert table.schema.names == format.SCHEMA.names and len(table) == sum(shard["clips"] for shard in index["shards"])
    specification = (Path(__file__).parents[3] / "docs/cache-format.md").read_text()
    assert all(f"`{name}`" in specification for name in [*format.SCHEMA.names, *index, *index["shards"][0]])
