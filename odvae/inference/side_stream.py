"""Work on a second CUDA stream, beside what the current one does; elsewhere it runs at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class SideStream:
    """A second stream of a device. Its work runs in the order in which it is given, and what work keeps for later work
    (a streaming state) may be kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[..., Tensor], *inputs: Tensor) -> PendingTensor:
        """Begin `work` on tensors of the current stream, after what that has computed up to here; nothing waits.
        Returns its result, on its way to the CPU."""
        if self._stream is None:
            return PendingTensor(work(*inputs).cpu())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for x in inputs:
                x.record_stream(self._stream)  # its memory is not given to others before this stream has read it
            result = work(*inputs)
            host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            host.copy_(result, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return PendingTensor(host, done)


class PendingTensor:
    """A tensor on the CPU that a stream may still be writing."""

    def __init__(self, tensor: Tensor, done: torch.cuda.Event | None = None) -> None:
        self._tensor, self._done = tensor, done

    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return self._done is None or self._done.query()

    def result(self) -> Tensor:
        """Wait for the tensor and return it."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor
