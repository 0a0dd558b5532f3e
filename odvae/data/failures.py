"""Which failures to read a source file are transient, and when a cache build tries such a file again: one table.

A failure of the file itself stands until the file changes. A failure of what lies around it (the network, a full disk,
permissions, memory, a limit on time) says nothing about the file, and is never recorded as if it did.
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
    """When a file that failed is tried again; each also with `--retry`, and when the file has changed."""

    NEVER = "the failure is recorded"
    HIGHER_LIMIT = "recorded with the limit in seconds; tried again by a build that allows more"
    NEXT_BUILD = "not recorded; tried again by the next build"
    BACKOFF = "not recorded; retried with backoff by this build, then tried again by the next one"


KINDS = {
    "empty": Retry.NEVER, "no video": Retry.NEVER, "codec": Retry.NEVER, "truncated": Retry.NEVER,
    "corrupt": Retry.NEVER, "too short": Retry.NEVER, "too long": Retry.NEVER, "size": Retry.NEVER,
    "not finite": Retry.NEVER,
    "hang": Retry.HIGHER_LIMIT,
    "missing": Retry.NEXT_BUILD, "permission": Retry.NEXT_BUILD, "caption": Retry.NEXT_BUILD,
    "changed": Retry.NEXT_BUILD, "setup": Retry.NEXT_BUILD,
    "crash": Retry.NEXT_BUILD,  # also what the system does where memory runs out
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
LOW_MEMORY = 2**30  # bytes of free memory; where there is more, what asked in vain asked for too much
_BY_STATUS = {401: "permission", 403: "permission", 404: "missing", 410: "missing"}

ADVICE = {
    "disk full": "free some space where temporary files go (TMPDIR), then build again",
    "permission": "give this user the right to read it, then build again",
    "missing": "put it back, or take it off the list",
    "memory": "let other programs end, or use fewer --workers, then build again",
    "unavailable": "see that its file system works, then build again",
    "remote": "see that it is there and can be reached, then build again",
    "setup": "correct its address, or install what it needs; then build again",
}


def retry_policy(error: Exception) -> Retry:
    """When to try a file again that failed like this."""
    return KINDS.get(error.kind, Retry.NEVER) if isinstance(error, VideoError) else Retry.NEVER


def is_transient(error: Exception, *, remote: bool = False) -> bool:
    """Whether to wait and try again what raised this; `remote` as `to_video_error` takes it."""
    return retry_policy(to_video_error(error, "", remote=remote)) is Retry.BACKOFF


def is_recorded(kind: str) -> bool:
    """Whether a failure says something about the file that a later build may rely on."""
    return KINDS.get(kind, Retry.NEVER) in (Retry.NEVER, Retry.HIGHER_LIMIT)


def is_still_valid(kind: str, limit: float | None, seconds: float) -> bool:
    """Whether a recorded failure counts for a build that allows `seconds` a file, when it happened under `limit`."""
    return is_recorded(kind) and (KINDS.get(kind) is not Retry.HIGHER_LIMIT or (limit is not None and seconds <= limit))


def to_video_error(error: BaseException, where: str, *, remote: bool = False) -> VideoError:
    """Any exception from reading a file as a VideoError of the right kind, with a message that names the file.

    Args:
        where: the file, for people.
        remote: it came from the network, so that an error of an unknown type is the network's.
    """
    known = isinstance(error, VideoError) and not is_recorded(error.kind)
    kind, cause = (None, error) if known else _external_kind(error, remote)
    if kind is not None:
        return VideoError(f"{where} cannot be read ({describe(cause)})" if kind != "missing" else
                          f"{where}: there is no such file", ADVICE[kind], kind)
    if isinstance(error, VideoError):  # what was fetched lies somewhere without a name
        return VideoError(error.reason if where in error.reason else f"{where}: {error.reason}", error.advice,
                          error.kind)
    return VideoError(f"{where} cannot be read ({describe(error)})", "copy or download it again", "corrupt")


def cache_file_error(error: Exception, path: object, advice: str) -> UserError:
    """Why a file of a cache cannot be read: it is damaged, with advice, or what lies around it fails, which says
    nothing about the file."""
    failure = to_video_error(error, str(path))
    if is_recorded(failure.kind) or failure.kind == "missing":
        return UserError(f"{path} is damaged ({error}); {advice}")
    return UserError(f"{failure.reason}, which is no damage and may pass: see that its file system works and who may "
                     "read it")


def describe(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _external_kind(error: BaseException, remote: bool) -> tuple[str | None, BaseException]:
    """The kind of a failure that is not the file's own (None where it is), and what caused it."""
    for one in _causes(error):
        if isinstance(one, VideoError):
            continue
        response = getattr(one, "response", None)
        kind = _BY_STATUS.get(getattr(one, "status", None) or getattr(response, "status_code", None) or 0)
        kind = kind or (_BY_ERRNO.get(one.errno or 0) if isinstance(one, OSError) else None)
        kind = kind or next((name for type_, name in _BY_TYPE if isinstance(one, type_)), None)
        if kind == "unavailable" and isinstance(one, FFmpegError):  # what FFmpeg says of damaged files too
            continue
        if kind == "memory" and psutil.virtual_memory().available > LOW_MEMORY:  # a damaged header asks for any amount
            continue
        if kind is not None:
            return "remote" if remote and kind == "unavailable" else kind, one
        if remote and isinstance(one, ValueError):  # no address, or a protocol that nothing here knows
            return "setup", one
    return "remote" if remote and not isinstance(error, VideoError) else None, error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
