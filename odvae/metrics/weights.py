"""Load weight files given by the user: without unpickling, and with errors that name the keys that do not match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..utils.errors import UserError


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of one written by torch.save. Raises UserError if it cannot be
    read."""
    try:
        tensors = (load_file(file) if file.suffix == ".safetensors" else
                   torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load alone raises five kinds
        kind = "safetensors" if isinstance(error, SafetensorError) else "weights"
        raise UserError(f"cannot read {kind} from {file}: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"cannot read weights from {file}: it does not hold a dict of tensors; give a state_dict")
    return tensors


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], failure: str) -> None:
    """Load weights whose names and shapes must match the model's, except for the counters of batch norms.

    Raises:
        UserError: they do not match; the message is `failure` and the names of the keys.
    """
    own, given = ({key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
                  for tensors in (model.state_dict(), state))
    wrong = [f"{key} {tuple(given[key].shape)} for {tuple(own[key].shape)}" for key in own.keys() & given.keys()
             if given[key].shape != own[key].shape]
    if problems := key_list(missing=own.keys() - given.keys(), unknown=given.keys() - own.keys(), shaped=wrong):
        raise UserError(f"{failure}: {problems}")
    model.load_state_dict(given, strict=False)  # strict except for the counters


def key_list(**kinds: Iterable[str]) -> str:
    """Format keys as "missing a, b; unknown c", the first six of each kind; empty if there are none."""
    lists = {kind: sorted(keys) for kind, keys in kinds.items()}
    return "; ".join(f"{kind} {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
                     for kind, keys in lists.items() if keys)
