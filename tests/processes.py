"""Start two processes on one machine, by gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def launch(*command: object) -> None:
    """Two processes by torchrun: on CPUs `accelerate launch --num_processes 2` starts one, and says nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
            "--master-port", str(port), *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, env=os.environ | {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-4000:]
