"""The queue as a user sees it."""

from __future__ import annotations

from app.storage.jobs import JobKind
from app.ui.html.queue import expected_starts


def test_a_job_counts_those_that_end_before_it_starts(harness):
    store = harness.service.store
    for name in "abcd":
        store.submit(JobKind.GENERATE, "", {}, name)

    def before() -> list[int]:
        return [count for count, _ in harness.service.queue("")]

    assert before() == [0, 1, 2, 3]
    store.claim(0)
    assert before() == [1, 2, 3]
    for number in range(2):
        store.set_worker(number, "ready")
    assert before() == [0, 1, 2]
    store.claim(1)
    assert before() == [1, 2]


def test_a_job_waits_for_those_that_it_conflicts_with(harness):
    service = harness.service
    for number in range(3):
        service.store.set_worker(number, "ready")
    first, second = (service.store.submit(JobKind.CACHE, "", {"name": "one"}, "") for _ in range(2))
    other = service.store.submit(JobKind.CACHE, "", {"name": "two"}, "")
    for _ in range(2):  # queued, then running
        assert [(job.id, count) for count, job in service.queue("") if job.id != first.id] == [
            (second.id, 1), (other.id, 0)]
        starts = expected_starts(service.services)
        assert starts[other.id] == 0 and second.id not in starts
        service.store.claim(0)
