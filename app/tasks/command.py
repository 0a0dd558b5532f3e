"""Run one of our own commands as a child of the worker: its output in the job's log, its bars as the job's progress.

A child of its own, because what a build or a training holds (memory, threads, a process group) ends with it, and
because the command is what people run by hand: nothing is written twice. It never outlives the worker.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from app.desk import JobContext, JobInterrupted
from app.jobs import JobSignal
from odvae.runtime.errors import UserError
from odvae.runtime.progress import TOLD

POLL_SECONDS = 0.2  # seconds between two looks at the child
PATIENCE = 60.0  # seconds that it may take to complete what is to be kept
USER_ERROR_EXIT = 2  # exit status for what the user can put right, see odvae.runtime.errors
KEPT = 400  # lines of its output
TAIL = 12  # of them, in the message where it failed

# What the child runs before the command: the system kills it when the thread that started it is gone, and so is the
# worker. After exec, not between fork and exec, where a process with torch's threads may do next to nothing. SIGINT may
# have been ignored by who started the worker, which is handed on.
BEGIN = """
import os, runpy, signal, sys
parent, module = int(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (OSError, AttributeError):
    pass
if os.getppid() != parent:
    sys.exit(1)
sys.argv = [module, *sys.argv[3:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class CommandError(RuntimeError):
    """The command ended in a way that no user is to blame for."""


def run_command(context: JobContext, module: str, arguments: Sequence[str | Path],
                tick: Callable[[], object] = lambda: None) -> list[str]:
    """Run `python -m MODULE ARGUMENTS` to its end; returns the lines that it wrote to stdout, the last `KEPT`.

    Where somebody asks the job to end, the child gets SIGINT, which our commands answer by completing what is to be
    kept, and has `PATIENCE` for it; to cancel, it is killed.

    Args:
        module: such as odvae.cli.
        tick: called every `LOOK` seconds while it runs.

    Raises:
        Asked: after the child has ended. One that was done nevertheless counts as done.
        UserError: its exit status is 2; the message is the one that it told.
        CommandError: any other status; the message ends with the last lines of its output.
    """
    context.report_progress(phase="starting", done=0, total=0, seconds_left=None, detail="")
    context.engine.unload()
    name = f"{module.partition('.')[0]} {' '.join(map(str, arguments[:2]))}"
    context.log("$ " + " ".join([module.partition(".")[0], *map(str, arguments)]))
    told = context.folder / "progress.json"
    told.unlink(missing_ok=True)
    asked: JobInterrupted | None = None
    with _started(context, module, arguments, told) as (child, out, err):
        try:
            while _alive(child):
                context.report_progress(**_progress(told))
                tick()
        except JobInterrupted as error:
            asked = error
            _end(context, child, error.signal)
    if child.returncode == 0:
        return list(out)
    if asked is not None:
        raise asked
    if child.returncode == USER_ERROR_EXIT:
        raise UserError(_mistake(err))
    if any("OutOfMemoryError" in line or "out of memory" in line for line in err):
        raise UserError("There was not enough memory for it. Do less at once (a smaller batch, shorter clips, smaller "
                        "sizes), or let other programs end; then try again.")
    how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else f"ended with {child.returncode}"
    advice = " The system may have run out of memory." if child.returncode == -signal.SIGKILL else ""
    last = "\n".join([*out, *err][-TAIL:])
    raise CommandError(f"`{name}` {how}.{advice} The end of its log:\n{last}")


@contextmanager
def _started(context: JobContext, module: str, arguments: Sequence[str | Path],
             told: Path) -> Iterator[tuple[subprocess.Popen[str], deque[str], deque[str]]]:
    """The child and its lines of stdout and stderr, which are complete at the end. Nothing of it is left then."""
    environment = os.environ | {TOLD: str(told), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8",
                                "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    environment |= _device(context.engine.device)
    child = subprocess.Popen(
        [sys.executable, "-c", BEGIN, str(os.getpid()), module, *map(str, arguments)], env=environment, text=True,
        encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        process_group=0)  # Ctrl-C is for the server, which asks us to end
    lines: tuple[deque[str], deque[str]] = (deque(maxlen=KEPT), deque(maxlen=KEPT))
    readers = [threading.Thread(target=_read, args=(context, stream, kept), daemon=True)
               for stream, kept in zip((child.stdout, child.stderr), lines, strict=True)]
    for reader in readers:
        reader.start()
    try:
        yield child, *lines
    finally:
        _kill(child)
        for reader in readers:
            reader.join(5)


def _device(device: Any) -> dict[str, str]:
    """Variables that put the child where the models of this worker are."""
    if device.type == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    fixed = device.type == "cuda" and device.index is not None and "CUDA_VISIBLE_DEVICES" not in os.environ
    return {"CUDA_VISIBLE_DEVICES": str(device.index)} if fixed else {}


def _read(context: JobContext, stream: IO[str], kept: deque[str]) -> None:
    for line in stream:
        text = line.rstrip()
        kept.append(text)
        with suppress(OSError):  # a full disk must not stop the pipe
            context.log(text)


def _alive(child: subprocess.Popen[str]) -> bool:
    try:
        child.wait(POLL_SECONDS)
        return False
    except subprocess.TimeoutExpired:
        return True


def _progress(path: Path) -> dict[str, Any]:
    """What the child's bar says, as fields of `Progress`."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {"phase": told["title"], "done": told["done"], "total": told["total"] or 0,
            "seconds_left": told["seconds_left"], "detail": told["postfix"]}


def _end(context: JobContext, child: subprocess.Popen[str], ask: JobSignal) -> None:
    if ask is not JobSignal.CANCEL:
        with suppress(JobInterrupted):
            context.report_progress(phase="stopping", seconds_left=None)
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGINT)
        end = time.monotonic() + PATIENCE
        while _alive(child) and time.monotonic() < end:
            pass
    _kill(child)


def _kill(child: subprocess.Popen[str]) -> None:
    """The child with all that it started in its group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _mistake(lines: Sequence[str]) -> str:
    """The message of `command_line`: what follows the last "error: "."""
    found = list(lines)
    starts = [number for number, line in enumerate(found) if line.startswith("error: ")]
    if starts:
        return "\n".join(found[starts[-1]:]).removeprefix("error: ")
    return found[-1] if found else "The command was not accepted, and did not say why."
