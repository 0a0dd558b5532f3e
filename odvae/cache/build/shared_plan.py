"""The plan that the processes of one build follow: which clips each shard holds, in work/plan.json.

The first process writes it, and it stays until all its shards are committed. So a build that was killed continues with
the shards that it began.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ...data.failures import still_counts
from ...utils.errors import UserError
from .. import format as fmt
from ..lease import BuildLease
from .plan import PlannedClip, plan_key
from .probe import WAIT
from .shard_index import ShardIndex

logger = logging.getLogger(__name__)
DAMAGED = "damaged"


class PlanFile(BaseModel):
    key: str  # see `plan.plan_key`
    shards: list[list[str]]  # ids of clips


def agree_on_shards(
    cache: Path,
    items: Sequence[PlannedClip],
    here: BuildLease,
    *,
    retry: bool,
    file_seconds: float,
    cut: Callable[[Sequence[PlannedClip]], list[list[PlannedClip]]],
) -> tuple[dict[str, list[PlannedClip]], ShardIndex]:
    """The shards that are to be made, by name: as they stand in the plan of a build that is at work, or that was
    interrupted; else of what is missing. Clips whose failure may have passed are missing, too. And what is there.

    Args:
        items: all clips of the source.
        retry: try every clip again that failed.
        file_seconds: clips that needed more than a lower limit are tried again.
        cut: clips into shards.

    Raises:
        UserError: other processes follow another plan.
    """
    path, key = _path(cache), plan_key(items)
    by_id = {item.id: item for item in items}
    with _claimed(here):
        # First the plan: where it is gone, all of its shards are committed, and are seen after it. Both under the
        # claim, as whoever has it may change shards that are there.
        old, contents = _read(path), ShardIndex(cache)
        others = here.live_peers()
        if not others:
            contents.remove_orphans()
        follows = old is not None and old.key == key and not (retry and not others)
        if old is not None and not follows and others:
            raise UserError(f"{path} is damaged while others build {cache}; wait for them ({', '.join(others)})"
                            if old.key == DAMAGED else
                            f"others are building {cache} from another source, or with other settings; wait for them "
                            f"({', '.join(others)})")
        again = {clip for clip, entry in contents.failed.items() if clip in by_id and clip not in contents.ids
                 and (retry or not still_counts(entry["kind"], entry.get("limit"), file_seconds))}
        if old is not None and follows:
            shards = [[by_id[clip] for clip in shard] for shard in old.shards]
            ahead = {item.id for shard in shards for item in shard if not contents.committed(_name(shard))}
            new = [] if others else cut([item for item in items if item.id in again - ahead])
        else:
            shards = []
            new = cut([item for item in items if item.id not in contents.ids
                       and (item.id in again or item.id not in contents.failed)])
        if new or not follows:
            here.write(path, PlanFile(key=key, shards=[[item.id for item in shard] for shard in shards + new])
                       .model_dump_json().encode())
        if not (follows and others):  # after the plan: a process that is killed here leaves no clip out
            contents.forget_failures(again, here)
    return {_name(shard): shard for shard in shards + new}, contents


def forget_plan(cache: Path, items: Sequence[PlannedClip], here: BuildLease) -> None:
    """It is done. One of another source may have taken its place meanwhile."""
    with _claimed(here):
        old = _read(_path(cache))
        if old is not None and old.key == plan_key(items):
            _path(cache).unlink(missing_ok=True)


def drop_plan(cache: Path) -> None:
    """What is in the cache has changed otherwise: the next build is to plan anew. Only while no other is at work."""
    _path(cache).unlink(missing_ok=True)


def _path(cache: Path) -> Path:
    return cache / "work" / "plan.json"


def _name(shard: Sequence[PlannedClip]) -> str:
    return fmt.shard_name(shard[0].bucket, [item.id for item in shard])


@contextmanager
def _claimed(here: BuildLease) -> Iterator[None]:
    while not here.claim("plan"):
        time.sleep(WAIT)
    try:
        yield
    finally:
        here.release("plan")


def _read(path: Path) -> PlanFile | None:
    try:
        return PlanFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:  # as a power failure may leave it; the shards themselves say what is done
        logger.warning("%s is damaged; what is missing is planned anew", path)
        return PlanFile(key=DAMAGED, shards=[])
