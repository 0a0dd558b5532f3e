"""Two processes on one machine, by gloo: as torchrun starts them, or forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

from app.tasks import run_command

IMPORTED = ["app.inference.model_manager", "odvae.evaluate", *run_command.PRELOADED_MODULES]
TIMEOUT = 240  # seconds
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(*command: object) -> None:
    """Two processes by torchrun: on CPUs `accelerate launch --num_processes 2` starts one, and says nothing."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
            "--master-port", str(_free_port()), *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT,
                          env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-4000:]


def import_once() -> None:
    """Start the process that all others of this session are forked from, however they come about."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()


def fork(module: str, *arguments: object, log: Path) -> None:
    """Two processes that run `python -m MODULE ARGUMENTS`, as `launch` does but for the imports, which take longer than
    what is tested: they are forked from one process that has imported the commands, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    port = _free_port()
    processes = [context.Process(target=_run, args=(module, list(map(str, arguments)), rank, port, log))
                 for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0], log.read_text()[-4000:]


def _run(module: str, arguments: list[str], rank: int, port: int, log: Path) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= ENVIRONMENT | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
