"""Run commands in processes of their own: several joined by gloo, started by torchrun or forked, or a single one.

Forked processes come from a server that has imported everything once, which takes longer than what is tested.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from waiting import TIMEOUT

from app.tasks.run_command import PRELOADED_MODULES

PRELOADED = ["app.inference.model_manager", "odvae.evaluate", *PRELOADED_MODULES]
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def run_torchrun(*command: object) -> None:
    """Run a command in two processes by torchrun. (On CPUs `accelerate launch --num_processes 2` silently starts one.)
    """
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
            "--master-port", str(_free_port()), *map(str, command)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT,
                            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert result.returncode == 0, result.stderr[-4000:]


def preload_fork_server() -> None:
    """Start the process that all others of this session are forked from, however they are started, unless it runs."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def run_forked(module: str, *arguments: object, log: Path, count: int = 2) -> None:
    """Run `python -m MODULE ARGUMENTS` in `count` forked processes with torchrun's environment."""
    port = _free_port()
    processes = []
    for rank in range(count):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(start_forked(module, *arguments, log=log, **environment))
    for process in processes:
        process.join(TIMEOUT)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count, log.read_text()[-4000:]


def start_forked(module: str, *arguments: object, log: Path, **environment: object) -> BaseProcess:
    """Start `python -m MODULE ARGUMENTS` in a forked process whose output goes to `log`."""
    preload_fork_server()
    variables = ENVIRONMENT | {name: str(value) for name, value in environment.items()}
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run, args=(module, list(map(str, arguments)), log, variables))
    process.start()
    return process


def _run(module: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= environment
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
