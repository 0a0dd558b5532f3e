"""A device for each worker: its process sees no other, and neither do the commands that it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"


def send_device_count(connection: Connection) -> None:
    """Send how many accelerators there are, from a process of its own: the server imports no torch."""
    import torch

    connection.send(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def worker_environment(number: int, workers: int, devices: int,
                       environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables of a worker, of which some share a device if there are more than devices.

    Args:
        number: of the worker, from 0.
        devices: number of accelerators that `environment`, the server's, shows.
    """
    variables = dict(environment)
    if devices:
        shown = environment[VISIBLE].split(",") if VISIBLE in environment else [str(k) for k in range(devices)]
        variables[VISIBLE] = shown[number % devices].strip()
    if workers > 1:  # each would start a thread for every core
        variables.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // workers)))
    return variables


def limit_threads() -> None:
    """Let torch use the threads of this worker's environment: it was imported before that was set."""
    import torch

    if (threads := os.environ.get(THREADS, "")).isdigit():
        torch.set_num_threads(max(1, int(threads)))


def describe_device(device: Any) -> str:
    """Describe the device of this process, with its number on the host."""
    visible = os.environ.get(VISIBLE, "")
    return f"{device} (GPU {visible})" if visible and getattr(device, "type", "") == "cuda" else str(device)
