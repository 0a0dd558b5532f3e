"""What the checks share: results of the CPU, the devices that components compute on, budgets of synchronisations."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .device import Synchronisations

aten = torch.ops.aten
PRODUCTS = {aten.convolution.default, aten.addmm.default, aten.mm.default, aten.bmm.default}


@contextmanager
def on_cpu() -> Iterator[None]:
    """Use the CPU inside the block, as if there were no accelerator, with the attention kernel that it has there."""
    with patch.dict(os.environ, ACCELERATE_USE_CPU="true"), sdpa_kernel(SDPBackend.MATH):
        forget_device()
        yield
    forget_device()


def forget_device() -> None:
    """Let accelerate choose a device anew."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach().float().cpu(), expected.detach().float().cpu(), atol=tolerance, rtol=0)


def assert_within(budget: int, seen: Synchronisations, what: str) -> None:
    """Fail for more than `budget` synchronisations; the message names their lines."""
    lines = "".join(f"\n  {place}: {count} x {kind}" for (place, kind), count in seen.items())
    assert sum(seen.values()) <= budget, f"{what} waits for the device more than {budget} times:{lines}"


class ComponentDevices(TorchDispatchMode):
    """Record on which devices the methods of some classes compute matrix products and convolutions, by class name."""

    def __init__(self, *methods: tuple[type, str]) -> None:
        super().__init__()
        self.devices: dict[str, set[str]] = defaultdict(set)
        self._methods, self._running = methods, [""]
        self._patches = ExitStack()

    def __enter__(self) -> Any:
        for cls, method in self._methods:
            self._patches.enter_context(patch.object(cls, method, self._named(cls.__name__, getattr(cls, method))))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def _named(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def named(*args: Any, **options: Any) -> Any:
            self._running.append(name)
            try:
                return method(*args, **options)
            finally:
                self._running.pop()

        return named

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.devices[self._running[-1]] |= {x.device.type for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **kwargs or {})
