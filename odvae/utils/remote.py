"""Remote file systems of fsspec: reading ranges of a file, and which exceptions are transient."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import Any


class RangeReader(io.RawIOBase):
    """A file of which ranges are read: each `read` is one request."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self._read_range, self._size, self._position = read_range, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._position + size)
        data = self._read_range(self._position, end) if end > self._position else b""
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def is_transient(error: Exception) -> bool:
    """Return whether an exception of a remote file system says that the network or the store fails at the moment, and
    not that the file, the access to it or the call is wrong. Each protocol has exceptions of its own."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError
                  | NotImplementedError | ImportError | TypeError | AttributeError | LookupError | MemoryError):
        return False
    if isinstance(error, ValueError) or getattr(error, "errno", None) == errno.EINVAL or is_failed_condition(error):
        return False
    status = next((value for name in ("status", "code") if isinstance(value := getattr(error, name, None), int)), 0)
    if 400 <= status < 500:
        return status in (408, 429)
    names = {kind.__name__ for kind in type(error).__mro__}
    return "BotoCoreError" not in names or bool(names & {"HTTPClientError", "ConnectionError"})  # else: credentials


def is_failed_condition(error: BaseException | None) -> bool:
    """Whether S3 has refused a conditional write."""
    while error is not None:
        response = getattr(error, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        if code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return True
        error = error.__cause__
    return False
