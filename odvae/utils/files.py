"""Atomic writes: to a temporary next to the target, flushed to disk, then renamed. And hashes of files and models."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, output_path

if TYPE_CHECKING:
    from torch import Tensor

_SURROGATE = re.compile("[\ud800-\udfff]")
UNSUPPORTED = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # errors of file systems without a feature
_UMASK = os.umask(0)  # it cannot be read without being set
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path next to `target` to write a file to; it becomes `target` when the block succeeds.

    On any exception, including Ctrl-C and a full disk, the temporary is removed and an old `target` is unchanged.
    Missing parent folders are created. The temporary's name has no extension: pass the format to the writer.

    Raises:
        UserError: `target` is a folder, or a URL.
    """
    target = output_path(target)
    if target.is_dir():
        raise UserError(f"cannot write the file {target}: a folder of that name exists; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        yield temporary
        share(temporary)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # report the first error
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(target: Path | str, replace: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder next to `target` to fill; it becomes `target` when the block succeeds.

    On any exception it is removed with its content.

    Args:
        replace: an existing folder, with all of its content. Others see the old one, for a moment none, then the new
            one.

    Raises:
        UserError: `target` exists and is not to be replaced, or is no folder; or it is a URL.
    """
    target = output_path(target)
    if replace:
        target = Path(os.path.realpath(target))  # of a link, what it points to
    _refuse_existing(target, replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):
            share(path)
            sync(path)
        sync(temporary)
        _refuse_existing(target, replace)
        if target.exists():
            _replace_folder(temporary, target)
        else:
            os.rename(temporary, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target` instead of a folder, which is removed."""
    old = temporary_path(target)
    os.rename(target, old)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def output_folder(path: Path | str) -> Path:
    """Create a folder for results, and check that it is writable, before the work starts.

    Raises:
        UserError: a URL.
        OSError: it cannot be created or written to.
    """
    folder = output_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    trial = temporary_path(folder / "trial")
    trial.touch()
    trial.unlink()
    return folder


def path_text(text: Path | str) -> str:
    r"""Return a path, or a text with one, as valid UTF-8: bytes of a name that are not UTF-8 are escaped as \xNN."""
    return _SURROGATE.sub(lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}" if "\udc80" <= match[0] <= "\udcff" else
                          f"\\u{ord(match[0]):04x}", str(text))


def temporary_path(target: Path) -> Path:
    """Return a new hidden name in the same folder (a rename across file systems is not atomic)."""
    # A name has at most 255 bytes; 48 characters of the target's leave room for the rest.
    return target.with_name(f".{target.name[:48]}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


@functools.cache
def _host() -> str:
    """Return a short hash of this machine's name."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def remove_abandoned(target: Path) -> None:
    """Remove the temporaries of a target that processes of this machine have left which were killed. Call it before
    this process writes the target."""
    for path in target.parent.glob(f".{glob.escape(target.name[:48])}.tmp-*"):
        host, *rest = path.name.rpartition(".tmp-")[2].split("-")
        if host == _host() and len(rest) == 2 and rest[0].isdecimal() and not _is_another(int(rest[0])):
            _remove(path)


def _is_another(pid: int) -> bool:
    """Whether another process has this number. In a container a killed one may have had that of this one."""
    import psutil  # here, so that --help does not import it

    return pid != os.getpid() and psutil.pid_exists(pid)


def remove_temporaries(folder: Path, of: str = "*") -> None:
    """Remove temporary files and folders that a killed process left anywhere below `folder`.

    Call it only where no other process writes. `of` is a pattern of the targets' names.
    """
    for path in list(folder.rglob(f".{of}.tmp-*")):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # its folder has just been removed
            path.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path | str, obj: Any) -> None:
    """Write indented JSON atomically. TypeError, with nothing written, for what JSON cannot hold."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path} is not a file") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is broken: it is not JSON ({error}); restore it, or create it again") from error


def fingerprint(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a model: names, dtypes, shapes and bytes of its tensors, and its config as JSON.

    Independent of the order of either mapping, of the device and of strides; a tuple equals a list. TypeError for a
    config value that JSON cannot hold (a path counts as its text, a dtype as its name).
    """
    import torch  # here, so that reading and writing files does not import torch

    def plain(value: Any) -> str:
        if isinstance(value, Path | torch.dtype):
            return str(value)
        raise TypeError(f"a config value of type {type(value).__name__} has no fingerprint: {value!r}")

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(dict(config), sort_keys=True, separators=(",", ":"), default=plain).encode())
    return digest.hexdigest()


def hash_file(path: Path | str) -> str:
    """Return the SHA-256 (hex) of a file's content, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_existing(target: Path, replace: bool) -> None:
    if os.path.lexists(target) and not (replace and target.is_dir()):
        raise UserError(f"{target} exists already and is not replaced; remove it, or choose another name")


def share(path: Path) -> None:
    """Give a file the mode that the umask leaves: safetensors makes files that only their owner can read."""
    if path.is_file() and not path.is_symlink():
        with contextlib.suppress(OSError):  # of a file system without modes
            path.chmod(0o666 & ~_UMASK)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Network and FUSE file systems that cannot flush a folder; or a folder that is writable but not readable.
        if not path.is_dir() or error.errno not in {*UNSUPPORTED, errno.EINVAL, errno.EBADF, errno.EACCES}:
            raise
