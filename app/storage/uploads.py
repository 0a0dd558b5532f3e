"""Files that users bring: checked before anybody else sees them, and found by an id, never by a name of a client's.

    FOLDER/ID.mp4     the file; its extension says what it is, not what it was called
           ID.json    what is known of it; a file without one was never accepted

What a file is, its first bytes tell: only containers are taken that hold their own data, no playlists or lists of files
that would make FFmpeg open something else. It is then opened in a process of its own, with limits on memory and time,
so that a file which makes a decoder crash, hang or swell takes nothing with it.
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

MAX_NAME = 100  # characters
ROOM = 2**28  # bytes that must stay free on the disk
CHECK_SECONDS = 120.0  # for one file
TAKEN = "a video as MP4, MOV, WebM, MKV, AVI, OGG, MPEG or GIF, or an image as PNG, JPEG, WebP or BMP"

# What a file begins with: extension, then the reader's name for it (FFmpeg's for videos, Pillow's for images).
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
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}

_checks = threading.BoundedSemaphore(2)  # processes at a time


@dataclass(frozen=True)
class Upload:
    """A file that was brought and can be decoded. `name` is the client's, harmless and for display only."""

    id: str
    path: Path
    name: str
    owner: str
    kind: Literal["video", "image"]
    width: int  # pixels, upright
    height: int
    frames: int | None  # None: not known; 1 for an image
    frame_rate: float | None  # frames a second, the mean; None for an image
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
        """Take a file that the server itself wrote; it stays where it is. UserError for what cannot be used."""
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
        """Take a file as it comes in. One that becomes too large is given up at once. Raises UserError as `add`."""
        name = sanitize_filename(name)
        with self._incoming() as temporary:
            with temporary.open("xb") as file:
                for chunk in chunks:
                    self._check_size(name, file.tell() + len(chunk))
                    file.write(chunk)
            return self._accept(temporary, name, owner)

    async def receive_async(self, chunks: AsyncIterable[bytes], name: str, owner: str) -> Upload:
        """`receive` for a request's stream; the checks run in a thread."""
        import asyncio

        name = sanitize_filename(name)
        with self._incoming() as temporary:
            with temporary.open("xb") as file:
                async for chunk in chunks:
                    self._check_size(name, file.tell() + len(chunk))
                    file.write(chunk)
            return await asyncio.to_thread(self._accept, temporary, name, owner)

    def find(self, upload_id: str, owner: str | None) -> Upload:
        """The owner's upload of that id (None: anybody's). It counts as used now. Raises UserError where there is none.
        """
        if is_id(upload_id):
            with contextlib.suppress(UserError, OSError, KeyError, TypeError):
                known = read_json(self._about(upload_id))
                path = self.folder / f"{upload_id}{known.pop('extension')}"
                if owner in (None, known["owner"]) and path.is_file():
                    os.utime(self._about(upload_id))
                    return Upload(id=upload_id, path=path, **known)
        raise UserError("That file is not here any more, or was never here: upload it again.")

    def remove_orphans(self, older_than_seconds: float) -> int:
        """Remove what was not used for so long, and what a kill left half taken. Returns how many files went."""
        limit, gone = time.time() - older_than_seconds, 0
        for path in list(self.folder.glob("*")) if self.folder.is_dir() else ():  # the hidden ones too
            about = self._about(path.stem)
            with contextlib.suppress(OSError):
                if path == about or (about if about.is_file() else path).stat().st_mtime >= limit:
                    continue
                about.unlink(missing_ok=True)  # first, so that it cannot be found any more
                path.unlink()
                gone += 1
        return gone

    def _about(self, upload_id: str) -> Path:
        return self.folder / f"{upload_id}.json"

    def _check_size(self, name: str, size: int) -> None:
        if size > self.max_bytes:
            raise UserError(f"{name} is too large: at most {format_bytes(self.max_bytes)} are taken. Cut it, or "
                            "compress it more.")

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A new temporary name in the folder; nothing is left of it at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder).free < ROOM:
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
        os.utime(path)  # a link has the age of what it was made from
        try:
            found = _inspect(path, reader, name, self.max_seconds)
            write_json(self._about(upload_id), {"extension": extension, "name": name, "owner": owner, **found})
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return Upload(id=upload_id, path=path, name=name, owner=owner, **found)


def sanitize_filename(name: str) -> str:
    """A client's name for a file, for display and for downloads: no folders, nothing invisible, no device, not long."""
    name = unicodedata.normalize("NFC", name[-(2**16) :].replace("\\", "/").rsplit("/", 1)[-1])
    # Categories C: control, format (which turns the direction of writing), surrogate, private, unassigned.
    name = "".join(sign for sign in name if unicodedata.category(sign)[0] != "C")
    name = re.sub(r'[<>:"|?*]', "_", re.sub(r"\s+", " ", name)).lstrip(" .-").rstrip(" .")
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension) > 10:
        stem, dot, extension = name, "", ""
    if stem.split(".")[0].strip().upper() in DEVICES:
        stem = f"_{stem}"
    return stem[: MAX_NAME - len(dot + extension)] + dot + extension or "upload"


def _sniff_type(path: Path, name: str) -> tuple[str, str]:
    """Extension and reader by a file's first bytes."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{name} is empty (0 bytes). Choose another file.")
    for sign, extension, reader in MAGIC_NUMBERS:
        if re.match(sign.encode("latin-1"), head, re.DOTALL):
            return extension, reader
    raise UserError(f"{name} is not a video or image that is taken here. Save it as {TAKEN}.")


def _inspect(path: Path, reader: str, name: str, max_seconds: float) -> dict[str, Any]:
    """The fields of Upload that `app.storage.probe_upload` finds in a file. Raises UserError where it is refused."""
    code = "from app.storage.probe_upload import main; main()"
    command = [sys.executable, "-P", "-c", code, str(path.absolute()), reader, str(max_seconds)]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    with _checks:
        try:
            done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=True,
                                  timeout=CHECK_SECONDS)
            found = json.loads(done.stdout)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{name} takes too long to be read. Cut it, or convert it to an MP4 with H.264.") from error
        except (subprocess.CalledProcessError, ValueError) as error:
            raise UserError(f"{name} cannot be read: the decoder broke down over it. Convert it to an MP4 with H.264, "
                            "or to PNG.") from error
    if problem := found.pop("problem", None):
        raise UserError(f"{name} {problem}")
    return found
