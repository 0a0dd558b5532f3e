"""Batches in pinned memory, from which a copy to a GPU runs while the host goes on."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def pin(batch: Any) -> Any:
    """Return a batch whose tensors, also in dataclasses inside it, are in pinned memory."""
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{field.name: pin(getattr(batch, field.name)) for field in fields(batch)})
    return batch
