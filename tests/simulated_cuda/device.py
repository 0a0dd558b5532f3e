"""A CUDA device on a machine without one, for a process that has not imported torch yet: `load`, then import torch.

Tensors have real values, on the CPU, and the device "cuda:0": two devices in one operation raise as on a GPU, autograd
and autocast take CUDA's paths, and what makes the host wait for the device is counted by the line of ours that causes
it. Not simulated: streams, CUDA's own kernels (Triton's, cuDNN's, Flash attention) and their rounding.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / package}{os.sep}" for package in ("odvae", "lvdm", "app"))
TOTAL = 80 * 2**30  # bytes of memory

Synchronisations = Counter[tuple[str, str]]  # by place (file:line) and cause ("item", "D2H", "H2D", "nonzero" ...)
_open: list[Synchronisations] = []
_open_for_staged: list[Synchronisations] = []
_keep: list[Any] = []  # what the library calls


def compiler() -> str | None:
    return shutil.which("g++")


def build() -> Path:
    """Compile the device, unless that is done, and return the library."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch = Path(found.origin).parent
    version = (torch / "version.py").read_bytes()
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "odvae-tests"
    library = folder / f"cuda-{hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch, library.name)
        libraries = torch / "lib"
        subprocess.run(["g++", "-O0", "-shared", "-fPIC", "-std=c++20", "-DAT_PER_OPERATOR_HEADERS",
                        f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", str(SOURCE), "-o",
                        str(made), f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"], check=True)
        made.replace(library)
    return library


def load(library: Path) -> None:
    """Add the device to this process."""
    if "torch" in sys.modules:
        raise RuntimeError("load the simulated device before torch is imported: torch asks for devices only once")
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.simulated_cuda_allocated, loaded.simulated_cuda_peak):
        function.restype = ctypes.c_int64
    callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda what: _count(what.decode()))
    _keep.append(callback)
    loaded.simulated_cuda_report(callback)
    _patch(loaded)


@contextmanager
def synchronisations() -> Iterator[Synchronisations]:
    """Count what makes the host wait for the device inside the block, where code of ours causes it."""
    counted: Synchronisations = Counter()
    _open.append(counted)
    try:
        yield counted
    finally:
        _open.remove(counted)


@contextmanager
def staged_copies() -> Iterator[Synchronisations]:
    """Count the copies to the device inside the block that do not block but are from memory that is not pinned, so that
    the host copies them twice."""
    counted: Synchronisations = Counter()
    _open_for_staged.append(counted)
    try:
        yield counted
    finally:
        _open_for_staged.remove(counted)


def _count(what: str) -> None:
    counters = _open_for_staged if what.startswith("staged") else _open
    if counters and (place := _place()):
        for counted in counters:
            counted[place, what] += 1


def _place() -> str:
    """The innermost line of ours that runs; of the main thread for one that autograd's own threads cause."""
    frame: FrameType | None = sys._getframe()
    own = threading.current_thread() is threading.main_thread()
    for start in (frame, None if own else sys._current_frames().get(threading.main_thread().ident or 0)):
        frame = start
        while frame is not None:
            if frame.f_code.co_filename.startswith(OURS):
                return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
            frame = frame.f_back
    return ""


class _Stream:
    """A stream, or an event: what is asked of it is done already."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.device_index = 0

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = record = record_event = wait_stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _count("synchronize")


def _patch(device: ctypes.CDLL) -> None:
    """Let `torch.cuda` answer for one device, with a caching allocator: memory is reserved until `empty_cache`."""
    import torch

    reserved = [0]

    def reserve() -> int:
        reserved[0] = max(reserved[0], device.simulated_cuda_peak(True))
        return reserved[0]

    def empty_cache() -> None:
        reserve()
        reserved[0] = device.simulated_cuda_allocated()

    properties = SimpleNamespace(name="simulated", total_memory=TOTAL, major=9, minor=0, multi_processor_count=132)
    answers: dict[str, Any] = {
        "_lazy_init": None, "init": None, "is_initialized": True, "is_available": True, "device_count": 1,
        "current_device": 0, "set_device": None, "get_device_name": "simulated", "get_device_capability": (9, 0),
        "get_device_properties": properties, "is_bf16_supported": True, "manual_seed": None, "manual_seed_all": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "reset_peak_memory_stats": None, "ipc_collect": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    actions = {
        "synchronize": lambda *args, **options: _count("synchronize"), "empty_cache": empty_cache,
        "memory_allocated": lambda *args: device.simulated_cuda_allocated(), "memory_reserved": lambda *args: reserve(),
        "max_memory_allocated": lambda *args: reserve(), "mem_get_info": lambda *args: (TOTAL - reserve(), TOTAL),
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state)}
    actions |= {"Stream": _Stream, "Event": _Stream, "current_stream": _Stream, "stream": nullcontext}
    torch.backends.cuda.is_built = lambda: True
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment,method-assign]
    for name, action in actions.items():
        setattr(torch.cuda, name, action)
