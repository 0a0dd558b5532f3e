"""Where a source's videos and photos lie: files, members of WebDataset tars, or anything that fsspec reaches (hf://,
s3://, https:// ...). A place knows its name, a stamp that changes with its bytes, and gives them as a local file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..runtime.errors import UserError
from .clips import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, as_text, caption_of, is_image, list_folder
from .failures import as_failure, printable
from .lists import Row, is_list, read_rows
from .video import VideoError

MEDIA = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS


@dataclass(frozen=True)
class Place:
    """The bytes of one video or photo."""

    name: str  # as an index tells it: relative to the source, with / between folders
    path: str  # a local file, or a URL
    stamp: str  # changes with the bytes: size and time, or what a remote system has for it; "" where neither can be had
    offset: int = 0  # in `path`, of a member of a tar
    size: int | None = None  # of a member of a tar; None: all of `path`

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))  # an index, a report and a caption are UTF-8

    def __str__(self) -> str:
        path = printable(self.path)
        return path if self.size is None else f"{path}::{self.name.rpartition('::')[2]}"

    @property
    def is_image(self) -> bool:
        """By its name: a photo, or a picture that moves (`image.is_animated`)."""
        return is_image(Path(self.name))

    @property
    def is_fetched(self) -> bool:
        """`local` makes a copy, which nobody changes; else it is the file itself."""
        return self.size is not None or is_url(self.path)

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """A local file with these bytes; what had to be fetched has no name, so that nothing is left of it however the
        process ends. Raises VideoError, of a kind of `failures.KINDS`."""
        if not self.is_fetched:
            with _by_a_readable_name(Path(self.path)) as path:
                yield path
            return
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(_open(self.path))
                copy, path = stack.enter_context(_without_name(Path(self.name).suffix))
                file.seek(self.offset)
                missing = _copy(file, copy, self.size)
                copy.flush()
            except Exception as error:  # each protocol has exceptions of its own
                raise as_failure(error, str(self), remote=is_url(self.path)) from error
            if missing:
                raise VideoError(f"{self} breaks off: {missing} bytes are missing", "copy or download it again",
                                 "remote" if is_url(self.path) else "truncated")
            yield path


@dataclass(frozen=True)
class Entry:
    """A place, or a span of it, with its caption."""

    place: Place
    start: float  # s
    end: float  # s
    caption: str
    caption_from_name: bool  # there was no other


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def list_entries(source: Path | str) -> tuple[list[Entry], list[tuple[Place, VideoError]]]:
    """What a source holds, in order, and what of it has a caption that cannot be read.

    Args:
        source: a folder with the folders below it (its photos too), a list (.jsonl, .csv, .parquet), a tar or a folder
            of tars in WebDataset's layout; each of them here, or at a URL.

    Raises:
        UserError: there is no such thing, or nothing in it.
    """
    text = str(source)
    if text.endswith(".tar"):
        return _tars([text], text.rpartition("/")[0])
    if is_url(text):
        return _remote(text)
    folder = Path(text)
    if is_list(folder):
        return _rows(read_rows(folder), str(folder.parent))
    tars = sorted(folder.rglob("*.tar")) if folder.is_dir() else []
    if tars:
        return _tars([str(tar) for tar in tars], text)
    found = [(one, _local_place(one.path, folder)) for one in list_folder(folder, images=True)]
    return _captioned((Row(str(one.path), caption=one.caption), place, partial(caption_of, one.path, one.label))
                      for one, place in found)


def _captioned(found: Iterable[tuple[Row, Place, Callable[[], tuple[str, bool]]]]) -> tuple[
        list[Entry], list[tuple[Place, VideoError]]]:
    """Entries with the row's caption, or the one that the function finds."""
    entries, failed = list[Entry](), list[tuple[Place, VideoError]]()
    for row, place, find_caption in found:
        try:
            text, from_name = find_caption() if row.caption is None else (row.caption, False)
        except VideoError as error:
            failed.append((place, error))
            continue
        entries.append(Entry(place, row.start, row.end, text, from_name))
    return entries, failed


def _rows(rows: list[Row], base: str) -> tuple[list[Entry], list[tuple[Place, VideoError]]]:
    """The rows of a list whose relative paths begin at `base`, a folder or a URL. A .txt beside a file counts where the
    file is local."""

    def one(row: Row) -> tuple[Row, Place, Callable[[], tuple[str, bool]]]:
        path = row.path if is_url(row.path) or row.path.startswith("/") else f"{base}/{row.path}"
        if is_url(path):
            return row, Place(row.path, path, _remote_stamp(path)), lambda: (as_text(PurePosixPath(path).stem), True)
        return row, _local_place(Path(path), Path(base)), partial(caption_of, Path(path))

    return _captioned(map(one, rows))


def _local_place(path: Path, root: Path) -> Place:
    return Place(Path(os.path.relpath(path, root)).as_posix(), str(path), local_stamp(path))


def local_stamp(path: Path) -> str:
    """"" where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size}:{found.st_mtime_ns}"


def _remote(url: str) -> tuple[list[Entry], list[tuple[Place, VideoError]]]:
    """A list at a URL, or all media below it."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
        if is_list(PurePosixPath(path)):
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / PurePosixPath(path).name
                fs.get_file(path, str(copy))
                return _rows(read_rows(copy), url.rpartition("/")[0])
        found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    except UserError:
        raise
    except Exception as error:  # each protocol has exceptions of its own
        raise UserError(f"cannot reach {url}: {error}. Check the address, the network, and that fsspec has what this "
                        "protocol needs") from error
    tars = sorted(fs.unstrip_protocol(name) for name in found if name.endswith(".tar"))
    if tars:
        return _tars(tars, fs.unstrip_protocol(path))
    media = sorted(name for name in found if PurePosixPath(name).suffix.lower() in MEDIA)
    if not media:
        raise UserError(f"{url} holds no videos or photos; looked for {' '.join(MEDIA)}")

    def caption(name: str) -> tuple[str, bool]:
        text = str(PurePosixPath(name).with_suffix(".txt"))
        if text not in found:
            return as_text(PurePosixPath(name).stem), True
        return _decoded(fs.cat_file(text), text), False

    return _captioned((Row(name), Place(os.path.relpath(name, path), fs.unstrip_protocol(name), _stamp(found[name])),
                       partial(caption, name)) for name in media)


def _remote_stamp(url: str) -> str:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
        return _stamp(fs.info(path))
    except Exception:  # each protocol has exceptions of its own; why it cannot be had, reading it will say
        return ""


def _stamp(info: dict[str, Any]) -> str:
    known = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "created", "updated", "checksum")
    return json.dumps([info.get("size"), *(str(info[name]) for name in known if info.get(name) is not None)])


def _tars(tars: list[str], root: str) -> tuple[list[Entry], list[tuple[Place, VideoError]]]:
    """The samples of WebDataset tars: files of one key, the name up to the first dot of its last part."""
    entries, failed = list[Entry](), list[tuple[Place, VideoError]]()
    for tar in tars:
        short = tar.removeprefix(root).lstrip("/") or PurePosixPath(tar).name
        try:
            with _open(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                stamp = _remote_stamp(tar) if is_url(tar) else local_stamp(Path(tar))
                samples: dict[str, list[tarfile.TarInfo]] = {}
                for member in archive:
                    if member.isfile():
                        samples.setdefault(_key(member.name), []).append(member)
                for key, members in samples.items():
                    for member in members:
                        if PurePosixPath(member.name).suffix.lower() not in MEDIA:
                            continue
                        place = Place(f"{short}::{member.name}", tar, f"{stamp}:{member.offset_data}:{member.size}",
                                      member.offset_data, member.size)
                        try:
                            caption, from_name = _tar_caption(archive, key, members)
                            entries.append(Entry(place, 0.0, float("inf"), caption, from_name))
                        except VideoError as error:
                            failed.append((place, error))
        except Exception as error:  # each protocol has exceptions of its own
            failure = as_failure(error, printable(tar), remote=is_url(tar))
            if failure.kind == "corrupt":
                failure = VideoError(f"{printable(tar)} cannot be read as a tar ({error})", "make or copy it again",
                                     "truncated")
            failed.append((Place(short, tar, ""), failure))
    if not entries and not failed:
        raise UserError(f"{root} holds tars, but no videos or photos in them; looked for {' '.join(MEDIA)}")
    return entries, failed


def _key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _tar_caption(archive: tarfile.TarFile, key: str, members: list[tarfile.TarInfo]) -> tuple[str, bool]:
    """From .txt, from `caption` or `text` in .json, from .cls; else the key."""
    by_suffix = {PurePosixPath(member.name).suffix.lower(): member for member in members}

    def text(suffix: str) -> str:
        file = archive.extractfile(by_suffix[suffix])
        assert file is not None
        return _decoded(file.read(), by_suffix[suffix].name)

    if ".txt" in by_suffix:
        return text(".txt"), False
    if ".json" in by_suffix:
        try:
            found = json.loads(text(".json"))
        except ValueError as error:
            raise VideoError(f"{by_suffix['.json'].name} is not JSON ({error})", "write it again",
                             "caption") from error
        for name in ("caption", "text"):
            if isinstance(found, dict) and isinstance(found.get(name), str):
                return found[name].strip(), False
    if ".cls" in by_suffix:
        return text(".cls"), False
    return as_text(key.rpartition("/")[2]), True


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise VideoError(f"{name} is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8",
                         "caption") from error


@contextlib.contextmanager
def _without_name(suffix: str) -> Iterator[tuple[Any, Path]]:
    """A temporary file and a path to it; on Linux it has no other name, and ends with the process."""
    if os.path.exists("/proc/self/fd"):
        with tempfile.TemporaryFile() as file:
            yield file, Path(f"/proc/self/fd/{file.fileno()}")
    else:
        with tempfile.NamedTemporaryFile(suffix=suffix) as named:
            yield named, Path(named.name)


@contextlib.contextmanager
def _by_a_readable_name(path: Path) -> Iterator[Path]:
    """The file under a name that decoders, which take UTF-8 alone, can open."""
    if printable(str(path)) == str(path) or not os.path.exists("/proc/self/fd"):
        yield path
        return
    try:
        file = open(path, "rb")  # noqa: SIM115, closed below; what is raised while it is used is not ours
    except OSError as error:
        raise as_failure(error, printable(str(path))) from error
    with file:
        yield Path(f"/proc/self/fd/{file.fileno()}")


def _open(path: str) -> Any:
    if not is_url(path):
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


def _copy(source: IO[bytes], target: Any, size: int | None) -> int:
    """How many of `size` bytes (None: whatever there is) are missing in the source."""
    if size is None:
        shutil.copyfileobj(source, target, 2**20)
        return 0
    while size > 0 and (part := source.read(min(size, 2**20))):
        target.write(part)
        size -= len(part)
    return size
