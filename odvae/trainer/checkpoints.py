"""Training checkpoints: one folder per step, written atomically, of safetensors and JSON. Nothing is pickled."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import atomic_folder, read_json, remove_temporaries, share, sync, temporary_path, write_json

logger = logging.getLogger("odvae")

FORMAT = 2
_NAME = re.compile(r"step-(\d+)")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def save_checkpoint(folder: Path | str, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: dict[str, Any],
                    keep: int, protect: Collection[int] = ()) -> Path:
    """Write `folder`/step-00000200: a {name}.safetensors for every entry of `tensors`, and meta.json with the step.

    Then remove all but the newest `keep` (at least 1) and the steps in `protect`. A complete checkpoint of this step is
    not written again: step n of a run has one value. Only one process at a time may write to `folder`.

    Returns:
        the checkpoint's folder.
    """
    folder = Path(folder)
    target = checkpoint_path(folder, step)
    _make_room(target)
    if not target.exists():
        with atomic_folder(target) as temporary:
            write_tensors(temporary, tensors)
            _write_meta(temporary, step, meta, sorted(tensors), sharded=False)
    remove_old_checkpoints(folder, step, keep, protect)
    return target


def write_tensors(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a {name}.safetensors for every entry."""
    for name, group in tensors.items():
        save_file(_storable(group), folder / f"{name}.safetensors")


def temporary_checkpoint(target: Path) -> Path | None:
    """Return a new folder for a checkpoint, for `commit_checkpoint`; None if `target` is complete."""
    _make_room(target)
    if target.exists():
        return None
    temporary = temporary_path(target)
    temporary.mkdir(parents=True)
    return temporary


def commit_checkpoint(temporary: Path, target: Path, step: int, meta: dict[str, Any], groups: Sequence[str], *,
                      sharded: bool) -> None:
    """Make a filled folder the checkpoint `target`, by a rename. The tensors' files must be on disk."""
    _write_meta(temporary, step, meta, groups, sharded=sharded)
    for path in temporary.iterdir():
        share(path)
    sync(temporary)
    os.rename(temporary, target)
    sync(target.parent)


def _write_meta(folder: Path, step: int, meta: dict[str, Any], groups: Sequence[str], *, sharded: bool) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    write_json(folder / "meta.json", {"format": FORMAT, "sharded": sharded, "groups": list(groups), "files": files,
                                      "meta": meta, "step": step})


def _make_room(target: Path) -> None:
    """Remove what killed processes left, and an incomplete `target`."""
    remove_temporaries(target.parent, "step-*")  # they may be gigabytes
    if target.exists() and not _is_complete(target):
        _remove(target)


def remove_old_checkpoints(folder: Path, step: int, keep: int, protect: Collection[int] = ()) -> None:
    """Remove all up to `step` but the newest `keep` (at least 1) and the steps in `protect`."""
    kept = {checkpoint_path(folder, number).name for number in protect}
    for old in [path for path in _newest_first(folder) if checkpoint_step(path) <= step][max(1, keep):]:
        if old.name not in kept:
            _remove(old)


def complete_checkpoints(folder: Path | str) -> Iterator[Path]:
    """Yield the complete checkpoints, the newest first. Partly written or copied ones are skipped."""
    for path in _newest_first(Path(folder)):
        if _is_complete(path):
            yield path
        else:
            logger.warning("skipping the incomplete checkpoint %s", path)


def latest_checkpoint(folder: Path | str) -> Path | None:
    """Return the complete checkpoint of the highest step, or None."""
    return next(complete_checkpoints(folder), None)


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which were not resumed from; return their new paths. A run that resumes from
    an older one writes these steps again."""
    renamed = []
    for path in [path for path in _newest_first(folder) if checkpoint_step(path) > step and _is_complete(path)]:
        aside = next(new for new in (path.with_name(f"unread-{i}-{path.name}") for i in range(10_000))
                     if not new.exists())
        os.rename(path, aside)
        renamed.append(aside)
    return renamed


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: Path | str, likes: Mapping[str, Mapping[str, Tensor]] | None = None,
                    groups: Sequence[str] | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Load what `save_checkpoint` or `ShardWriter` wrote: tensors by name, and the meta with "step" in it.

    Args:
        likes: of a sharded checkpoint, load shards like these, see `load_shards`; everything else is loaded whole, on
            the CPU.
        groups: only these of the tensors; None: all.

    Raises:
        UserError: the folder is not a checkpoint, has another format, or a file is missing or broken.
    """
    path = Path(path)
    head = _read_meta(path)
    groups = head["groups"] if groups is None else groups
    if head["sharded"]:
        from torch.distributed.checkpoint.api import CheckpointException

        from .shard_reader import load_shards

        try:
            _check_files(path, head["files"])
            tensors = load_shards(path, groups, likes or {})
        except (OSError, SafetensorError, ValueError, KeyError, CheckpointException) as error:
            raise _broken(path, "a file", error) from error
        return tensors, head["meta"] | {"step": head["step"]}
    tensors = {}
    for name in groups:
        file = path / f"{name}.safetensors"
        try:
            tensors[name] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise _broken(path, file.name, error) from error
    return tensors, head["meta"] | {"step": head["step"]}


def consolidate(path: Path | str, target: Path | str) -> Path:
    """Write a checkpoint of shards as one of whole tensors, a {name}.safetensors of each group: model, ema (by the
    names of the model's parameters), optimizer0 ... A run can resume from either. Holds one group in memory.

    Raises:
        UserError: `path` is not a checkpoint or broken; `target` exists.
    """
    head = _read_meta(Path(path))
    with atomic_folder(target) as temporary:
        for group in head["groups"]:
            tensors, _ = load_checkpoint(path, groups=[group])
            write_tensors(temporary, tensors)
        _write_meta(temporary, head["step"], head["meta"], head["groups"], sharded=False)
    return Path(target)


def _read_meta(path: Path) -> dict[str, Any]:
    if not (path / "meta.json").is_file():
        raise UserError(f"{path} is not a checkpoint: it has no meta.json. Give a folder such as "
                        f"checkpoints/step-00000200 of a training run")
    head = read_json(path / "meta.json")
    if not isinstance(head, dict) or not {"format", "meta", "step"} <= head.keys():
        raise UserError(f"{path} is not a checkpoint: its meta.json was written by something else")
    if head["format"] != FORMAT:
        raise UserError(f"{path} is a checkpoint in format {head['format']}; this version reads format {FORMAT}")
    return head


def _check_files(path: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if (found := (path / name).stat().st_size) != size:
            raise OSError(f"{name} has {found} bytes, not {size}")


def _broken(path: Path, what: str, error: BaseException) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"the checkpoint {path} is broken: {what} cannot be read ({lines[-1]}). Remove this "
                     f"folder to resume from the previous checkpoint")


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
        _check_files(path, json.loads((path / "meta.json").read_text(encoding="utf-8"))["files"])
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove(path: Path) -> None:
    """Rename first: a partly removed folder must not look like a checkpoint."""
    hidden = temporary_path(path)
    os.rename(path, hidden)
    shutil.rmtree(hidden)
