"""Training checkpoints: one folder per step, written atomically, of safetensors and JSON. Nothing is pickled."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import atomic_folder, read_json, remove_temporaries, temporary_path, write_json

logger = logging.getLogger("odvae")

FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path | str, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: dict[str, Any],
                    keep: int, protect: Collection[int] = ()) -> Path:
    """Write `folder`/step-00000200: a {name}.safetensors for every entry of `tensors`, and meta.json with the step.

    Then remove all but the newest `keep` (at least 1) and the steps in `protect`. A complete checkpoint of this step is
    not written again: step n of a run has one value. Only one process at a time may write to `folder`.

    Returns:
        the checkpoint's folder.
    """
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    remove_temporaries(folder, "step-*")  # they may be gigabytes
    if target.exists() and not _is_complete(target):
        _remove(target)
    if not target.exists():
        with atomic_folder(target) as temporary:
            for name, group in tensors.items():
                save_file(_storable(group), temporary / f"{name}.safetensors")
            sizes = {name: (temporary / f"{name}.safetensors").stat().st_size for name in tensors}
            write_json(temporary / "meta.json", {"format": FORMAT, "tensors": sizes, "meta": meta, "step": step})
    kept = {f"step-{number:08d}" for number in protect}
    for old in list(_newest_first(folder))[max(1, keep):]:
        if old.name not in kept:
            _remove(old)
    return target


def latest_checkpoint(folder: Path | str) -> Path | None:
    """Return the complete checkpoint of the highest step, or None. Partly written or copied ones are skipped."""
    for path in _newest_first(Path(folder)):
        if _is_complete(path):
            return path
        logger.warning("skipping the incomplete checkpoint %s", path)
    return None


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: Path | str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Load what `save_checkpoint` wrote, on the CPU: tensors by name, and the meta with "step" in it.

    Raises:
        UserError: the folder is not a checkpoint, has another format, or a file is missing or broken.
    """
    path = Path(path)
    if not (path / "meta.json").is_file():
        raise UserError(f"{path} is not a checkpoint: it has no meta.json. Give a folder such as "
                        f"checkpoints/step-00000200 of a training run")
    head = read_json(path / "meta.json")
    if not isinstance(head, dict) or not {"format", "tensors", "meta", "step"} <= head.keys():
        raise UserError(f"{path} is not a checkpoint: its meta.json was written by something else")
    if head["format"] != FORMAT:
        raise UserError(f"{path} is a checkpoint in format {head['format']}; this version reads format {FORMAT}")
    tensors = {}
    for name in head["tensors"]:
        file = path / f"{name}.safetensors"
        try:
            tensors[name] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the checkpoint {path} is broken: {file.name} cannot be read ({error}). Remove this "
                            f"folder to resume from the previous checkpoint") from error
    return tensors, head["meta"] | {"step": head["step"]}


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split any `optimizer.state_dict()` into tensors by name and a JSON tree of the rest.

    The tree refers to each tensor by name, and keeps what JSON would lose: tuples, and keys that are numbers.
    TypeError for a value that is not a tensor, number, string, None or a container of these.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[key, encode(item, f"{name}.{key}".lstrip("."))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [encode(item, f"{name}.{i}") for i, item in enumerate(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{name}: a {type(value).__name__} cannot be stored in a checkpoint")

    return tensors, encode(state, "")


def unflatten_optimizer(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`, for `optimizer.load_state_dict`."""

    def decode(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: decode(item) for key, item in content}
        return {"list": list, "tuple": tuple}[kind](decode(item) for item in content)

    state: dict[str, Any] = decode(meta)
    return state


def _storable(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make tensors contiguous, on the CPU and without shared memory (tied weights), which safetensors refuses."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return stored


def _newest_first(folder: Path) -> Iterator[Path]:
    steps = [(int(match[1]), path) for path in (folder.iterdir() if folder.is_dir() else ())
             if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return (path for _, path in sorted(steps, reverse=True))


def _is_complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / "meta.json").read_text(encoding="utf-8"))["tensors"]
        return all((path / f"{name}.safetensors").stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove(path: Path) -> None:
    """Rename first: a partly removed folder must not look like a checkpoint."""
    hidden = temporary_path(path)
    os.rename(path, hidden)
    shutil.rmtree(hidden)
