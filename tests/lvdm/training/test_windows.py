"""Training windows from latent caches: aligned with a rollout's groups, from clips of any size and length, a function
of (seed, step, index) only."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from lvdm.model.groups import frame_positions
from lvdm.training import text_embeddings
from lvdm.training.buckets import _first_files
from lvdm.training.text_embeddings import TextEmbeddingCache
from lvdm.training.train import TrainConfig
from lvdm.training.windows import LatentWindows, WindowConfig, Windows
from odvae import AutoencoderKLODVAE
from odvae.cache import LatentCache
from odvae.cache import format as fmt
from odvae.cache.moments import Moments
from odvae.cache.partition import Partition, Shard, tensors_of, write_partition
from odvae.utils.config import load_config, save_config
from odvae.utils.errors import UserError
from odvae.utils.storage import LocalStorage

GROUP, PATCH, MID_CLIP = 2, 2, 4  # with history=1: two groups after the first latent
Shape = tuple[int, int, int]  # (T, h, w) of latents
MIXED: list[Shape] = [*[(1, 4, 4)] * 6, *[(2, 4, 4)] * 4, *[(4, 4, 6)] * 5, *[(5, 4, 4)] * 7, *[(9, 4, 4)] * 8,
                      *[(12, 4, 6)] * 6]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLODVAE:
    torch.manual_seed(0)
    return AutoencoderKLODVAE(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, patch_size=2,
                              latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0])


def write_cache(folder: Path, vae: AutoencoderKLODVAE, shapes: Sequence[Shape], stored: Any = "mean",
                frame_rate: float = 8.0, first: int = 0, size: int | None = None, clips_per_file: int = 1,
                captions_per_clip: int = 1) -> Path:
    """A cache of clips `first`, `first` + 1 ..., named by numbers; frame t of clip k has the value 100 k + t
    everywhere, and a log-variance of 0. Of `size` bytes there are no values: the file is sparse."""
    ratio = vae.spatial_compression_ratio
    header = fmt.Header(
        vae=fmt.vae_header(vae, latent_channels=4, temporal=vae.temporal_compression_ratio, spatial=ratio,
                           precision="float32"),
        transform=fmt.TransformHeader(frame_rate=frame_rate, frames=[], sizes=[]), stored=stored, dtype="float32",
        made_with={})
    storage = LocalStorage(folder)
    fmt.write_header(storage, header)
    numbers = range(first, first + len(shapes))
    ids = [hashlib.sha256(str(k).encode()).hexdigest()[:32] for k in numbers]
    frames = [1 + (t - 1) * vae.temporal_compression_ratio for t, _, _ in shapes]
    captions = [[f"clip {k}", *(f"clip {k} again {i}" for i in range(1, captions_per_clip))] for k in numbers]
    full = [(8 if stored == "moments" else 4, *shape) for shape in shapes]
    rows: dict[str, Any] = {name: pa.nulls(len(ids), field.type) for name, field in zip(
        fmt.SCHEMA.names, fmt.SCHEMA, strict=True)} | {
        "id": ids, "captions": captions, "frames": frames,
        "content": [hashlib.sha256(f"file {k // clips_per_file}".encode()).hexdigest() for k in numbers],
        "caption_hashes": [list(map(fmt.caption_hash, batch)) for batch in captions],
        "shape": pa.array(full, pa.list_(pa.int32(), 4)),
        "bucket": [fmt.bucket_name(n, h * ratio, w * ratio) for n, (_, h, w) in zip(frames, shapes, strict=True)]}
    tensors = folder / tensors_of(0, "shard")
    tensors.parent.mkdir(parents=True)
    if size is None:
        latents = {}
        for k, name, (_, t, h, w) in zip(numbers, ids, full, strict=True):
            mean = (100 * k + torch.arange(t)).float().view(1, t, 1, 1).expand(4, t, h, w)
            latents[name] = torch.cat([mean, torch.zeros_like(mean)][: 2 if stored == "moments" else 1]).contiguous()
        tensors.write_bytes(save(latents))
    else:
        (c, t, h, w), end = full[0], 4 * int(np.prod(full[0]))
        about = f'{{"{ids[0]}":{{"dtype":"F32","shape":[{c},{t},{h},{w}],"data_offsets":[0,{end}]}}}}'.encode()
        about += b" " * (-len(about) % 8)
        with tensors.open("wb") as file:
            file.write(len(about).to_bytes(8, "little") + about)
            file.truncate(8 + len(about) + end)
    shard = Shard("shard", len(ids), tensors.stat().st_size, Moments(1, np.zeros(4), np.ones(4)))
    write_partition(storage, Partition(0, shards=(shard,), table=pa.table(rows, schema=fmt.SCHEMA)))
    return folder


@pytest.fixture(scope="module")
def mixed(vae: AutoencoderKLODVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("mixed") / "cache", vae, MIXED, "moments")


@pytest.fixture(scope="module")
def other(vae: AutoencoderKLODVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips at 24 frames a second, of which three are in `mixed` too."""
    return write_cache(tmp_path_factory.mktemp("other") / "cache", vae, [(9, 4, 4)] * 10, "moments", 24.0,
                       len(MIXED) - 3)


def windows_of(vae: AutoencoderKLODVAE, *caches: Path, batch: int = 4, seed: int = 0,
               **settings: Any) -> LatentWindows:
    config = WindowConfig(caches=caches, **{"history": 1, "held_out": 8} | settings)
    return LatentWindows(config, vae, GROUP, PATCH, seed, batch)


def frames_of(vae: AutoencoderKLODVAE, batch: Windows) -> list[tuple[int, list[int]]]:
    """Of each sample the clip's number and the frames that it shows."""
    values = vae.denormalize(batch.latents)
    assert torch.allclose(values, values[:, :1, :, :1, :1].expand_as(values), atol=1e-3)
    rounded = values[:, 0, :, 0, 0].round().long()
    clips = [int(caption.split()[1]) for caption in batch.captions]
    return [(clip, (row - 100 * clip).tolist()) for clip, row in zip(clips, rounded, strict=True)]


def kind_of(batch: Windows) -> str:
    return "start" if batch.positions == tuple(range(len(batch.positions))) else "mid-clip"


def same(one: Windows, other: Windows) -> bool:
    return one.latents.equal(other.latents) and all(
        getattr(one, name) == getattr(other, name)
        for name in ("captions", "sample_indices", "positions", "frame_rate", "names"))


def test_windows_are_aligned_with_a_rollouts_groups(vae: AutoencoderKLODVAE, mixed: Path) -> None:
    windows = windows_of(vae, mixed)
    starts, mid_clips = Counter[int](), dict[int, set[int]]()
    for step in range(300):
        batch = windows.batch(step, 0, 1)
        t = batch.latents.shape[2]
        assert batch.latents.dtype == torch.float32 and batch.frames == batch.latents.shape[0] * t
        assert batch.positions == frame_positions(t, GROUP, kind_of(batch) == "mid-clip")
        for clip, frames in frames_of(vae, batch):
            length, *size = MIXED[clip]
            assert list(batch.latents.shape[3:]) == size
            if kind_of(batch) == "start":
                starts[clip] += 1
                assert frames == list(range(min(length, 5)))  # 17 video frames
            else:
                begin = frames[1]
                mid_clips.setdefault(clip, set()).add(begin)
                assert frames == [0, *range(begin, begin + MID_CLIP)] and (begin - 1) % GROUP == 0
                assert begin + MID_CLIP <= length
    trained = set(range(len(MIXED))) - set(windows.held_out.tolist())
    assert set(starts) == trained  # images and the shortest clips too
    long = {clip for clip in trained if MIXED[clip][0] > MID_CLIP}
    assert set(mid_clips) == long
    for clip, begins in mid_clips.items():  # every position occurs
        assert begins == set(range(1, MIXED[clip][0] - MID_CLIP + 1, GROUP))


@pytest.mark.parametrize("budgets", [(None, None), (120, 240)])
def test_two_processes_see_what_one_does(vae: AutoencoderKLODVAE, mixed: Path, other: Path,
                                         budgets: tuple[int | None, int | None]) -> None:
    """The same holds for two micro-batches of one process."""
    half = windows_of(vae, mixed, other, batch=2, tokens=budgets[0], sample=True, weights=(1, 2))
    whole = windows_of(vae, mixed, other, batch=4, tokens=budgets[1], sample=True, weights=(1, 2))
    kinds = set()
    for step in range(40):
        together, parts = whole.batch(step, 0, 1), [half.batch(step, micro_batch, 2) for micro_batch in range(2)]
        assert torch.cat([part.latents for part in parts]).equal(together.latents)
        assert parts[0].sample_indices + parts[1].sample_indices == together.sample_indices
        assert together.sample_indices == tuple(range(len(together.names)))
        assert parts[0].names + parts[1].names == together.names
        assert {part.positions for part in parts} == {together.positions}
        kinds.add((kind_of(together), together.latents.shape[2:], together.frame_rate))
    assert len(kinds) > 6


def test_a_step_is_the_same_however_it_was_reached(vae: AutoencoderKLODVAE, mixed: Path) -> None:
    walked = windows_of(vae, mixed, sample=True)
    steps = [walked.batch(step, 1, 3) for step in range(60)]
    resumed = windows_of(vae, mixed, sample=True)
    assert all(same(resumed.batch(step, 1, 3), steps[step]) for step in (59, 17, 18, 3, 59))
    reseeded = windows_of(vae, mixed, sample=True, seed=1)
    assert sum(same(reseeded.batch(step, 1, 3), steps[step]) for step in range(60)) == 0


def test_nothing_is_dropped_at_an_epochs_end(vae: AutoencoderKLODVAE, mixed: Path) -> None:
    windows = windows_of(vae, mixed)
    seen: dict[tuple[str, Shape], Counter[int]] = {}
    for step in range(400):
        batch = windows.batch(step, 0, 1)
        count = seen.setdefault((kind_of(batch), tuple(batch.latents.shape[2:])), Counter())
        count.update(clip for clip, _ in frames_of(vae, batch))
    for (kind, (t, h, w)), count in seen.items():
        clips = [k for k, (length, *size) in enumerate(MIXED) if size == [h, w] and k not in windows.held_out
                 and (length > MID_CLIP if kind == "mid-clip" else min(length, 5) == t)]
        times = [count[clip] for clip in clips]
        assert count.keys() == set(clips) and max(times) - min(times) <= 1 and min(times) > 3


def test_shares_are_of_samples(vae: AutoencoderKLODVAE, mixed: Path, other: Path) -> None:
    steps = 300
    for settings in ({"weights": (1, 3), "mid_clip": .25}, {"mid_clip": .5, "tokens": 64}, {"mid_clip": 0}):
        windows = windows_of(vae, mixed, other, **settings)
        found = Counter[tuple[float, str]]()
        for step in range(steps):
            batch = windows.batch(step, 0, 1)
            found[batch.frame_rate, kind_of(batch)] += len(batch.names)
        trained = [n - sum(first <= k < first + n for k in windows.held_out)
                   for n, first in ((len(MIXED), 0), (10, len(MIXED)))]
        weights: Any = settings.get("weights", trained)
        for rate, weight in zip((8.0, 24.0), weights, strict=True):
            for kind, share in (("start", 1 - settings["mid_clip"]), ("mid-clip", settings["mid_clip"])):
                assert found[rate, kind] / found.total() == pytest.approx(share * weight / sum(weights), abs=.02)


def test_a_cache_without_long_clips_has_its_share(vae: AutoencoderKLODVAE, other: Path,
                                                               tmp_path: Path) -> None:
    short = write_cache(tmp_path / "short", vae, [(3, 4, 4)] * 8, first=100)
    windows = windows_of(vae, short, other, weights=(1, 1), mid_clip=1.0, held_out=0)
    kinds = Counter(kind_of(windows.batch(step, 0, 1)) for step in range(100))
    assert kinds == {"start": 50, "mid-clip": 50}


def test_the_token_budget_determines_the_batch_size(vae: AutoencoderKLODVAE, mixed: Path,
                                                caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "odvae"):
        windows = windows_of(vae, mixed, tokens=25)
    # 5 x 4 x 6 latents are 30 tokens of 2 x 2: logged once, though both kinds of windows have that shape.
    assert [record.args for record in caplog.records] == [("5x4x6", 30, 25)]
    sizes = {tuple(batch.latents.shape[2:]): len(batch.names)
             for batch in (windows.batch(step, 0, 1) for step in range(200))}
    assert sizes == {(1, 4, 4): 6, (2, 4, 4): 3, (4, 4, 6): 1, (5, 4, 4): 1, (5, 4, 6): 1}


def test_held_out_clips_are_never_trained_on(vae: AutoencoderKLODVAE, mixed: Path, other: Path,
                                             tmp_path: Path) -> None:
    windows = windows_of(vae, mixed, other, held_out=9, sample=True)
    batches = windows.held_out_batches()
    held = [name for batch in batches for name in batch.names]
    every = LatentCache(mixed).ids + LatentCache(other).ids
    content = {name: hashlib.sha256(f"file {k}".encode()).hexdigest() for k in range(1000)
               if (name := hashlib.sha256(str(k).encode()).hexdigest()[:32]) in every}
    assert 9 <= len(held) <= 10 and len(held) == sum(map(set(held).__contains__, every))  # in both caches or in none
    assert set(held) == set(sorted(set(every), key=lambda name: content[name])[:len(set(held))])
    trained = {name for step in range(150) for name in windows.batch(step, 0, 1).names}
    assert not trained & set(held) and trained | set(held) == set(every)

    assert [number for batch in batches for number in batch.sample_indices] == list(range(len(held)))
    assert all(kind_of(batch) == "start" and len(batch.names) <= 4 for batch in batches)
    for batch in batches:  # the posterior's means
        for clip, frames in frames_of(vae, batch):
            assert frames == list(range(len(frames))) and (len(frames) == 5 or len(frames) == MIXED[clip][0])
    assert all(same(one, two) for one, two in zip(batches, windows.held_out_batches(), strict=True))

    assert len(windows_of(vae, mixed, held_out=64).held_out) == len(MIXED) // 4
    assert windows_of(vae, mixed, held_out=0).held_out_batches() == []
    more = write_cache(tmp_path / "more", vae, [(5, 4, 4)] * 4, "moments", first=500)
    before, after = (windows_of(vae, *caches, held_out=6).held_out.tolist() for caches in ([mixed], [mixed, more]))
    assert len(set(before) & set(after)) >= 4  # new clips hardly change them


def test_whole_files_are_held_out(vae: AutoencoderKLODVAE, tmp_path: Path) -> None:
    """Ten films of six clips, a short one of them in a second cache too, and one film of everything."""
    films = write_cache(tmp_path / "films", vae, [(5, 4, 4)] * 60, clips_per_file=6)
    parts = write_cache(tmp_path / "parts", vae, [(3, 4, 4)] * 12, clips_per_file=6, first=18)
    windows = windows_of(vae, films, parts, held_out=7)
    film_of = [k // 6 for k in (*range(60), *range(18, 30))]
    by_hash = sorted(range(10), key=lambda k: hashlib.sha256(f"file {k}".encode()).hexdigest())
    trained = {int(caption.split()[1]) // 6 for step in range(200) for caption in windows.batch(step, 0, 1).captions}
    held, size = set[int](), 0
    for film in by_hash:  # a quarter of 72 is 18
        if size < 7 and size + film_of.count(film) <= 18:
            held, size = held | {film}, size + film_of.count(film)
    assert held and trained == set(range(10)) - held
    evaluated = [film_of[k] for k in windows.held_out]
    assert set(evaluated) <= held and len(evaluated) == 7 == sum(len(one.names) for one in windows.held_out_batches())
    assert windows.describe().splitlines()[0] == f"held out: all {size} clips of {len(held)} files; evaluated: 7"
    one = windows_of(vae, write_cache(tmp_path / "one", vae, [(5, 4, 4)] * 8, clips_per_file=8), held_out=2)
    assert len(one.held_out) == 0
    assert one.describe().startswith("nothing is held out: each file has more than a quarter")


def test_one_of_several_captions_is_drawn(vae: AutoencoderKLODVAE, tmp_path: Path) -> None:
    several = write_cache(tmp_path / "several", vae, [(5, 4, 4)] * 12, captions_per_clip=3)
    windows, again = (windows_of(vae, several, held_out=3) for _ in range(2))
    counts, encoder = Counter[int](), Letters()
    text = TextEmbeddingCache(encoder, windows.caches)
    assert len(set(itertools.chain(*encoder.calls))) == 12 * 3 + 1  # each of them, and ""
    for step in range(100):
        batch = windows.batch(step, 0, 1)
        assert batch.captions == again.batch(step, 0, 1).captions  # a pure function of seed, step and index
        assert text(batch.captions)[1].sum(1).tolist() == list(map(len, batch.captions))
        parts = [windows.batch(step, micro_batch, 2) for micro_batch in range(2)]
        if parts[0].names == batch.names:
            assert parts[0].captions == batch.captions
        for name, caption in zip(batch.names, batch.captions, strict=True):
            words = caption.split()
            assert hashlib.sha256(words[1].encode()).hexdigest()[:32] == name  # one of the clip's own
            counts[int(words[-1]) if len(words) > 2 else 0] += 1
    assert sorted(counts) == [0, 1, 2] and min(counts.values()) > .25 * counts.total()
    assert all(len(caption.split()) == 2 for one in windows.held_out_batches() for caption in one.captions)  # the first


def test_a_posterior_is_drawn_anew_each_time(vae: AutoencoderKLODVAE, mixed: Path, tmp_path: Path) -> None:
    means, samples = windows_of(vae, mixed), windows_of(vae, mixed, sample=True)
    noise = []
    for step in range(200):
        mean, drawn = means.batch(step, 0, 1), samples.batch(step, 0, 1)
        assert mean.names == drawn.names and mean.positions == drawn.positions
        noise.append((vae.denormalize(drawn.latents) - vae.denormalize(mean.latents))[:, :, :1, :4, :4].flatten(1))
    flat = torch.cat(noise)
    assert float(flat.mean()) == pytest.approx(0, abs=.02) and float(flat.std()) == pytest.approx(1, abs=.02)
    assert len(flat.unique(dim=0)) == len(flat)
    plain = write_cache(tmp_path / "means", vae, [(5, 4, 4)] * 4)
    with pytest.raises(UserError, match="no log-variances"):
        windows_of(vae, plain, sample=True)


def test_only_the_window_of_a_long_clip_is_read(vae: AutoencoderKLODVAE, tmp_path: Path) -> None:
    # 512 MB for an hour at 8 frames per second, which would be in memory if read whole.
    long = write_cache(tmp_path / "long", vae, [(8192, 64, 64)], size=1)
    windows = windows_of(vae, long, batch=1, mid_clip=1.0)
    windows.batch(0, 0, 1)
    before = psutil.Process().memory_info().rss
    assert all(windows.batch(step, 0, 1).latents.shape == (1, 4, 5, 64, 64) for step in range(1, 9))
    assert psutil.Process().memory_info().rss - before < 64e6


def test_the_description_lists_buckets_and_what_is_left_out(vae: AutoencoderKLODVAE, mixed: Path, other: Path) -> None:
    lines = windows_of(vae, mixed, other, weights=(1, 0), mid_clip=1.0, held_out=0).describe().splitlines()
    assert lines[:2] == ["held out: all 0 clips of 0 files; evaluated: 0",
                         f"{mixed}: {len(MIXED)} clips, 0 of them held out"]
    assert any("5x4x4 latents mid-clip: 15 clips, batch 4, 71.4% of steps" in line for line in lines)
    assert "  15 clips are left out: too short for mid-clip windows, and windows.mid_clip=1" in lines
    assert lines[-1] == "  10 clips are left out: the cache's weight is 0"
    assert windows_of(vae, mixed, other).size == (4, 4)


def test_configs_of_one_cache_and_of_several(tmp_path: Path) -> None:
    def windows(*arguments: str) -> WindowConfig:
        return load_config(TrainConfig, None, list(arguments)).windows

    assert WindowConfig().caches == windows().caches == (Path("data/cache"),)
    assert WindowConfig(cache="a").caches == windows("windows.cache=a").caches == (Path("a"),)
    two = windows("windows.caches=[a, b]", "windows.weights=[1, 2]")
    assert two.caches == (Path("a"), Path("b")) and two.weights == (1.0, 2.0)
    save_config(TrainConfig(windows=two), tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml").windows == two
    with pytest.raises(UserError, match="not both"):
        windows("windows.caches=[a, b]", "windows.cache=c")
    for weights in ("[1]", "[1, -1]", "[0, 0]", "[1, .inf]"):
        message = r"weights.1 = inf: must be a finite" if "inf" in weights else r"weights = .* give 2, one per cache"
        with pytest.raises(UserError, match=message):
            windows("windows.caches=[a, b]", f"windows.weights={weights}")


def test_errors_name_what_would_fit(vae: AutoencoderKLODVAE, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"windows.frames=13 are 4 latent frames.* nearest are 9 and 17"):
        windows_of(vae, mixed, frames=13)
    with pytest.raises(UserError, match="nearest are 13 and 17"):
        windows_of(vae, mixed, frames=15)
    odd = write_cache(tmp_path / "odd", vae, [(5, 4, 4), (5, 5, 4)])
    with pytest.raises(UserError, match=r"bucket 17x40x32\) .*latents of 5x4.* nearest size is 32x32"):
        windows_of(vae, odd)
    torch.manual_seed(1)
    stranger = AutoencoderKLODVAE(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, patch_size=2)
    with pytest.raises(UserError, match="another VAE"):
        windows_of(stranger, mixed)


class Letters:
    """A text encoder with a vector per letter, which records its calls."""

    dim, fingerprint = 3, "letters".ljust(64, "0")

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(list(captions))
        lengths = torch.tensor([max(1, len(caption)) for caption in captions])
        vectors = torch.zeros(len(captions), int(lengths.max()), 3)
        for i, k in itertools.product(range(len(captions)), range(int(lengths.max()))):
            vectors[i, k] = torch.tensor([float(ord(letter)) for letter in captions[i][k : k + 1] or "\0"] * 3)
        return vectors, torch.arange(int(lengths.max())) < lengths[:, None]


def test_embeddings_are_read_from_the_caches(vae: AutoencoderKLODVAE, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch,
                                             caplog: pytest.LogCaptureFixture) -> None:
    caches = [LatentCache(write_cache(tmp_path / name, vae, [(1, 4, 4)] * 4, first=first))
              for name, first in (("one", 8), ("two", 10))]  # clips 10 and 11 lie in both
    expected = {"", *(f"clip {k}" for k in range(8, 14))}
    encoder = Letters()
    text = TextEmbeddingCache(encoder, caches)
    embedded = [caption for call in encoder.calls for caption in call]
    assert sorted(embedded) == sorted(expected) and len(encoder.calls) == 2  # once each, and many at a time

    for batch in (["clip 9", "clip 13", "", "clip 9"], [""]):
        expected, mask = encoder.encode(batch)
        vectors, padded_mask = text(batch)
        assert padded_mask.shape[1] == 8 and vectors.shape[1] == 8  # the longest, up to a multiple of 8
        assert padded_mask[:, :mask.shape[1]].equal(mask) and not padded_mask[:, mask.shape[1]:].any()
        assert vectors.dtype == torch.float32
        assert vectors[:, :mask.shape[1]].equal(torch.where(mask[..., None], expected, 0))
    with pytest.raises(UserError, match="no embedding of the caption 'a cat'"):
        text(["a cat"])

    again, full = Letters(), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    TextEmbeddingCache(again, caches[::-1])
    assert not again.calls and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == full

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(text_embeddings, "embed_captions", read_only)
    locked = [LatentCache(write_cache(tmp_path / "locked", vae, [(1, 4, 4)] * 2, first=13)), caches[0]]
    with caplog.at_level(logging.WARNING, "odvae"):
        text = TextEmbeddingCache(again, locked)
    assert "is read-only: the embeddings of 2 captions" in caplog.text
    vectors, mask = text(["clip 14", "", "clip 8"])
    assert mask.sum(1).tolist() == [7, 1, 6] and vectors[0, 0, 0] == ord("c")


def test_held_out_files_are_the_same_however_few_are_kept_in_memory(vae: AutoencoderKLODVAE, tmp_path: Path) -> None:
    caches = [LatentCache(write_cache(tmp_path / name, vae, [(1, 4, 4)] * 40, first=first, clips_per_file=3))
              for name, first in (("one", 0), ("two", 30))]
    every, complete = _first_files(caches, 100)
    assert complete and sorted(np.concatenate(every).tolist()) == list(range(80))
    for count in (1, 2, 5):
        some, complete = _first_files(caches, count)
        assert not complete and count <= len(some) and all(map(np.array_equal, some, every))
    assert all(rows.dtype == np.int64 for rows in some)
