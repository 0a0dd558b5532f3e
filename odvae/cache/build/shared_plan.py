"""The plan that the processes of one build follow: which clips each shard holds, in work/plan.json.

The first process writes it, and it stays until all its shards are committed. So a restarted build continues with the
shards that a killed one began.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ...data.failures import is_still_valid
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
    shards: list[list[str]]  # IDs of clips


def agree_on_shards(
    cache: Path,
    items: Sequence[PlannedClip],
    lease: BuildLease,
    *,
    retry: bool,
    file_seconds: float,
    assign: Callable[[Sequence[PlannedClip]], list[list[PlannedClip]]],
) -> tuple[dict[str, list[PlannedClip]], ShardIndex]:
    """Return the shards to encode, by name, and the index of those in the cache.

    The shards are those of the plan of a running or interrupted build, else of the missing clips. Clips with a
    transient failure count as missing.

    Args:
        items: all clips of the source.
        retry: retry every clip that failed.
        file_seconds: clips that timed out under a lower limit are retried.
        assign: distributes clips over shards.

    Raises:
        UserError: other processes follow another plan.
    """
    path, key = _path(cache), plan_key(items)
    by_id = {item.id: item for item in items}
    with _claimed(lease):
        # The plan first: if it is gone, all of its shards are committed and are read after it. Both under the claim,
        # because its holder may change existing shards.
        old, shard_index = _read(path), ShardIndex(cache)
        peers = lease.live_peers()
        if not peers:
            shard_index.remove_orphans()
        follows = old is not None and old.key == key and not (retry and not peers)
        if old is not None and not follows and peers:
            raise UserError(f"{path} is damaged while others build {cache}; wait for them ({', '.join(peers)})"
                            if old.key == DAMAGED else
                            f"others are building {cache} from another source, or with other settings; wait for them "
                            f"({', '.join(peers)})")
        retried = {clip for clip, entry in shard_index.failed.items() if clip in by_id and clip not in shard_index.ids
                 and (retry or not is_still_valid(entry["kind"], entry.get("limit"), file_seconds))}
        if old is not None and follows:
            shards = [[by_id[clip] for clip in shard] for shard in old.shards]
            pending = {item.id for shard in shards for item in shard if not shard_index.committed(_name(shard))}
            new = [] if peers else assign([item for item in items if item.id in retried - pending])
        else:
            shards = []
            new = assign([item for item in items if item.id not in shard_index.ids
                          and (item.id in retried or item.id not in shard_index.failed)])
        if new or not follows:
            plan = PlanFile(key=key, shards=[[item.id for item in shard] for shard in shards + new])
            lease.write(path, plan.model_dump_json().encode())
        if not (follows and peers):  # after writing the plan: a process that is killed here leaves no clip out
            shard_index.forget_failures(retried, lease)
    return {_name(shard): shard for shard in shards + new}, shard_index


def forget_plan(cache: Path, items: Sequence[PlannedClip], lease: BuildLease) -> None:
    """Delete the finished plan, unless a plan of another source has replaced it."""
    with _claimed(lease):
        old = _read(_path(cache))
        if old is not None and old.key == plan_key(items):
            _path(cache).unlink(missing_ok=True)


def drop_plan(cache: Path) -> None:
    """Delete the plan, so that the next build plans again. Only while no other process is running."""
    _path(cache).unlink(missing_ok=True)


def _path(cache: Path) -> Path:
    return cache / "work" / "plan.json"


def _name(shard: Sequence[PlannedClip]) -> str:
    return fmt.shard_name(shard[0].bucket, [item.id for item in shard])


@contextmanager
def _claimed(lease: BuildLease) -> Iterator[None]:
    while not lease.claim("plan"):
        time.sleep(WAIT)
    try:
        yield
    finally:
        lease.release("plan")


def _read(path: Path) -> PlanFile | None:
    try:
        return PlanFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:  # after a power failure, say; the shards themselves show what is done
        logger.warning("%s is damaged; planning again what is missing", path)
        return PlanFile(key=DAMAGED, shards=[])
