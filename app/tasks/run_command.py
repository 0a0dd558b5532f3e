"""Run one of our own commands as a child of the worker: its output in the job's log, its bars as the job's progress.

A child of its own, because what a build or a training holds (memory, threads, a process group) ends with it, and
because the command is what people run by hand: nothing is written twice. It never outlives the worker. It is forked
from a process that has imported what the commands need, so that only the first one of a worker waits for that.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from app.storage.jobs import JobSignal
from app.tasks.context import JobContext, JobInterrupted
from odvae.utils.errors import UserError
from odvae.utils.processes import fresh_process, fresh_processes
from odvae.utils.progress import PROGRESS_FILE_ENV

# What the commands need.
IMPORTED = ("odvae.cache.build.builder", "odvae.training.train", "lvdm.training.train", "lvdm.evaluation.measure")
POLL_SECONDS = 0.2  # seconds between two looks at the child
PATIENCE = 60.0  # seconds that it may take to complete what is to be kept
USER_ERROR_EXIT = 2  # exit status for what the user can put right, see odvae.utils.errors
KEPT = 400  # lines of its output
TAIL = 12  # of them, in the message where it failed

class CommandError(RuntimeError):
    """The command ended in a way that no user is to blame for."""


def run_command(context: JobContext, module: str, arguments: Sequence[str | Path],
                on_poll: Callable[[], object] = lambda: None) -> list[str]:
    """Run `python -m MODULE ARGUMENTS` to its end; returns the lines that it wrote to stdout, the last `KEPT`.

    Where somebody asks the job to end, the child gets SIGINT, which our commands answer by completing what is to be
    kept, and has `PATIENCE` for it; to cancel, it is killed.

    Args:
        module: such as odvae.cli.
        on_poll: called every `POLL_SECONDS` seconds while it runs.

    Raises:
        JobInterrupted: after the child has ended. One that was done nevertheless counts as done.
        UserError: it reported an error: a mistake, or values that are not finite.
        CommandError: any other status; the message ends with the last lines of its output.
    """
    context.report_progress(phase="starting", done=0, total=0, seconds_left=None, detail="")
    context.models.unload()
    name = f"{module.partition('.')[0]} {' '.join(map(str, arguments[:2]))}"
    context.log("$ " + " ".join([module.partition(".")[0], *map(str, arguments)]))
    progress_file = context.folder / "progress.json"
    progress_file.unlink(missing_ok=True)
    interruption: JobInterrupted | None = None
    with _started(context, module, arguments, progress_file) as (child, out, err):
        try:
            while _alive(child):
                context.report_progress(**_progress(progress_file))
                on_poll()
        except JobInterrupted as error:
            interruption = error
            _end(context, child, error.signal)
    status = child.exitcode or 0
    if status == 0:
        return list(out)
    if interruption is not None:
        raise interruption
    if status == USER_ERROR_EXIT or (status > 0 and any(line.startswith("error: ") for line in err)):
        raise UserError(_mistake(err))
    if any("OutOfMemoryError" in line or "out of memory" in line for line in err):
        raise UserError("There was not enough memory for it. Do less at once (a smaller batch, shorter clips, smaller "
                        "sizes), or let other programs end; then try again.")
    how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
    advice = " The system may have run out of memory." if status == -signal.SIGKILL else ""
    last = "\n".join([*out, *err][-TAIL:])
    raise CommandError(f"`{name}` {how}.{advice} The end of its log:\n{last}")


@contextmanager
def _started(context: JobContext, module: str, arguments: Sequence[str | Path],
             progress_file: Path) -> Iterator[tuple[BaseProcess, deque[str], deque[str]]]:
    """The child and its lines of stdout and stderr, which are complete at the end. Nothing of it is left then."""
    processes = fresh_processes(*IMPORTED)
    environment = os.environ | {PROGRESS_FILE_ENV: str(progress_file)} | _device(context.models.device)
    here, there = zip(*(processes.Pipe(duplex=False) for _ in range(2)), strict=True)
    line, other = processes.Pipe()
    child = fresh_process(processes, _run, module, [str(one) for one in arguments], *there, other,
                          environment=environment)
    child.start()
    for end in (*there, other):
        end.close()
    with suppress(EOFError, OSError):
        line.recv()  # from here on it answers signals
    lines: tuple[deque[str], deque[str]] = (deque(maxlen=KEPT), deque(maxlen=KEPT))
    readers = [threading.Thread(target=_read, args=(context, stream, kept), daemon=True)
               for stream, kept in zip(here, lines, strict=True)]
    for reader in readers:
        reader.start()
    try:
        yield child, *lines
    finally:
        _kill(child)
        for reader in readers:
            reader.join(5)
        line.close()


def _run(module: str, arguments: Sequence[str], out: Connection, err: Connection, line: Connection) -> None:
    """In the child: `python -m MODULE ARGUMENTS`, in a process group of its own: Ctrl-C is for the server, which asks
    us to end."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, end in enumerate((out, err), 1):
        os.dup2(end.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(i, "w", 1, encoding="utf-8", closefd=False) for i in (1, 2))
    line.send(None)
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(line: Connection) -> None:
    """End this process and its children when the process at the other end is gone."""
    with suppress(EOFError, OSError):
        line.recv()
    os.killpg(0, signal.SIGKILL)


def _device(device: Any) -> dict[str, str]:
    """Variables that put the child where the models of this worker are."""
    if device.type == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    fixed = device.type == "cuda" and device.index is not None and "CUDA_VISIBLE_DEVICES" not in os.environ
    return {"CUDA_VISIBLE_DEVICES": str(device.index)} if fixed else {}


def _read(context: JobContext, end: Connection, kept: deque[str]) -> None:
    with open(os.dup(end.fileno()), encoding="utf-8", errors="replace") as stream:
        for line in stream:
            text = line.rstrip()
            kept.append(text)
            with suppress(OSError):  # a full disk must not stop the pipe
                context.log(text)


def _alive(child: BaseProcess) -> bool:
    child.join(POLL_SECONDS)
    return child.is_alive()


def _progress(path: Path) -> dict[str, Any]:
    """What the child's bar says, as fields of `Progress`."""
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {"phase": progress["title"], "done": progress["done"], "total": progress["total"] or 0,
            "seconds_left": progress["seconds_left"], "detail": progress["postfix"]}


def _end(context: JobContext, child: BaseProcess, ask: JobSignal) -> None:
    if ask is not JobSignal.CANCEL:
        with suppress(JobInterrupted):
            context.report_progress(phase="stopping", seconds_left=None)
        with suppress(ProcessLookupError):
            os.kill(child.pid or 0, signal.SIGINT)
        end = time.monotonic() + PATIENCE
        while _alive(child) and time.monotonic() < end:
            pass
    _kill(child)


def _kill(child: BaseProcess) -> None:
    """The child with all that it started in its group."""
    child.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid or 0, signal.SIGKILL)
    child.join()


def _mistake(lines: Sequence[str]) -> str:
    """The message of `cli_main`: what follows the last "error: "."""
    found = list(lines)
    starts = [number for number, line in enumerate(found) if line.startswith("error: ")]
    if starts:
        return "\n".join(found[starts[-1]:]).removeprefix("error: ")
    return found[-1] if found else "The command was not accepted, and did not say why."
