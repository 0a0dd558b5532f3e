"""Which jobs cannot run at once: one writes what the other reads or writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from app.config import AppConfig
from app.storage.asset_scanner import asset_id
from app.storage.jobs import Job, JobKind


def must_wait(config: AppConfig, job: Job, running: Sequence[Job]) -> bool:
    """Whether a queued job must wait for one of the running ones."""
    reads, writes = _reads(job), _writes(config, job)
    return any(not (reads | writes).isdisjoint(_writes(config, other)) or not writes.isdisjoint(_reads(other))
               for other in running)


def _reads(job: Job) -> set[str]:
    """The ids of the jobs and the assets that a job reads while another may write them."""
    return {job.params.get("job", ""), *job.params.get("caches", ())} - {""}


def _writes(config: AppConfig, job: Job) -> set[str]:
    """The ids of the job, and of the cache or run that it writes."""
    kind = {JobKind.CACHE: "cache", JobKind.TRAIN: "run"}.get(job.kind)
    if kind is None:
        return {job.id}
    if name := job.params.get("name"):
        return {job.id, asset_id(Path(os.path.abspath(config.workspace)) / f"{kind}s" / name)}
    return {job.id, job.params.get(kind, "")} - {""}
