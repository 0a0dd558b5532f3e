"""A store of many shards of embeddings gives the same with its lookup as without it, opens without reading their rows,
and survives what happens to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from odvae.cache import text
from odvae.cache.embed import embed_captions
from odvae.cache.hashes import HashMap
from odvae.cache.maintain.text import copy_text, verify_text
from odvae.cache.text import TextStore, list_shards, text_storage
from odvae.utils.errors import UserError
from odvae.utils.storage import open_storage


class Numbers:
    """A text encoder: one vector, of the caption's number."""

    dim, fingerprint = 2, "numbers".ljust(64, "0")

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = torch.tensor([[[float(caption), 1.0]] for caption in captions])
        return vectors, torch.ones(len(captions), 1, dtype=torch.bool)


@pytest.fixture(autouse=True)
def many_small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of three captions, five in a folder; a lookup from four new ones on, in bins of some eight captions."""
    monkeypatch.setenv("ODVAE_SHARD_CACHE", str(tmp_path / "shards"))
    for name, value in (("embed.SHARD_BYTES", 9), ("embed.SHARDS_A_FOLDER", 5), ("text.RECENT_SHARDS", 4),
                        ("text_lookup.BIN", 8)):
        monkeypatch.setattr(f"odvae.cache.{name}", value)


def captions(*numbers: int) -> list[str]:
    return [str(number) for number in range(*numbers)]


def check(store: TextStore, expected: Sequence[str]) -> None:
    assert len(store) == len(expected) and "-1" not in store
    assert [store.embedding(caption)[0, 0].item() for caption in expected] == list(map(float, expected))


@pytest.mark.parametrize("root", ["{}/cache", "memory://bucket{}/cache"])
def test_a_lookup_replaces_the_rows(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_storage(root.format(tmp_path))
    store, _ = embed_captions(cache, Numbers(), captions(50))
    folder, read = text_storage(cache, Numbers()), text.read_rows
    names = list_shards(folder)
    assert len(names) == 17 and {name.rpartition("/")[0] for name in names} == {"", "00001", "00002", "00003"}
    check(store, captions(50))
    with monkeypatch.context() as patch:
        patch.setattr(text, "read_rows", None)
        check(TextStore(folder), captions(50))
    embed_captions(cache, Numbers(), captions(55))  # two shards more, which it does not cover
    rows = list[str]()
    monkeypatch.setattr(text, "read_rows", lambda storage, name, columns: rows.append(name) or read(
        storage, name, columns))
    check(TextStore(folder), captions(55))
    assert len(rows) == 2
    embed_captions(cache, Numbers(), captions(65))
    rows.clear()
    check(TextStore(folder), captions(65))
    assert not rows and verify_text(cache) == (65, [])
    folder.delete("lookup.json")
    check(TextStore(folder), captions(65))
    assert len(rows) == len(list_shards(folder))


def test_a_shard_that_is_deleted_is_embedded_again(tmp_path: Path) -> None:
    store, _ = embed_captions(tmp_path, Numbers(), captions(40))
    victim = max(store.folder.glob("00001/*.parquet"))
    victim.with_suffix(".safetensors").unlink()
    with pytest.raises(UserError, match=f"{victim.stem}.safetensors is damaged or missing"):
        TextStore(store.folder)
    victim.unlink()
    assert len(TextStore(store.folder)) == 37
    again, count = embed_captions(tmp_path, Numbers(), captions(40))
    assert count == 3
    check(again, captions(40))


def test_a_damaged_lookup_says_what_to_do(tmp_path: Path) -> None:
    store, _ = embed_captions(tmp_path, Numbers(), captions(40))
    victim = next(store.folder.glob("lookup-*/000.arrow"))
    whole = victim.read_bytes()
    for damaged in (b"", whole[:-9], bytes(len(whole))):
        victim.write_bytes(damaged)
        with pytest.raises(UserError, match=r"000\.arrow is damaged .*delete .*lookup\.json"):
            TextStore(store.folder).has(np.arange(2**8, dtype=np.uint64) << np.uint64(56))
        assert len(verify_text(tmp_path)[1]) == 1
    victim.write_bytes(whole)
    assert not verify_text(tmp_path)[1]
    table = pa.ipc.open_file(victim).read_all()
    with pa.ipc.new_file(victim, table.schema) as writer:  # as large, with other keys
        keys = pc.add(table["key"].combine_chunks(), pa.scalar(1, pa.uint64()))
        writer.write_table(table.set_column(0, table.schema[0], [keys]))
    (fault,) = verify_text(tmp_path)[1]
    assert "lookup.json lacks captions of" in fault
    (store.folder / "lookup.json").write_text("{")
    with pytest.raises(UserError, match=r"lookup\.json is damaged"):
        TextStore(store.folder)
    (store.folder / "lookup.json").unlink()
    check(embed_captions(tmp_path, Numbers(), captions(40))[0], captions(40))
    assert (store.folder / "lookup.json").exists()


def test_an_open_store_goes_on_while_captions_are_added(tmp_path: Path) -> None:
    before, _ = embed_captions(tmp_path, Numbers(), captions(40))
    embed_captions(tmp_path, Numbers(), captions(80))
    check(before, captions(40))
    assert len(list(before.folder.glob("lookup-*"))) == 2
    embed_captions(tmp_path, Numbers(), captions(120))
    assert len(list(before.folder.glob("lookup-*"))) == 2  # only those that a reader may have opened


def test_copies_have_a_lookup_of_their_own(tmp_path: Path) -> None:
    for name, numbers in (("a", (40,)), ("b", (20, 60))):
        embed_captions(tmp_path / name, Numbers(), captions(*numbers))
    target = open_storage(tmp_path / "target")
    for _ in range(2):  # resumable
        copy_text([open_storage(tmp_path / name) for name in "ab"], target)
        store = TextStore(text_storage(target, Numbers()))
        assert len(store) == 80 and len(store._lookup.shards) == len(list_shards(text_storage(target, Numbers())))
        assert all(store.embedding(caption)[0, 0] == float(caption) for caption in captions(60))


@pytest.mark.parametrize("count", [1, 4, 256])
def test_bins_of_another_size_have_the_same_keys(count: int) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, 1000, np.uint64)
    some = HashMap([keys[:300], keys[300:]])
    bins = [some.rebinned(k, count) for k in range(count)]
    assert (np.concatenate([bin_keys for bin_keys, _ in bins]) == np.sort(keys)).all()
    assert (np.concatenate([numbers for _, numbers in bins])[np.searchsorted(np.sort(keys), keys)]
            == (np.arange(1000) >= 300)).all()
