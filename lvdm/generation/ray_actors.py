"""Generate on a cluster of Ray: each actor has a pipeline and takes batch after batch of the command's videos."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odvae.cache.build.executors.process import portable
from odvae.cache.build.executors.ray_actors import connect, plan_actors
from odvae.cache.build.settings import BuildSettings
from odvae.utils.errors import UserError
from odvae.utils.files import remove_temporaries
from odvae.utils.progress import bar

from .arguments import Arguments, load_requests, sheet_path
from .fingerprints import fingerprints
from .generate import GenerationReport, check, enable_offload, render_pending, write_sheet
from .pending import PendingVideo, batches, build_metadata

MAX_DEATHS = 3  # of a batch's actors before its videos have failed, and of actors in a row that do not start
PATIENCE = 60.0  # s without a worker after which a line says so

logger = logging.getLogger(__name__)
Batch = tuple[int, ...]  # numbers of requests
Outcome = tuple[Any, BaseException | None]  # what was returned, or raised


class _Actor:
    """A pipeline on a node. Errors are returned: Ray would wrap what is raised.

    Args:
        folder: the current folder of the command, to which paths are relative.
    """

    def __init__(self, args: Arguments, folder: str, device: str) -> None:
        self._args, self._folder = args, folder
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def call(self, name: str, *arguments: Any) -> Outcome:
        """Call one of the methods below."""
        try:
            return getattr(self, name)(*arguments), None
        except Exception as error:
            return None, portable(error)

    def load(self) -> None:
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise UserError(f"{socket.gethostname()} has no folder {self._folder}; generate from a folder that all "
                            "nodes share") from error
        self._pipeline, self._requests = load_requests(self._args)
        self._parts = fingerprints(self._pipeline)
        enable_offload(self._pipeline, self._args.offload)

    def plan(self) -> tuple[list[str], list[Path], list[Batch]]:
        """Return the names of all videos, those that are finished, and the batches of the others: the same as on one
        machine, as a video's last bits depend on its batch."""
        check(self._requests, self._args.batch)
        videos = self._pending(range(len(self._requests)), self._args.overwrite)
        numbers = {id(video): number for number, video in enumerate(videos)}
        finished = [video.request.target for video in videos if video.finished]
        planned = [tuple(numbers[id(video)] for video in group) for group in batches(videos, self._args.batch)
                   if not all(video.finished for video in group)]
        return [str(request.target) for request in self._requests], finished, planned

    def render(self, batch: Batch) -> GenerationReport:
        report = render_pending(self._pipeline, self._pending(batch, self._args.overwrite), len(batch))
        report.reused.clear()  # they are in the plan
        return report

    def draw(self) -> Path | None:
        """Write the contact sheet."""
        sheet = sheet_path(self._args, self._requests)
        written = [k for k, request in enumerate(self._requests) if request.target.is_file()]
        return None if sheet is None else write_sheet(self._pending(written, False), sheet)

    def _pending(self, numbers: Any, overwrite: bool) -> list[PendingVideo]:
        requests = [self._requests[number] for number in numbers]
        return [PendingVideo(request, build_metadata(self._pipeline, request, self._parts), overwrite)
                for request in requests]


@dataclass
class _End:
    """The end of a call of an actor: its result, or why the actor died."""

    name: str
    batch: Batch
    result: Any = None
    died: str = ""


class _Actors:
    """The actors of a command, each of which is at one call. `start` starts one."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._calls: dict[Any, tuple[Any, str, Batch]] = {}  # actor, method and batch, by Ray's reference
        self._idle: list[Any] = []
        self._failed_starts = 0  # in a row
        self.has_lost = False  # whether one died

    def __enter__(self) -> _Actors:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in [*self._idle, *(actor for actor, *_ in self._calls.values())]:
            ray.kill(actor)

    def add(self) -> None:
        """Start an actor, which loads its pipeline."""
        self._call(self._start(), "load")

    def ask(self, name: str) -> Any:
        """Return what a method of any actor returns. Raises what it raises."""
        for _ in range(MAX_DEATHS):
            while not self._idle:
                self._wait()
            self._call(self._idle.pop(), name)
            while (end := self._wait()).name != name:
                pass
            if not end.died:
                return end.result
        raise UserError(f"{MAX_DEATHS} workers died one after the other ({end.died}); give them more memory, or see "
                        "Ray's logs")

    def render(self, planned: Sequence[Batch]) -> Iterator[tuple[Batch, GenerationReport | str]]:
        """Render batches, and yield each with its report. The batch of an actor that dies goes to another one; of one
        that costs `MAX_DEATHS` of them the reason is yielded."""
        queue, deaths = deque(planned), Counter[Batch]()
        left = len(queue)
        while left:
            while queue and self._idle:
                self._call(self._idle.pop(), "render", queue.popleft())
            end = self._wait()
            if end.name != "render":
                continue
            # A worker that died may still have been writing when the next one began: what failed then is tried again.
            is_hurt = bool(end.died or (deaths[end.batch] and end.result.failed))
            deaths[end.batch] += is_hurt
            if is_hurt and deaths[end.batch] < MAX_DEATHS:
                queue.appendleft(end.batch)
                continue
            left -= 1
            yield end.batch, end.died or end.result

    def _call(self, actor: Any, name: str, batch: Batch = ()) -> None:
        reference = actor.call.remote(name, *([batch] if batch else []))
        self._calls[reference] = actor, name, batch

    def _wait(self) -> _End:
        """Wait for the end of a call. Raises what it raised. If its actor died, start another one."""
        import ray

        if not self._calls:
            raise UserError(f"no worker is left: {self._failed_starts} died while they loaded the pipeline; give them "
                            "more memory, or see Ray's logs")
        while not (done := ray.wait(list(self._calls), timeout=PATIENCE)[0]):
            if {name for _, name, _ in self._calls.values()} == {"load"}:
                logger.warning("waiting for a worker; it has not started yet")
        actor, name, batch = self._calls.pop(done[0])
        try:
            result, error = ray.get(done[0])
        except ray.exceptions.RayError as failure:
            ray.kill(actor)
            died = str(failure).splitlines()[0]
            logger.warning("a worker died: %s", died)
            self.has_lost = True
            self._failed_starts = self._failed_starts + 1 if name == "load" else 0
            if self._failed_starts < MAX_DEATHS:
                self.add()
            return _End(name, batch, died=died)
        self._failed_starts = 0
        self._idle.append(actor)
        if error is not None:
            raise error
        return _End(name, batch, result)


def generate_on_ray(args: Arguments) -> GenerationReport:
    """Generate the videos of a command line on a cluster of Ray, or on one that is started on this machine.

    Raises:
        UserError: as `generate`; the cluster cannot be reached; no actor can load the pipeline.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--on ray needs Ray: pip install 'odvae-lvdm[ray]'") from error
    settings = BuildSettings(devices=(args.devices,) if args.devices else ())
    disconnect = connect(args.address)
    try:
        gpus, cpus, count = plan_actors(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        sent = Arguments(**{name: value for name, value in vars(args).items() if name != "run"})
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Actor)
        with _Actors(lambda: remote.remote(sent, os.getcwd(), "cuda" if gpus else "cpu")) as actors:
            return _generate(actors, count)
    finally:
        disconnect()


def _generate(actors: _Actors, count: int) -> GenerationReport:
    """Generate with at most `count` actors."""
    actors.add()
    targets, finished, planned = actors.ask("plan")
    report = GenerationReport(reused=finished)
    for _ in range(min(count, len(planned)) - 1):
        actors.add()
    with bar(len(targets), "generate", "video", initial=len(finished)) as progress:
        for batch, part in actors.render(planned):
            if isinstance(part, str):
                reason = f"{MAX_DEATHS} workers died of it ({part})"
                part = GenerationReport(failed=[(Path(targets[number]), reason) for number in batch])
            report.add(part)
            progress.update(len(part.generated) + len(part.failed))
    if actors.has_lost:
        for target in map(Path, targets):
            remove_temporaries(target.parent, f"{target.stem[:40]}*")  # a name is cut where it is long
    order = {Path(target): number for number, target in enumerate(targets)}
    report.generated.sort(key=order.__getitem__)
    report.failed.sort(key=lambda failed: order[failed[0]])
    report.check()
    report.sheet = actors.ask("draw")
    return report
