"""Uploaded files: probed before they are accepted, and found by an id, never by a client's name.

    FOLDER/ID.mp4     the file; its extension comes from its content, not from its name
           ID.json    its metadata; a file without one was never accepted

The first bytes decide the type: only containers with their own data are accepted, no playlists or lists of files that
would make FFmpeg open other files. The file is then probed in a process of its own, with limits on memory and time, so
that a file which makes a decoder crash, hang or grow does no other harm.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import AsyncIterable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.storage.jobs import is_id, new_id
from odvae.utils.errors import UserError
from odvae.utils.files import read_json, temporary_path, write_json
from odvae.utils.format import format_bytes

MAX_NAME_LENGTH = 100  # characters
MIN_FREE_DISK = 2**28  # bytes that must stay free on the disk
PROBE_TIMEOUT = 120.0  # seconds for one file
ACCEPTED = "a video as MP4, MOV, WebM, MKV, AVI, OGG, MPEG or GIF, or an image as PNG, JPEG, WebP or BMP"

# The first bytes, the extension, and the reader (FFmpeg's name for videos, Pillow's for images).
MAGIC_NUMBERS: tuple[tuple[str, str, str], ...] = (
    (r"....(ftyp|moov|mdat|wide|free|skip)", ".mp4", "mov"),
    (r"\x1a\x45\xdf\xa3", ".mkv", "matroska"),
    (r"RIFF....AVI ", ".avi", "avi"),
    (r"OggS", ".ogg", "ogg"),
    (r"GIF8[79]a", ".gif", "gif"),
    (r"\x47.{187}\x47.{187}\x47", ".ts", "mpegts"),
    (r"\x00\x00\x01\xba", ".mpg", "mpeg"),
    (r"\x89PNG\r\n\x1a\n", ".png", "PNG"),
    (r"\xff\xd8\xff", ".jpg", "JPEG"),
    (r"RIFF....WEBP", ".webp", "WEBP"),
    (r"BM", ".bmp", "BMP"),
)
RESERVED_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}

_probes = threading.BoundedSemaphore(2)  # processes at a time


@dataclass(frozen=True)
class Upload:
    """An accepted file. `name` is the client's, sanitized and for display only."""

    id: str
    path: Path
    name: str
    owner: str
    kind: Literal["video", "image"]
    width: int  # pixels, upright
    height: int
    frames: int | None  # None if unknown; 1 for an image
    frame_rate: float | None  # mean frames per second; None for an image
    seconds: float | None


@dataclass(frozen=True)
class Uploads:
    """The files in `folder`. Every method may be called from any thread.

    Args:
        max_bytes: of one file.
        max_seconds: of one video.
    """

    folder: Path
    max_bytes: int
    max_seconds: float

    def add(self, source: Path, name: str, owner: str) -> Upload:
        """Accept a file on the server's disk, which stays where it is. Raises UserError if it cannot be used."""
        name = sanitize_filename(name)
        status = source.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name} is not a file.")
        self._check_size(name, status.st_size)
        with self._incoming() as temporary:
            try:
                os.link(source, temporary)  # no bytes are copied
            except OSError:  # another disk
                shutil.copyfile(source, temporary)
            return self._accept(temporary, name, owner)

    def receive(self, chunks: Iterable[bytes], name: str, owner: str) -> Upload:
        """Accept a stream. Raises UserError as `add`, and as soon as the file is too large."""
        name = sanitize_filename(name)
        with self._incoming() as temporary:
            with temporary.open("xb") as file:
                for chunk in chunks:
                    self._check_size(name, file.tell() + len(chunk))
                    file.write(chunk)
            return self._accept(temporary, name, owner)

    async def receive_async(self, chunks: AsyncIterable[bytes], name: str, owner: str) -> Upload:
        """`receive` for a request's stream; the probe runs in a thread."""
        import asyncio

        name = sanitize_filename(name)
        with self._incoming() as temporary:
            with temporary.open("xb") as file:
                async for chunk in chunks:
                    self._check_size(name, file.tell() + len(chunk))
                    file.write(chunk)
            return await asyncio.to_thread(self._accept, temporary, name, owner)

    def find(self, upload_id: str, owner: str | None) -> Upload:
        """Return an upload of the owner's (None: anybody's) and mark it as used. Raises UserError if there is none."""
        if is_id(upload_id):
            with contextlib.suppress(UserError, OSError, KeyError, TypeError):
                metadata = read_json(self._metadata_path(upload_id))
                path = self.folder / f"{upload_id}{metadata.pop('extension')}"
                if owner in (None, metadata["owner"]) and path.is_file():
                    os.utime(self._metadata_path(upload_id))
                    return Upload(id=upload_id, path=path, **metadata)
        raise UserError("This file is not here any more: upload it again.")

    def remove_orphans(self, older_than_seconds: float) -> int:
        """Remove uploads that were not used for so long, and what a kill left. Return the number of files."""
        limit, removed = time.time() - older_than_seconds, 0
        for path in list(self.folder.glob("*")) if self.folder.is_dir() else ():  # with hidden files
            metadata = self._metadata_path(path.stem)
            with contextlib.suppress(OSError):
                if path == metadata or (metadata if metadata.is_file() else path).stat().st_mtime >= limit:
                    continue
                metadata.unlink(missing_ok=True)  # first, so that it is not found any more
                path.unlink()
                removed += 1
        return removed

    def _metadata_path(self, upload_id: str) -> Path:
        return self.folder / f"{upload_id}.json"

    def _check_size(self, name: str, size: int) -> None:
        if size > self.max_bytes:
            raise UserError(f"{name} is too large: at most {format_bytes(self.max_bytes)} are accepted. Cut "
                            "it, or compress it more.")

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[Path]:
        """Yield a new temporary path in the folder, and remove it at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free < MIN_FREE_DISK:
            raise UserError("The server's disk is nearly full. Delete something from the history, then try again.")
        temporary = temporary_path(self.folder / "upload")
        try:
            yield temporary
        except OSError as error:
            if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
                raise
            raise UserError("The server's disk is full. Delete something from the history, then try again.") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _accept(self, temporary: Path, name: str, owner: str) -> Upload:
        extension, reader = _sniff_type(temporary, name)
        upload_id = new_id()
        path = self.folder / f"{upload_id}{extension}"
        os.replace(temporary, path)
        os.utime(path)  # a hard link has the age of its source
        try:
            info = _probe(path, reader, name, self.max_seconds)
            write_json(self._metadata_path(upload_id), {"extension": extension, "name": name, "owner": owner, **info})
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return Upload(id=upload_id, path=path, name=name, owner=owner, **info)


def sanitize_filename(name: str) -> str:
    """Return a client's file name, safe for display and downloads: no folders, control characters or device names."""
    name = unicodedata.normalize("NFC", name[-(2**16) :].replace("\\", "/").rsplit("/", 1)[-1])
    # Categories C: control, format (such as right-to-left marks), surrogate, private, unassigned.
    name = "".join(char for char in name if unicodedata.category(char)[0] != "C")
    name = re.sub(r'[<>:"|?*]', "_", re.sub(r"\s+", " ", name)).lstrip(" .-").rstrip(" .")
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension) > 10:
        stem, dot, extension = name, "", ""
    if stem.split(".")[0].strip().upper() in RESERVED_NAMES:
        stem = f"_{stem}"
    return stem[: MAX_NAME_LENGTH - len(dot + extension)] + dot + extension or "upload"


def _sniff_type(path: Path, name: str) -> tuple[str, str]:
    """Return the extension and the reader by a file's first bytes."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{name} is empty (0 bytes). Choose another file.")
    for pattern, extension, reader in MAGIC_NUMBERS:
        if re.match(pattern.encode("latin-1"), head, re.DOTALL):
            return extension, reader
    raise UserError(f"{name} is not a video or image of an accepted type. Save it as {ACCEPTED}.")


def _probe(path: Path, reader: str, name: str, max_seconds: float) -> dict[str, Any]:
    """Return the fields of Upload that `app.storage.probe_upload` finds. Raises UserError if the file is refused."""
    code = "from app.storage.probe_upload import main; main()"
    command = [sys.executable, "-P", "-c", code, str(path.absolute()), reader, str(max_seconds)]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    with _probes:
        try:
            process = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=True,
                                     timeout=PROBE_TIMEOUT)
            info = json.loads(process.stdout)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{name} takes too long to read. Cut it, or convert it to an MP4 with H.264.") from error
        except (subprocess.CalledProcessError, ValueError) as error:
            raise UserError(f"{name} cannot be read: the decoder crashed. Convert it to an MP4 with H.264, "
                            "or to PNG.") from error
    if problem := info.pop("problem", None):
        raise UserError(f"{name} {problem}")
    return info
