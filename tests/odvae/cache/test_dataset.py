"""What a training draws from latent caches: every clip equally often, the same at any step however it was reached."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cache import tiny_vae, write_noise, write_noise_photo
from torch.utils.data import DataLoader

from odvae.cache import BucketBatches, LatentCache, LatentDataset, build_cache
from odvae.cache.dataset import SampleKey
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import UserError

Buckets = list[dict[str, np.ndarray]]


def numbered(*caches: Sequence[int]) -> Buckets:
    """Buckets of these numbers of clips, a row each cache, as `LatentDataset.buckets` numbers them."""
    buckets, first = [], 0
    for counts in caches:
        buckets.append({})
        for k, count in enumerate(counts):
            buckets[-1][f"{4 * k + 1}x16x16"] = np.arange(first, first + count)
            first += count
    return buckets


ONE, TWO = numbered([5, 23, 13]), numbered([5, 23, 13], [1, 40])


def test_batches_are_a_function_of_seed_step_rank_and_world() -> None:
    whole = list(BucketBatches(TWO, 4, seed=3, steps=300))
    for start in (1, 7, 150, 299):
        assert list(BucketBatches(TWO, 4, seed=3, start=start, steps=300 - start)) == whole[start:]
    endless = BucketBatches(TWO, 4, seed=3)
    assert [endless.batch(step) for step in reversed(range(300))] == whole[::-1]
    assert list(islice(endless, 20)) == whole[:20] and len(BucketBatches(TWO, 4, start=9, steps=7)) == 7
    other = list(BucketBatches(TWO, 4, seed=4, steps=300))
    assert sum(a == b for a, b in zip(whole, other, strict=True)) < 10
    turns = [[BucketBatches(TWO, 4, seed=seed).bucket_at_step(step)[0] for step in range(50)] for seed in (3, 4)]
    assert turns[0] != turns[1]

    ranks = [BucketBatches(TWO, 2, seed=3, rank=rank, world=2, steps=300) for rank in range(2)]
    for together, first, second in zip(whole, *ranks, strict=True):
        assert first + second == together and len(first) == len(second) == 2
    assert [ranks[0].rank_batch(step, 1) for step in range(300)] == [
        (endless.bucket_at_step(step)[0], some) for step, some in enumerate(ranks[1])]


def test_an_epoch_has_every_clip_once() -> None:
    epochs, batch = 12, 4
    buckets = ONE[0]
    of = {clip: name for name, clips in buckets.items() for clip in clips.tolist()}
    seen: dict[str, Counter[int]] = {name: Counter(dict.fromkeys(clips.tolist(), 0)) for name, clips in buckets.items()}
    picks: list[SampleKey] = []
    for some in BucketBatches(ONE, batch, steps=round(epochs * len(of) / batch)):
        assert len(some) == batch and len({of[pick.clip] for pick in some}) == 1
        picks += some
        for pick in some:
            count = seen[of[pick.clip]]
            assert pick.epoch == count[pick.clip]  # its n-th time is in its n-th epoch
            count[pick.clip] += 1
            assert max(count.values()) - min(count.values()) <= 1  # at no time is a clip left behind
    assert len(set(picks)) == len(picks)
    assert all(abs(times - epochs) <= 1 for count in seen.values() for times in count.values())
    orders = {tuple(pick.clip for pick in picks if pick.epoch == epoch and of[pick.clip] == "5x16x16")
              for epoch in range(epochs - 1)}
    assert len(orders) == epochs - 1  # each epoch is shuffled anew

    tiny = BucketBatches(numbered([1, 2]), 3, steps=10)  # a batch may be longer than an epoch
    assert Counter(pick for some in tiny for pick in some).most_common(1)[0][1] == 1


@pytest.mark.parametrize("counts", [[[7]], [[30, 30]], [[1, 999]], [[100, 37, 5]], [[5, 23, 13], [1, 40]]])
def test_buckets_take_turns_evenly(counts: list[list[int]]) -> None:
    for seed in range(3):
        batches = BucketBatches(numbered(*counts), 4, seed=seed)
        shares, many = [group.share for group in batches.groups], len(batches.groups)
        flat = [count for row in counts for count in row]
        assert shares == pytest.approx([count / sum(flat) for count in flat])
        steps: list[list[int]] = [[] for _ in shares]
        for step in range(400):
            group, before = batches.bucket_at_step(step)
            assert before == len(steps[group])
            steps[group].append(step)
            # One step beside its share at most, and what all the others can be ahead or behind together.
            assert all(abs(len(some) - share * (step + 1)) < 1 + share * max(0, many - 2)
                       for some, share in zip(steps, shares, strict=True))
        for some, share in zip(steps, shares, strict=True):
            assert all(abs(gap - 1 / share) < max(1, many) for gap in np.diff(some).tolist())


def test_a_late_step_is_found_at_once() -> None:
    batches = BucketBatches(TWO, 4, seed=1)
    for late in (10**4, 10**7, 10**10):
        began = time.process_time()
        turns = [batches.bucket_at_step(step) for step in range(late, late + 100)]
        assert time.process_time() - began < 5  # to count them out would take minutes
        last: dict[int, int] = {}
        for number, before in turns:
            assert before == last.get(number, before - 1) + 1
            assert abs(before - late * batches.groups[number].share) < 100 * batches.groups[number].share + 2
            last[number] = before
        assert len(last) >= len(batches.groups) - 1  # the bucket of one clip has a turn in about 82 steps
        assert [batches.batch(step) for step in (late + 9, late)] == [
            next(iter(BucketBatches(TWO, 4, seed=1, start=step))) for step in (late + 9, late)]


def seen_of(batches: BucketBatches, buckets: Buckets) -> list[float]:
    """The part of all picks that each cache has, and each bucket of it."""
    picked = Counter(pick.clip for some in batches for pick in some)
    counts = [[sum(picked[clip] for clip in clips.tolist()) for clips in cache.values()] for cache in buckets]
    return [part / picked.total() for row in counts for part in (sum(row), *row)]


def test_weights_set_the_share_of_each_cache() -> None:
    total, steps = 5 + 23 + 13 + 1 + 40, 1000
    near = {"abs": 4 / steps}
    assert seen_of(BucketBatches(TWO, 4, steps=steps), TWO) == pytest.approx(
        [n / total for n in (41, 5, 23, 13, 41, 1, 40)], **near)
    by_weight = [.25, .25 * 5 / 41, .25 * 23 / 41, .25 * 13 / 41, .75, .75 / 41, .75 * 40 / 41]
    assert seen_of(BucketBatches(TWO, 4, weights=[1, 3], steps=steps), TWO) == pytest.approx(by_weight, **near)
    sizes = {"1x16x16": 16, "5x16x16": 4, "9x16x16": 1}  # a batch of images may be larger, and they come no more often
    batches = BucketBatches(TWO, sizes, weights=[1, 3], steps=steps)
    assert seen_of(batches, TWO) == pytest.approx(by_weight, abs=.01)
    names = {clip: name for cache in TWO for name, clips in cache.items() for clip in clips.tolist()}
    assert all(len(some) == sizes[names[some[0].clip]] for some in batches)

    assert seen_of(BucketBatches(TWO, 4, weights=[0, .1], steps=300), TWO)[:4] == [0] * 4
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(UserError, match="2 caches need as many finite weights"):
            BucketBatches(TWO, 4, weights=weights)
    with pytest.raises(UserError, match="no clip"):
        BucketBatches([{}], 4)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLODVAE:
    return tiny_vae()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of 5 frames, three of 9, and a photo; their names are their captions."""
    folder = tmp_path_factory.mktemp("videos")
    for k, frames in enumerate([5] * 5 + [9] * 3):
        write_noise(folder / f"clip_{k}.mp4", k, frames)
    write_noise_photo(folder / "photo.png")
    return folder


def built(videos: Path, folder: Path, vae: AutoencoderKLODVAE, store: Any) -> LatentCache:
    build_cache(videos, folder, vae, store=store, frames=[5, 9], sizes=[(16, 16)], shard_clips=4, batch=2, workers=1,
                psnr_clips=0)
    return LatentCache(folder)


@pytest.fixture(scope="module")
def means(videos: Path, vae: AutoencoderKLODVAE, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return built(videos, tmp_path_factory.mktemp("means") / "cache", vae, "mean")


@pytest.fixture(scope="module")
def moments(videos: Path, vae: AutoencoderKLODVAE, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return built(videos, tmp_path_factory.mktemp("moments") / "cache", vae, "moments")


def test_reading_is_by_number_and_reaches_no_file(means: LatentCache, moments: LatentCache) -> None:
    assert {name: len(clips) for name, clips in means.buckets.items()} == {
        "1x16x16": 1, "5x16x16": 5, "9x16x16": 3}
    assert sorted(np.concatenate(list(means.buckets.values())).tolist()) == list(range(len(means))) == list(range(9))
    twins = {caption: i for i, caption in enumerate(moments.captions)}
    for name, clips in means.buckets.items():
        for i in clips.tolist():
            twin = twins[means.captions[i]]
            assert list(means.entry(i).shape) == means.shapes[i].tolist() == moments.shapes[twin].tolist()
            assert means.entry(i).shape[1] == 1 + (int(name.split("x")[0]) - 1) // 4
            assert torch.equal(means.stored(i), means.entry(i)) and len(moments.stored(twin)) == 8
            assert torch.equal(means.entry(i), moments.entry(twin)) and torch.equal(means.entry(i), means.entry(i - 9))
    with pytest.raises(IndexError):
        means.entry(-10)
    mapped = LatentCache(means.path)
    mapped.entry(3).fill_(7)
    assert (mapped.entry(3) == 7).all()  # no copy
    assert torch.equal(LatentCache(means.path).entry(3), means.entry(3))


def test_an_item_is_normalised_by_what_was_measured(means: LatentCache, moments: LatentCache) -> None:
    dataset = LatentDataset(means)
    items = [dataset[i] for i in range(len(dataset))]
    assert [item["id"] for item in items] == means.ids and [item["caption"] for item in items] == means.captions
    assert sorted(means.captions)[-2:] == ["clip 7", "photo"]
    flat = torch.cat([item["latents"].flatten(1) for item in items], 1).double()
    assert items[0]["latents"].dtype == torch.float32
    assert flat.mean(1).tolist() == pytest.approx([0] * 4, abs=1e-5)
    assert flat.std(1, correction=0).tolist() == pytest.approx([1] * 4, abs=1e-5)
    raw = LatentDataset(means, normalise=False)
    assert all(torch.equal(raw[i]["latents"], means.entry(i).float()) for i in range(9))
    with pytest.raises(IndexError):
        dataset[9]
    assert [dataset.shape(i) for i in range(9)] == list(map(tuple, means.shapes.tolist()))
    longest = means.buckets["9x16x16"].tolist()[0]
    assert torch.equal(dataset.latent(longest, [(0, 1), (2, 3)]), means.entry(longest)[:, [0, 2]].float())

    both = LatentDataset([means, moments])
    assert len(both) == 18 and both[9]["id"] == moments.ids[0]
    assert [sorted(cache) for cache in both.buckets()] == [["1x16x16", "5x16x16", "9x16x16"]] * 2
    assert sorted(np.concatenate([clips for cache in both.buckets() for clips in cache.values()])) == list(range(18))
    alone = LatentDataset(moments)
    assert torch.equal(both[12]["latents"], alone[3]["latents"])  # measured on the same latents
    for some in BucketBatches(both.buckets(), 3, weights=[1, 2], steps=40):
        assert len({tuple(both[pick]["latents"].shape) for pick in some}) == 1


def test_each_epoch_draws_a_sample_of_its_own(means: LatentCache, moments: LatentCache) -> None:
    dataset = LatentDataset(moments, normalise=False, sample=True, seed=5)
    mean, log_variance = moments.stored(4).float().chunk(2)
    std = (log_variance / 2).exp()
    first = dataset[SampleKey(4, 0)]["latents"]
    assert torch.equal(first, dataset[4]["latents"])
    assert torch.equal(first, LatentDataset(moments, normalise=False, sample=True, seed=5)[SampleKey(4, 0)]["latents"])
    for other in (dataset[SampleKey(4, 1)], LatentDataset(moments, normalise=False, sample=True, seed=6)[4]):
        assert not torch.isclose(first, other["latents"]).any()
    epochs = 400
    noise = torch.stack([(dataset[SampleKey(4, epoch)]["latents"] - mean) / std for epoch in range(epochs)])
    assert noise.mean(0).abs().max() < 5 / epochs ** .5 and abs(float(noise.std()) - 1) < .05
    same = next(i for i in range(9) if i != 4 and moments.shapes[i].tolist() == moments.shapes[4].tolist())
    stored = moments.stored(same).float().chunk(2)
    assert not torch.isclose(noise[0], (dataset[same]["latents"] - stored[0]) / (stored[1] / 2).exp()).any()
    normal = LatentDataset(moments, sample=True, seed=5)[SampleKey(4, 3)]["latents"]
    by_hand = [torch.tensor(values).view(4, 1, 1, 1) for values in (moments.latents_mean, moments.latents_std)]
    assert torch.allclose(normal, (dataset[SampleKey(4, 3)]["latents"] - by_hand[0]) / by_hand[1], atol=1e-6)
    for caches in (means, [moments, means]):
        with pytest.raises(UserError, match="no log-variances"):
            LatentDataset(caches, sample=True)


def test_caches_of_different_vaes_do_not_mix(means: LatentCache, tmp_path: Path) -> None:
    other = Path(shutil.copytree(means.path, tmp_path / "other"))
    header = json.loads((other / "header.json").read_text())
    header["vae"]["fingerprint"] = header["vae"]["fingerprint"][::-1]
    (other / "header.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="different VAEs"):
        LatentDataset([means, LatentCache(other)])


def test_workers_and_copies_read_the_same(means: LatentCache, moments: LatentCache) -> None:
    unread = LatentCache(means.path)
    before = len(pickle.dumps(unread))
    unread.entry(0)
    assert len(pickle.dumps(unread)) == before  # no latents travel to a worker
    dataset = LatentDataset([moments], sample=True)
    for copy in (pickle.loads(pickle.dumps(dataset)), LatentDataset([LatentCache(moments.path)], sample=True)):
        assert all(torch.equal(copy[i]["latents"], dataset[i]["latents"]) for i in range(9))
    assert torch.equal(pickle.loads(pickle.dumps(means)).entry(5), means.entry(5))

    batches = BucketBatches(dataset.buckets(), 2, start=3, steps=10)
    alone, helped = (list(DataLoader(dataset, batch_sampler=batches, num_workers=workers)) for workers in (0, 2))
    assert len(alone) == len(helped) == 10 and alone[0]["latents"].shape[:2] == (2, 4)
    for one, two, picks in zip(alone, helped, batches, strict=True):
        assert one["id"] == two["id"] == [moments.ids[pick.clip] for pick in picks]
        assert one["caption"] == two["caption"] and torch.equal(one["latents"], two["latents"])
