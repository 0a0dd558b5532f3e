"""Classify failures to read a source file, in one table: which are transient, and when a cache build retries.

A failure of the file itself is recorded and holds until the file changes. A failure of its environment (network, full
disk, permissions, memory, time limit) says nothing about the file, and is never recorded as if it did.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import Enum

import psutil
from av.error import FFmpegError

from ..utils.errors import UserError
from .errors import VideoError


class Retry(Enum):
    """When a failed file is tried again; in any case with `--retry`, and when the file has changed."""

    NEVER = "the failure is recorded"
    HIGHER_LIMIT = "recorded with the limit in seconds; tried again by a build with a higher one"
    NEXT_BUILD = "not recorded; tried again by the next build"
    BACKOFF = "not recorded; retried with backoff by this build, then tried again by the next one"


KINDS = {
    "empty": Retry.NEVER, "no video": Retry.NEVER, "codec": Retry.NEVER, "truncated": Retry.NEVER,
    "corrupt": Retry.NEVER, "too short": Retry.NEVER, "too long": Retry.NEVER, "size": Retry.NEVER,
    "not finite": Retry.NEVER,
    "hang": Retry.HIGHER_LIMIT,
    "missing": Retry.NEXT_BUILD, "permission": Retry.NEXT_BUILD, "caption": Retry.NEXT_BUILD,
    "changed": Retry.NEXT_BUILD, "setup": Retry.NEXT_BUILD,
    "crash": Retry.NEXT_BUILD,  # also if the system kills the process because memory runs out
    "memory": Retry.NEXT_BUILD,
    "remote": Retry.BACKOFF, "disk full": Retry.BACKOFF, "unavailable": Retry.BACKOFF,
}

_BY_ERRNO = {
    errno.ENOSPC: "disk full", errno.EDQUOT: "disk full",
    errno.EACCES: "permission", errno.EPERM: "permission",
    errno.ENOENT: "missing", errno.ENOTDIR: "missing",
    errno.ENOMEM: "memory",
} | dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EMFILE,
                   errno.ENFILE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH,
                   errno.ENETUNREACH, errno.ENETDOWN, errno.ENOTCONN), "unavailable")
_BY_TYPE = ((FileNotFoundError, "missing"), (PermissionError, "permission"), (MemoryError, "memory"),
            (ImportError, "setup"))
LOW_MEMORY = 2**30  # bytes; with more free memory, a failed allocation was unreasonably large
_BY_STATUS = {401: "permission", 403: "permission", 404: "missing", 410: "missing"}

ADVICE = {
    "disk full": "free some space where temporary files go (TMPDIR), then build again",
    "permission": "make it readable for this user, then build again",
    "missing": "restore it, or remove it from the list",
    "memory": "close other programs, or use fewer --workers, then build again",
    "unavailable": "check its file system, then build again",
    "remote": "check that it exists and can be reached, then build again",
    "setup": "correct its address, or install the packages it needs, then build again",
}


def retry_policy(error: Exception) -> Retry:
    """Return when to try a file again that failed with this error."""
    return KINDS.get(error.kind, Retry.NEVER) if isinstance(error, VideoError) else Retry.NEVER


def is_transient(error: Exception, *, remote: bool = False) -> bool:
    """Return whether an error is transient, so that the action is retried; `remote` as for `to_video_error`."""
    return retry_policy(to_video_error(error, "", remote=remote)) is Retry.BACKOFF


def is_recorded(kind: str) -> bool:
    """Return whether a failure is the file's own, so that later builds may rely on it."""
    return KINDS.get(kind, Retry.NEVER) in (Retry.NEVER, Retry.HIGHER_LIMIT)


def is_still_valid(kind: str, limit: float | None, seconds: float) -> bool:
    """Return whether a failure recorded under `limit` holds for a build that allows `seconds` per file."""
    return is_recorded(kind) and (KINDS.get(kind) is not Retry.HIGHER_LIMIT or (limit is not None and seconds <= limit))


def to_video_error(error: BaseException, where: str, *, remote: bool = False) -> VideoError:
    """Convert any exception from reading a file to a VideoError of the right kind, whose message names the file.

    Args:
        where: the file's name for the message.
        remote: it came from the network, so that an error of an unknown type is the network's.
    """
    known = isinstance(error, VideoError) and not is_recorded(error.kind)
    kind, cause = (None, error) if known else _external_kind(error, remote)
    if kind is not None:
        return VideoError(f"{where} cannot be read ({describe(cause)})" if kind != "missing" else
                          f"{where}: there is no such file", ADVICE[kind], kind)
    if isinstance(error, VideoError):  # a fetched copy has no name to show
        return VideoError(error.reason if where in error.reason else f"{where}: {error.reason}", error.advice,
                          error.kind)
    return VideoError(f"{where} cannot be read ({describe(error)})", "copy or download it again", "corrupt")


def cache_file_error(error: Exception, path: object, advice: str) -> UserError:
    """Return the error for an unreadable file of a cache: the file is damaged, with advice, or its environment fails,
    which says nothing about the file."""
    failure = to_video_error(error, str(path))
    if is_recorded(failure.kind) or failure.kind == "missing":
        return UserError(f"{path} is damaged ({error}); {advice}")
    return UserError(f"{failure.reason}; the file itself may be intact: check its file system and permissions")


def describe(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _external_kind(error: BaseException, remote: bool) -> tuple[str | None, BaseException]:
    """Return the kind of a failure of the environment (None if it is the file's own), and its cause."""
    for cause in _causes(error):
        if isinstance(cause, VideoError):
            continue
        response = getattr(cause, "response", None)
        kind = _BY_STATUS.get(getattr(cause, "status", None) or getattr(response, "status_code", None) or 0)
        kind = kind or (_BY_ERRNO.get(cause.errno or 0) if isinstance(cause, OSError) else None)
        kind = kind or next((name for type_, name in _BY_TYPE if isinstance(cause, type_)), None)
        if kind == "unavailable" and isinstance(cause, FFmpegError):  # FFmpeg's errors for damaged files too
            continue
        if kind == "memory" and psutil.virtual_memory().available > LOW_MEMORY:  # a damaged header claims any size
            continue
        if kind is not None:
            return "remote" if remote and kind == "unavailable" else kind, cause
        if remote and isinstance(cause, ValueError):  # an invalid address or an unknown protocol
            return "setup", cause
    return "remote" if remote and not isinstance(error, VideoError) else None, error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
