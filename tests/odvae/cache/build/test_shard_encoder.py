"""Ending the work on shards, whatever their threads are at."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from odvae.cache.build.settings import BuildSettings
from odvae.cache.build.shard_encoder import EncodeUnit, ShardEncoder
from odvae.cache.build.usage import Usage


def test_a_failed_shard_ends_the_next_one_that_has_no_clips_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder has gone on to a shard whose clips the feeder has not begun with when everything is closed."""
    workers: Any = SimpleNamespace(count=1, usage=Usage(), cancel=lambda: None)
    nothing: Any = None
    shards = ShardEncoder(nothing, nothing, BuildSettings(), workers, lambda done: None)
    fed, second = threading.Event(), threading.Event()
    encode, shutdown, units = shards._encode_clips, shards._feeder.shutdown, iter("12")

    def feed(unit: EncodeUnit, clips: queue.SimpleQueue[Any]) -> None:
        fed.wait()
        clips.put(None)

    def fail_first(unit: EncodeUnit, clips: Any) -> Any:
        if next(units) == "1":
            raise KeyboardInterrupt
        second.set()
        return encode(unit, clips)

    def shut_down(**options: Any) -> None:
        shutdown(wait=False, **options)
        fed.set()
        shutdown()

    monkeypatch.setattr(shards._decode_ahead, "feed", feed)
    monkeypatch.setattr(shards, "_encode_clips", fail_first)
    monkeypatch.setattr(shards._feeder, "shutdown", shut_down)
    futures = [shards.submit(EncodeUnit(0, 1, name, ())) for name in "12"]
    assert second.wait(60)
    closing = threading.Thread(target=shards.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive() and all(future.done() for future in futures)
