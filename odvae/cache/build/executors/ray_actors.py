"""A worker that is an actor of Ray, with one encoder and its own decode workers: frames stay on their node."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

from ....utils.errors import UserError
from ...encoder import LatentEncoder
from ..settings import BuildSettings
from ..usage import Usage
from .executor import AT_HAND, Executor
from .process import portable
from .runner import RunnerSpec, TaskRunner, tensor_bytes
from .worker import Outcome, Task, WorkerDiedError

MAX_DECODERS = 8  # of an actor with a GPU
LEAVE_SECONDS = 5.0  # for all actors together
# Of actors on a cluster that is started here. Ray's 15, for clusters with other tenants, leaves a build next to nothing
# beside any other program, and its decoders, which are 10 nicer still, no distance to the encoders.
WORKER_NICENESS = 0


class _Actor:
    """The part of a worker that is on its node. Errors are returned: Ray would wrap what is raised."""

    def start(self, spec: RunnerSpec, tensors: bytes, device: str, decoders: int) -> Outcome:
        self._stack = ExitStack()
        try:
            self._runner: TaskRunner = spec.open(tensors, device, decoders, self._stack)
        except Exception as error:
            return Outcome(error=portable(error))
        return Outcome()

    def run(self, task: Task) -> Outcome:
        result, error = None, None
        try:
            result = self._runner.submit(task).result()
        except Exception as raised:
            error = portable(raised)
        return Outcome(result, error, self._runner.usage.take())

    def leave(self) -> None:
        """Give back what would outlive the process: the scratch, which the last actor of a node removes."""
        self._stack.close()


class RayWorker:
    """A `Worker` that is an actor.

    Args:
        tensors: a reference of Ray's to those of the VAE.
        gpus: that it takes, 0 or 1.
        cpus: that it takes: as many decode workers has it.
        thread: sets results; Ray waits for itself if it is called in its own.
    """

    def __init__(self, name: str, spec: RunnerSpec, tensors: Any, gpus: int, cpus: int,
                 thread: ThreadPoolExecutor) -> None:
        import ray

        self.name, self.ready, self.decoders, self.usage = name, Future[None](), cpus, Usage()
        self._thread = thread
        options = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=2 * AT_HAND + 1)
        self._actor = options(_Actor).remote()
        self._settle(self._actor.start.remote(spec, tensors, "cuda" if gpus else "cpu", cpus), self.ready)

    def submit(self, task: Task) -> Future[Any]:
        future: Future[Any] = Future()
        self._settle(self._actor.run.remote(task), future)
        return future

    def leave(self) -> Any:
        """Return a reference of Ray's to the end of `_Actor.leave`."""
        return self._actor.leave.remote()

    def stop(self) -> None:
        import ray

        ray.kill(self._actor)

    def _settle(self, reference: Any, future: Future[Any]) -> None:
        """Give the outcome of a call to a future."""
        import ray

        def settle(done: Future[Any]) -> None:
            error = done.exception()
            if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
                future.set_exception(WorkerDiedError(str(error).splitlines()[0]))
                return
            outcome: Outcome = done.result() if error is None else Outcome(error=error)
            outcome.settle(future, self.usage)

        def hand_over(done: Future[Any]) -> None:
            with suppress(RuntimeError):  # the build has ended
                self._thread.submit(settle, done)

        reference.future().add_done_callback(hand_over)


class _RayExecutor(Executor):
    """An executor that leaves Ray as it was."""

    def __init__(self, disconnect: Callable[[], object], thread: ThreadPoolExecutor, *args: Any) -> None:
        super().__init__(*args)
        self._disconnect, self._thread = disconnect, thread

    def __exit__(self, *error: object) -> None:
        import ray

        try:
            self.cancel()
            ends = [worker.leave() for worker in self._ready_workers() if isinstance(worker, RayWorker)]
            if ends:
                ray.wait(ends, num_returns=len(ends), timeout=LEAVE_SECONDS)
        finally:
            super().__exit__(*error)
            self._thread.shutdown(cancel_futures=True)
            self._disconnect()


def open_ray(spec: RunnerSpec, encoder: LatentEncoder, on_progress: Callable[[int], object]) -> Executor:
    """Connect to a cluster of Ray, or start one on this machine; see `open_executor`. Raises UserError."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--on ray needs Ray: pip install 'odvae-lvdm[ray]'") from error
    disconnect = connect(spec.settings.address)
    try:
        gpus, cpus, count = plan_actors(spec.settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    except UserError:
        disconnect()
        raise
    tensors = ray.put(tensor_bytes(encoder.model))
    kind = "gpu" if gpus else "cpu"
    thread = ThreadPoolExecutor(1)
    return _RayExecutor(
        disconnect, thread, lambda k: RayWorker(f"{kind} {k + 1} of {count}", spec, tensors, gpus, cpus, thread), count,
        on_progress)


def connect(address: str | None) -> Callable[[], object]:
    """Connect to a cluster; returns what disconnects from it, if this was not connected before."""
    import ray

    if ray.is_initialized():
        return lambda: None
    started: dict[str, Any] = {"include_dashboard": False, "_system_config": {"worker_niceness": WORKER_NICENESS}}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR",
                 **({} if address or os.environ.get("RAY_ADDRESS") else started))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot connect to the Ray cluster {address or os.environ.get('RAY_ADDRESS', '')}: {error}. "
                        "Check --address, or start a cluster with `ray start --head`") from error
    return ray.shutdown


def plan_actors(settings: BuildSettings, nodes: list[dict[str, float]]) -> tuple[int, int, int]:
    """Return the GPUs and CPUs of each actor, and the number of actors. The CPUs of an actor decode for it; without a
    GPU they encode as well.

    Args:
        nodes: resources of each.
    """
    gpus = [int(node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
    match = re.fullmatch(r"(gpu|cpu)=([1-9]\d*)", " ".join(settings.devices))
    if settings.devices and not match:
        raise UserError(f"--devices {' '.join(settings.devices)}: with --on ray give the number of encoders, such as "
                        "gpu=16 or cpu=32")
    if match[1] == "gpu" if match else gpus:
        shares = [int(node.get("CPU", 1) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
        cpus = settings.workers or max(1, min([MAX_DECODERS, *shares]))
        return 1, cpus, int(match[2]) if match else sum(gpus)
    cpus = settings.workers or 1
    count = int(match[2]) if match else sum(int(node.get("CPU", 0)) // cpus for node in nodes)
    if not count:
        raise UserError(f"no node of the Ray cluster has {cpus} CPUs; give fewer --workers")
    return 0, cpus, count
