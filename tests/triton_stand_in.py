"""The part of Triton that our kernels use, program by program on a CPU, in place of its 1 GB in CI.

It checks what a kernel computes, reads and writes, masks included; not that Triton compiles it. With Triton installed,
TRITON_INTERPRET=1 makes the tests use Triton's own interpreter instead.
"""

from __future__ import annotations

import itertools
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_program: list[Any] = [(0, 0, 0), (1, 1, 1)]  # its number, and how many there are


class Pointer:
    """Addresses within a tensor's storage, in elements."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offset[index])


def pointer(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    memory = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return Pointer(memory, torch.tensor(x.storage_offset()))


def load(source: Pointer, mask: Tensor, other: float) -> Tensor:
    offset, mask = torch.broadcast_tensors(source.offset, mask)
    assert int(offset[mask].min()) >= 0 and int(offset[mask].max()) < len(source.memory)
    return torch.where(mask, source.memory[torch.where(mask, offset, 0)], other).to(source.memory.dtype)


def store(target: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    value = torch.as_tensor(value)
    offset, value, mask = torch.broadcast_tensors(target.offset, value, torch.tensor(True) if mask is None else mask)
    assert len(set(offset[mask].tolist())) == int(mask.sum()), "two lanes write to one address"
    target.memory[offset[mask]] = value[mask].to(target.memory.dtype)


class Kernel:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            sizes = (*grid, 1, 1)[:3]
            for number in itertools.product(*map(range, sizes)):
                _program[:] = number, sizes
                self.function(*map(pointer, args), **constants)

        return launch


def modules() -> dict[str, ModuleType]:
    """What stands for `triton` and `triton.language` in sys.modules."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    triton.__dict__.update(jit=Kernel, cdiv=lambda a, b: -(-a // b), language=language,
                           next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    language.__dict__.update(
        constexpr=int, float32=torch.float32, int64=torch.int64, load=load, store=store, exp=torch.exp, sqrt=torch.sqrt,
        program_id=lambda axis: torch.tensor(_program[0][axis]), num_programs=lambda axis: _program[1][axis],
        arange=torch.arange, zeros=lambda shape, dtype: torch.zeros(shape, dtype=dtype), where=torch.where,
        sum=lambda x, axis: x.sum(axis), minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)))
    return {"triton": triton, "triton.language": language}
