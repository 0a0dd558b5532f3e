"""Property tests of pure functions and of the job store, with the same examples in every run."""

from __future__ import annotations

import tempfile
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from app.storage.jobs import JobKind, JobSignal, JobState
from app.storage.store import MAX_ATTEMPTS, JobStore
from app.storage.uploads import MAX_NAME_LENGTH, sanitize_filename
from lvdm.model.groups import group_sizes
from lvdm.sampling.rollout import group_layout
from odvae.cache.build.plan import ClipPolicy
from odvae.cache.dataset import BucketBatches
from odvae.data.video.reader import count_frames
from odvae.inference.streaming import rechunk
from odvae.model.tiling import blend_weights, tile_spans
from odvae.utils.config import Config, load_config, override, save_config

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None,
               suppress_health_check=[HealthCheck.too_slow])


# ---- streams, groups, tiles ----


@FEW
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 7), st.integers(1, 7))
def test_rechunking_keeps_every_frame_in_order(lengths, first, step):
    stream = torch.arange(sum(lengths)).view(1, 1, -1, 1, 1)
    chunks = list(rechunk(stream.split(lengths, dim=2), first, step))
    assert torch.equal(torch.cat([stream[:, :, :0], *chunks], dim=2), stream)
    sizes = [first, *[step] * len(chunks)]
    assert all(chunk.shape[2] == size for chunk, size in zip(chunks[:-1], sizes, strict=False))
    assert not chunks or 1 <= chunks[-1].shape[2] <= sizes[len(chunks) - 1]


@FEW
@given(st.integers(1, 60), st.data(), st.integers(1, 8))
def test_a_group_layout_sums_to_the_clip_and_new_groups_are_full(latents, data, group_size):
    initial = data.draw(st.integers(0, latents))
    layout = group_layout(latents, initial, group_size)
    assert sum(layout) == latents and layout[0] == 1 and min(layout) >= 1 and max(layout) <= max(1, group_size)
    if initial:
        ends = np.cumsum(layout).tolist()
        assert initial in ends  # initial and new latents share no group
        assert all(size == group_size for size in layout[ends.index(initial) + 1:-1])
    else:
        assert layout == group_sizes(latents, group_size)


@FEW
@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_tiles_cover_a_side_overlap_enough_and_their_weights_sum_to_one(size, tile, data):
    overlap = data.draw(st.integers(0, tile // 2))
    tiles = tile_spans(size, tile, overlap)
    assert tiles[0][0] == 0 and tiles[-1][1] == size
    assert all(stop - start == min(tile, size) for start, stop in tiles)
    assert all(a_stop - b_start >= overlap and b_start > a_start
               for (a_start, a_stop), (b_start, _) in pairwise(tiles))
    total = torch.zeros(size)
    for (start, stop), weight in zip(tiles, blend_weights(tiles, total), strict=True):
        assert weight.min() >= 0
        total[start:stop] += weight
    torch.testing.assert_close(total, torch.ones(size))


# ---- clips and batches ----


@FEW
@given(st.sampled_from(["back-to-back", "scenes", "every:0.7", "every:10", "uniform:1", "uniform:4", "whole"]),
       st.floats(0, 100), st.floats(0.01, 30), st.sets(st.integers(1, 12).map(lambda k: 1 + 4 * k), min_size=1),
       st.lists(st.floats(0, 130), max_size=4), st.sampled_from([4.0, 8.0, 23.976]))
def test_clips_stay_inside_their_span(policy, begin, seconds, lengths, cuts, rate):
    """No clip exceeds the span or crosses a cut, each has one of the requested lengths, and where a clip fits there is
    one."""
    end = begin + seconds
    spans = ClipPolicy.parse(policy).spans(begin, end, sorted(lengths), rate, 4, cuts)
    for start, frames in spans:
        assert frames in lengths and begin <= start and start + (frames - 1) / rate < end
        if policy == "scenes":
            assert not any(start < cut < start + (frames - 1) / rate - 1e-6 for cut in cuts)
    if policy != "scenes":
        assert bool(spans) == (count_frames(end - begin, rate) >= min(lengths))
    # The last frame of a scene's clip starts before the next scene, but may be shown beyond its start.
    frames_before = {"back-to-back": 0, "scenes": 1}
    if policy in frames_before:
        assert all(a + (n - frames_before[policy]) / rate <= b + 1e-6 for (a, n), (b, _) in pairwise(spans))
    if policy.startswith("uniform") and spans:
        assert len(spans) == int(policy.removeprefix("uniform:"))


@settings(FEW, max_examples=20)
@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=3), min_size=1, max_size=2), st.integers(1, 4),
       st.integers(1, 3), st.integers(0, 5))
def test_batches_contain_one_bucket_and_every_clip_once_per_epoch(caches, batch, world, seed):
    buckets, bucket_of = [], dict[int, tuple[int, str]]()
    for number, counts in enumerate(caches):
        buckets.append({f"{4 * k + 1}x16x16": np.arange(count) + len(bucket_of) + sum(counts[:k])
                        for k, count in enumerate(counts)})
        bucket_of |= {int(clip): (number, name) for name, clips in buckets[-1].items() for clip in clips}
    ranks = [BucketBatches(buckets, batch, seed=seed, rank=rank, world=world, steps=30) for rank in range(world)]
    steps = [list(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    assert all(len({bucket_of[key.clip] for key in step}) == 1 and len(step) == batch * world for step in steps)
    drawn = [key for step in steps for key in step]
    assert len(set(drawn)) == len(drawn)
    for bucket in set(bucket_of.values()):
        clips = [clip for clip, name in bucket_of.items() if name == bucket]
        epochs = [key.epoch for key in drawn if bucket_of[key.clip] == bucket]
        assert epochs == sorted(epochs)
        assert all(epochs.count(epoch) == len(clips) for epoch in set(epochs[:-1]) - set(epochs[-1:]))
    one = BucketBatches(buckets, batch * world, seed=seed, start=7)
    assert list(islice(one, 5)) == steps[7:12]  # depends on seed and step, not on the number of processes


# ---- configs and names ----


class Inner(Config):
    size: int = 1
    name: str = "a"
    rates: tuple[float, ...] = (0.5,)


class Outer(Config):
    text: str = ""
    flag: bool = False
    first: Inner = Inner()
    second: Inner = Inner(size=7)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
INNER: dict[str, st.SearchStrategy[Any]] = {
    "size": st.integers(), "name": st.text(st.characters(exclude_categories=["C"])),
    "rates": st.lists(FINITE, max_size=3).map(tuple)}
PARTIAL = st.fixed_dictionaries({}, optional=INNER)


@FEW
@given(st.fixed_dictionaries({}, optional={"text": INNER["name"], "flag": st.booleans(), "first": PARTIAL,
                                           "second": PARTIAL}))
def test_a_config_takes_overrides_keeps_the_rest_and_reloads(values):
    config = override(Outer(), values, "values")
    expected = Outer().model_dump()
    for key, value in values.items():
        expected[key] = expected[key] | value if isinstance(value, dict) else value
    assert config.model_dump() == expected
    with tempfile.TemporaryDirectory() as folder:
        save_config(config, Path(folder, "c.yaml"))
        assert load_config(Outer, Path(folder, "c.yaml")) == config


@settings(FEW, max_examples=100)
@given(st.text() | st.text("./\\ -:CONcon1\0\u202e\ud800é", max_size=150))
def test_a_sanitized_name_is_short_printable_no_path_and_stable(name):
    safe = sanitize_filename(name)
    assert 0 < len(safe) <= MAX_NAME_LENGTH and safe not in (".", "..") and not set(safe) & set('/\\<>:"|?*\0')
    assert safe.isprintable() and safe[0] not in " .-" and safe[-1] not in " ."
    assert sanitize_filename(safe) == safe


# ---- the job store ----


class StoreMachine(RuleBasedStateMachine):
    """Users, two workers and crashes act in any order; a model tracks each job's state."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = JobStore(Path(self.folder.name) / "jobs.sqlite")
        self.states: dict[str, JobState] = {}
        self.running: dict[int, str] = {}  # by worker

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(target=jobs, owner=st.sampled_from("ab"))
    def submit(self, owner):
        job = self.store.submit(JobKind.GENERATE, owner, {}, "title")
        self.states[job.id] = JobState.QUEUED
        return job.id

    @rule(worker=st.integers(0, 1))
    def claim(self, worker):
        if worker not in self.running:
            first = next(iter(self.store.queue()), None)
            job = self.store.claim(worker)
            assert (job and job.id) == (first and first.id)
            if job is not None:
                self.running[worker], self.states[job.id] = job.id, JobState.RUNNING

    @rule(job=jobs, signal=st.sampled_from([JobSignal.PAUSE, JobSignal.STOP, JobSignal.CANCEL]))
    def signal(self, job, signal):
        before, state = self.store.get(job), self.states.get(job)
        self.store.signal(job, signal)
        if state in (JobState.QUEUED, JobState.PAUSED):
            after = JobState.QUEUED if signal is JobSignal.STOP and before.revision else JobState.CANCELLED
            self.states[job] = JobState.PAUSED if signal is JobSignal.PAUSE else after

    @rule(job=jobs)
    def requeue(self, job):
        possible = self.states.get(job) not in (None, JobState.QUEUED, JobState.RUNNING)
        assert self.store.requeue(job) == possible
        if possible:
            self.states[job] = JobState.QUEUED

    @rule(job=jobs, by=st.integers(-3, 3))
    def move(self, job, by):
        self.store.move(job, by)

    @rule(job=jobs)
    def delete(self, job):
        possible = self.states.get(job) not in (None, JobState.RUNNING)
        assert self.store.delete(job) == possible
        if possible:
            del self.states[job]

    @rule(worker=st.integers(0, 1))
    def publish(self, worker):
        if worker in self.running:
            self.store.update_result(self.running[worker], frames=1)

    @rule(worker=st.integers(0, 1), state=st.sampled_from([JobState.DONE, JobState.FAILED, JobState.STOPPED,
                                                           JobState.PAUSED, JobState.QUEUED]))
    def finish(self, worker, state):
        if worker in self.running:
            self.store.finish(self.running[worker], state)
            self.states[self.running.pop(worker)] = state

    @rule(worker=st.integers(0, 1))
    def crash(self, worker):
        """A worker dies, and another one takes its place."""
        for job in self.store.recover(worker):
            self.states[job.id] = (JobState.CANCELLED if job.signal is JobSignal.CANCEL else
                                   JobState.PAUSED if job.signal is JobSignal.PAUSE else
                                   JobState.FAILED if job.attempts >= MAX_ATTEMPTS else JobState.QUEUED)
        self.running.pop(worker, None)

    @invariant()
    def states_equal_those_of_the_model(self):
        jobs = self.store.find()
        assert {job.id: job.state for job in jobs} == self.states
        assert all((job.finished is not None) == job.state.ended for job in jobs)

    @invariant()
    def the_queue_contains_queued_jobs_once_and_keeps_the_order_of_each_owner(self):
        queue = self.store.queue()
        queued = [job for job, state in self.states.items() if state is JobState.QUEUED]
        assert sorted(job.id for job in queue) == sorted(queued)
        for owner in "ab":
            positions = [job.position for job in queue if job.owner == owner and not job.priority]
            assert positions == sorted(positions)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(FEW, max_examples=8, stateful_step_count=25)
