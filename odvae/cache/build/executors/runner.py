"""Run tasks in this process: one encoder, with decode workers of its own."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save

from ....data.scratch import Scratch, open_scratch
from ....utils.backoff import Backoff
from ....utils.errors import URL, UserError
from ....utils.precision import resolve_precision
from ....utils.storage import Storage
from ... import format as fmt
from ...encoder import LatentEncoder
from ..decode_pool import DecodePool, probe_each
from ..settings import BuildSettings
from ..shard_encoder import EncodeUnit, ShardEncoder
from .worker import Task


@dataclass(frozen=True)
class Resources:
    """What the encoders of a build on this machine share."""

    backoff: Backoff
    scratch: Scratch | None = None  # where fetched files stay


class TaskRunner:
    """A `Worker` in this process.

    Args:
        decoders: number of decode workers.
        on_progress: called with the number of clips that are done.
    """

    def __init__(self, encoder: LatentEncoder, storage: Storage, settings: BuildSettings, decoders: int,
                 resources: Resources, on_progress: Callable[[int], object] = lambda _: None) -> None:
        self.name = str(encoder.model.device)
        self.ready: Future[None] = Future()
        self.ready.set_result(None)
        self._settings = settings
        self._pool = DecodePool(decoders, settings.file_seconds, resources.backoff, resources.scratch)
        self.decoders, self.usage = decoders, self._pool.usage
        self._shards = ShardEncoder(encoder, storage, settings, self._pool, on_progress)
        self._probing = ThreadPoolExecutor(2)  # while one waits for its last file, the next has begun

    def submit(self, task: Task) -> Future[Any]:
        if isinstance(task, EncodeUnit):
            return self._shards.submit(task)
        return self._probing.submit(lambda: list(probe_each(self._pool, self._settings, task.refs)))

    def stop(self) -> None:
        """Wait for the batch that is being encoded, and for nothing else."""
        self._pool.cancel()
        self._shards.close()
        self._probing.shutdown(cancel_futures=True)
        self._pool.close()


@dataclass(frozen=True)
class VaeSpec:
    """A VAE without its tensors. Its class is found by name, so that nothing but data travels."""

    module: str
    name: str
    config: dict[str, Any]
    training: bool
    header: fmt.VaeHeader  # of what is loaded again: the same, or the latents would be others

    @classmethod
    def of(cls, encoder: LatentEncoder) -> VaeSpec:
        """Raises UserError for a class that cannot be imported by its name."""
        kind = type(encoder.model)
        if getattr(importlib.import_module(kind.__module__), kind.__qualname__, None) is not kind:
            raise UserError(f"the class {kind.__qualname__} cannot be imported from {kind.__module__}, as another "
                            "process must; build on one device of this machine")
        return cls(kind.__module__, kind.__qualname__, dict(encoder.model.config), encoder.model.training,
                   encoder.header)

    def load(self, tensors: bytes) -> Any:
        model = getattr(importlib.import_module(self.module), self.name).from_config(self.config)
        model.load_state_dict(load(tensors), assign=True)
        return model.train(self.training).requires_grad_(False)


def tensor_bytes(model: Any) -> bytes:
    """Return a model's state dict as a safetensors file."""
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()})


@dataclass(frozen=True)
class RunnerSpec:
    """What another process needs to run a build's tasks, but for the tensors of the VAE.

    Attributes:
        folder: the current folder, to which paths are relative.
        shared: paths that must exist there too.
        scratch: name of the folder where fetched files stay, on each machine one for its workers; None: a file is
            fetched each time that it is read.
    """

    vae: VaeSpec
    storage: Storage
    settings: BuildSettings
    folder: str
    shared: tuple[str, ...]
    scratch: str | None = None

    @classmethod
    def of(cls, encoder: LatentEncoder, storage: Storage, settings: BuildSettings, source: str,
           scratch: Scratch | None = None) -> RunnerSpec:
        """Raises UserError for what no other process can read."""
        for name in (source, storage.root):
            if name.startswith("memory:"):
                raise UserError(f"{name} is in the memory of this process, and no other can read it; give a folder or "
                                "another URL, or build on one device of this machine")
        # The cache's folder exists: the build holds its lock.
        shared = tuple(path for path in (source, storage.root) if not URL.match(path))
        return cls(VaeSpec.of(encoder), storage, settings, os.getcwd(), shared,
                   scratch.name if scratch else None)

    def open(self, tensors: bytes, device: str, decoders: int, stack: ExitStack) -> TaskRunner:
        """Load the VAE onto a device, and start. Closing `stack` gives back the scratch. Raises UserError for paths
        that are not shared, and for a VAE that is not the same here."""
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise UserError(f"{socket.gethostname()} has no folder {self.folder}; build from a folder that all nodes "
                            "share") from error
        for path in self.shared:
            if not os.path.exists(path):
                raise UserError(f"{socket.gethostname()} cannot see {os.path.abspath(path)}; give a folder that all "
                                "nodes share, or a URL such as s3://bucket/folder")
        encoder = LatentEncoder(self.vae.load(tensors).to(torch.device(device)), self.settings.store,
                                resolve_precision(self.vae.header.precision, device, self.vae.name),
                                compiled_batch=self.settings.compiled_batch)
        if encoder.header != self.vae.header:
            raise UserError(f"the {self.vae.name} is another one on {socket.gethostname()}; install the same versions "
                            "of odvae and diffusers there")
        scratch = stack.enter_context(open_scratch(self.settings.scratch_gb, self.scratch)) if self.scratch else None
        resources = Resources(Backoff(self.settings.patience), scratch)
        return TaskRunner(encoder, self.storage, self.settings, decoders, resources)
