"""Where the tasks of a build run: in this process, on several devices of this machine, or on a cluster of Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ....utils.errors import UserError
from ....utils.storage import Storage
from ...encoder import LatentEncoder
from ..settings import BuildSettings
from .executor import Executor
from .process import ProcessWorker
from .runner import Resources, RunnerSpec, TaskRunner, tensor_bytes

MAX_DECODERS = 8  # of an encoder, where there are as many cores


def open_executor(encoder: LatentEncoder, storage: Storage, settings: BuildSettings, source: Path | str,
                  resources: Resources, on_progress: Callable[[int], object] = lambda _: None) -> Executor:
    """Return the executor that a build's settings ask for, as a context manager; the cache's folder exists.

    `settings.devices` are, on this machine, devices of torch, each with an encoder in a process of its own; () or one
    of them: an encoder in this process, () on the VAE's own device. On Ray it is the number of encoders, as "gpu=4" or
    "cpu=4"; (): as many as the cluster has now.

    Args:
        source: of the build; other processes must see it.
        resources: of this machine, for its encoders.
        on_progress: called with the number of clips that are done.

    Raises:
        UserError: an unknown device, a cluster that cannot be reached, a source or cache that no other process can
            read.
    """
    if settings.on == "ray":
        from .ray_actors import open_ray

        return open_ray(RunnerSpec.of(encoder, storage, settings, str(source), resources.scratch), encoder,
                        on_progress)
    if settings.address is not None:
        raise UserError("--address is of a Ray cluster; add --on ray")
    devices = [_check_device(name) for name in settings.devices]
    cores = os.cpu_count() or 1
    if len(devices) < 2:
        if devices:
            encoder.model.to(devices[0])
        decoders = settings.workers or min(MAX_DECODERS, cores)
        return Executor(lambda _: TaskRunner(encoder, storage, settings, decoders, resources, on_progress), 1)
    spec = RunnerSpec.of(encoder, storage, settings, str(source), resources.scratch)
    tensors = tensor_bytes(encoder.model)
    share = max(1, cores // len(devices))
    decoders = settings.workers or min(MAX_DECODERS, share)
    names = [str(device) if devices.count(device) == 1 else f"{device}#{k}" for k, device in enumerate(devices)]
    return Executor(lambda k: ProcessWorker(names[k], str(devices[k]), spec, tensors, decoders, share), len(devices),
                    on_progress)


def default_devices(on: str) -> tuple[str, ...]:
    """Return all accelerators of this machine if there are several and no launcher has assigned one of them."""
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if on != "local" or count < 2 or {"LOCAL_RANK", "SLURM_LOCALID"} & os.environ.keys():
        return ()
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return tuple(f"{accelerator.type}:{k}" for k in range(count))


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"--devices {name} cannot be used: {reason}. Give devices of this machine, such as cuda:0 or "
                        "cpu") from error
    return device
