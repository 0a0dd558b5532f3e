"""Run one of our commands as a child of the worker: its output becomes the job's log, its progress the job's.

A child process, because the memory, threads and process group of a build or a training end with it, and because it is
the command that people run by hand. It never outlives the worker. It is forked from a process that has imported the
commands' modules, so that only the first command of a worker waits for them.
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
from odvae.utils.processes import make_process, process_context
from odvae.utils.progress import PROGRESS_FILE_ENV

PRELOADED_MODULES = ("odvae.cache.build.builder", "odvae.training.train", "lvdm.training.train",
                     "lvdm.evaluation.measure")
POLL_SECONDS = 0.2  # seconds between two polls of the child
STOP_TIMEOUT = 60.0  # seconds that it may take to complete its files
USER_ERROR_EXIT = 2  # exit status of user errors, see odvae.utils.errors
MAX_LINES = 400  # lines of its output that are kept
TAIL_LINES = 12  # lines in the message of a failure


class CommandError(RuntimeError):
    """The command failed for another reason than a user error."""


def run_command(context: JobContext, module: str, arguments: Sequence[str | Path],
                on_poll: Callable[[], object] = lambda: None) -> list[str]:
    """Run `python -m MODULE ARGUMENTS` and return the last `MAX_LINES` lines of its stdout.

    If the job is to end, the child gets SIGINT, on which our commands complete their files, within `STOP_TIMEOUT`; if
    the job is cancelled, the child is killed.

    Args:
        module: such as odvae.cli.
        on_poll: called every `POLL_SECONDS` while it runs.

    Raises:
        JobInterrupted: after the child has ended, unless it succeeded nevertheless.
        UserError: it reported an error: a user error, or values that are not finite.
        CommandError: any other status; the message ends with the last lines of its output.
    """
    context.report_progress(phase="starting", done=0, total=0, seconds_left=None, detail="")
    context.models.unload()
    name = f"{module.partition('.')[0]} {' '.join(map(str, arguments[:2]))}"
    context.log("$ " + " ".join([module.partition(".")[0], *map(str, arguments)]))
    progress_file = context.folder / "progress.json"
    progress_file.unlink(missing_ok=True)
    interruption: JobInterrupted | None = None
    with _child_process(context, module, arguments, progress_file) as (child, out, err):
        try:
            while _wait(child):
                context.report_progress(**_read_progress(progress_file))
                on_poll()
        except JobInterrupted as error:
            interruption = error
            _stop(context, child, error.signal)
    status = child.exitcode or 0
    if status == 0:
        return list(out)
    if interruption is not None:
        raise interruption
    if status == USER_ERROR_EXIT or (status > 0 and any(line.startswith("error: ") for line in err)):
        raise UserError(_error_message(err))
    if any("OutOfMemoryError" in line or "out of memory" in line for line in err):
        raise UserError("There was not enough memory. Choose a smaller batch, shorter clips or smaller sizes, or close "
                        "other programs, then try again.")
    outcome = f"was killed by signal {-status}" if status < 0 else f"failed with exit status {status}"
    advice = " The system may have run out of memory." if status == -signal.SIGKILL else ""
    last = "\n".join([*out, *err][-TAIL_LINES:])
    raise CommandError(f"`{name}` {outcome}.{advice} The end of its log:\n{last}")


@contextmanager
def _child_process(context: JobContext, module: str, arguments: Sequence[str | Path],
             progress_file: Path) -> Iterator[tuple[BaseProcess, deque[str], deque[str]]]:
    """Start the child and yield it with its lines of stdout and stderr, which are complete when it has been killed."""
    processes = process_context(*PRELOADED_MODULES)
    environment = os.environ | {PROGRESS_FILE_ENV: str(progress_file)} | _device_environment(context.models.device)
    receivers, senders = zip(*(processes.Pipe(duplex=False) for _ in range(2)), strict=True)
    control, child_control = processes.Pipe()
    child = make_process(processes, _run, module, [*map(str, arguments)], *senders, child_control,
                          environment=environment)
    child.start()
    for end in (*senders, child_control):
        end.close()
    with suppress(EOFError, OSError):
        control.recv()  # from here on it handles signals
    lines: tuple[deque[str], deque[str]] = (deque(maxlen=MAX_LINES), deque(maxlen=MAX_LINES))
    readers = [threading.Thread(target=_forward_output, args=(context, stream, kept), daemon=True)
               for stream, kept in zip(receivers, lines, strict=True)]
    for reader in readers:
        reader.start()
    try:
        yield child, *lines
    finally:
        _kill(child)
        for reader in readers:
            reader.join(5)
        control.close()


def _run(module: str, arguments: Sequence[str], out: Connection, err: Connection, control: Connection) -> None:
    """Run `python -m MODULE ARGUMENTS`, in the child, in a process group of its own: Ctrl-C is for the server, which
    stops the child."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, end in enumerate((out, err), 1):
        os.dup2(end.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(i, "w", 1, encoding="utf-8", closefd=False) for i in (1, 2))
    control.send(None)
    threading.Thread(target=_die_with_parent, args=(control,), daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _die_with_parent(control: Connection) -> None:
    """Kill this process and its children when the parent is gone."""
    with suppress(EOFError, OSError):
        control.recv()
    os.killpg(0, signal.SIGKILL)


def _device_environment(device: Any) -> dict[str, str]:
    """Return environment variables that put the child on the device of this worker."""
    if device.type == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    needs_index = device.type == "cuda" and device.index is not None and "CUDA_VISIBLE_DEVICES" not in os.environ
    return {"CUDA_VISIBLE_DEVICES": str(device.index)} if needs_index else {}


def _forward_output(context: JobContext, end: Connection, kept: deque[str]) -> None:
    with open(os.dup(end.fileno()), encoding="utf-8", errors="replace") as stream:
        for line in stream:
            text = line.rstrip()
            kept.append(text)
            with suppress(OSError):  # a full disk must not stop the pipe
                context.log(text)


def _wait(child: BaseProcess) -> bool:
    child.join(POLL_SECONDS)
    return child.is_alive()


def _read_progress(path: Path) -> dict[str, Any]:
    """Return the progress of the child as fields of `Progress`."""
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {"phase": progress["title"], "done": progress["done"], "total": progress["total"] or 0,
            "seconds_left": progress["seconds_left"], "detail": progress["postfix"]}


def _stop(context: JobContext, child: BaseProcess, job_signal: JobSignal) -> None:
    if job_signal is not JobSignal.CANCEL:
        with suppress(JobInterrupted):
            context.report_progress(phase="stopping", seconds_left=None)
        with suppress(ProcessLookupError):
            os.kill(child.pid or 0, signal.SIGINT)
        end = time.monotonic() + STOP_TIMEOUT
        while _wait(child) and time.monotonic() < end:
            pass
    _kill(child)


def _kill(child: BaseProcess) -> None:
    """Kill the child with its process group."""
    child.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid or 0, signal.SIGKILL)
    child.join()


def _error_message(lines: Sequence[str]) -> str:
    """Return the message of `cli_main`: what follows the last "error: "."""
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if starts:
        return "\n".join(list(lines)[starts[-1]:]).removeprefix("error: ")
    return lines[-1] if lines else "The command failed without a message."
