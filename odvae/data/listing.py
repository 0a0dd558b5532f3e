"""List a source's files with their captions: folders, lists and WebDataset tars, local or at a URL."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath

from ..utils.backoff import Backoff
from ..utils.errors import UserError
from ..utils.files import path_text
from .entries import MEDIA, ListedFile, Listing, read_entries
from .failures import is_transient
from .files import SIDECAR_EXTENSIONS, count_left_out, count_unnamed, is_metadata, name_to_caption, stem_of, suffix_of
from .manifests import ManifestRow, is_manifest, iter_rows
from .sources import MediaRef, is_url, open_path, version_tag_of
from .spill import DistinctCount, Record, Spill, partition_hash
from .tars import read_tars, short_name
from .trees import Tree, open_tree, run_remote
from .video.reader import VideoError

ROWS = 4096  # of a list that are read at once
Keep = Callable[[int], bool]  # whether the files of a `partition_hash` are wanted


def list_entries(source: Path | str, columns: Sequence[str] = (), backoff: Backoff | None = None) -> Listing:
    """List the videos and photos of a source at once, for small ones; see `scan_source`."""
    with scan_source(source, columns, backoff) as scanned:
        listing = scanned.partition(0, 1)
        return listing._replace(left_out=scanned.left_out)


@contextmanager
def scan_source(source: Path | str, columns: Sequence[str] = (), backoff: Backoff | None = None,
                keep: Keep = lambda key: True) -> Iterator[ScannedSource]:
    """Read which videos and photos a source holds. What it says of them is then read partition by partition.

    Args:
        source: a folder and its subfolders, a list (.jsonl, .csv, .parquet), a WebDataset tar or a folder of them, or a
            folder of Parquet files; each local or at a URL. Of a folder with metadata.csv, .jsonl or .parquet, only the
            files that these name.
        columns: of lists, as `manifests.parse_columns` takes them.
        backoff: how transient failures are retried; None: not at all.
        keep: leave out what belongs to other partitions.

    Raises:
        UserError: no such source, an empty one, or an unreadable list.
    """
    with Spill() as spill:
        scanned = ScannedSource(spill, columns, backoff or Backoff(0), keep)
        scanned.scan(str(source))
        yield scanned


class ScannedSource:
    """A source that has been listed, of which one partition is read at a time.

    Attributes:
        files: number of its videos and photos, see `DistinctCount`.
        remote_bytes: of those that are fetched from a URL, where their size is known.
        left_out: files that are not read, counted by extension, in the partitions that have been read.
    """

    def __init__(self, spill: Spill, columns: Sequence[str], backoff: Backoff, keep: Keep) -> None:
        self._spill, self._columns, self._backoff, self._keep = spill, columns, backoff, keep
        self.files, self.remote_bytes, self.left_out = DistinctCount(), 0, Counter[str]()
        self._tree: Tree | None = None
        self._tars: Sequence[str] = ()
        self._lists: Sequence[str] = ()  # names in the tree
        self._set_aside: list[tuple[MediaRef, VideoError]] = []

    def scan(self, source: str) -> None:
        if source.endswith(".tar"):
            self._scan_tars([source], source.rpartition("/")[0])
        elif is_manifest(PurePosixPath(source) if is_url(source) else Path(source)):
            self._scan_lists([source], source.rpartition("/")[0] if is_url(source) else str(Path(source).parent))
        else:
            self._scan_tree(open_tree(source, self._backoff))

    def partition(self, number: int, count: int) -> Listing:
        """Read the version tags and captions of partition `number` of `count` (a power of two)."""
        records = self._spill.read(number, count)
        listed = [record for record in records if record.path is not None]
        if self._tree is not None and not self._tars and not self._lists:
            files = self._tree_files(self._tree, records)
            left_out = count_left_out((record.name for record in records if record.role is None),
                                      (file.record.name for file in files))
        else:
            files = [ListedFile(record, look_beside=self._has_text(record)) for record in listed]
            left_out = self._count_others(records)
        listing = read_entries(files, self._backoff)
        listing.set_aside.extend(
            (ref, error) for ref, error in self._set_aside if partition_hash(ref.name) % count == number)
        self.left_out += left_out
        return listing._replace(left_out=left_out)

    def _has_text(self, record: Record) -> bool:
        """Whether there may be a .txt beside a file that a list names."""
        return not self._tars and record.column is None and not is_url(record.path or "")

    def _count_others(self, records: Sequence[Record]) -> Counter[str]:
        """Count the files of a folder that neither its lists nor its tars give, by extension."""
        names = [record.name for record in records if record.path is None and record.role is None]
        if self._tars:
            return count_left_out(names, [name for name in names if name.endswith(".tar")])
        if not names:  # as beside a list on its own
            return Counter()
        used = [record.name for record in records if record.path is not None or record.role == "named"]
        return count_unnamed((name for name in names if name not in self._lists), used)

    def _tree_files(self, tree: Tree, records: Sequence[Record]) -> list[ListedFile]:
        """Return the media files of a partition of a folder, with their .txt, which is in the same partition."""
        records = sorted(records, key=lambda record: record.name.split("/"))
        texts = {stem_of(record.name): record.name for record in reversed(records)
                 if suffix_of(record.name) == ".txt"}
        files = []
        for record in records:
            if suffix_of(record.name) in MEDIA:
                label = name_to_caption(record.name.rpartition("/")[0]) if tree.has_classes else None
                text = texts.get(stem_of(record.name))
                files.append(ListedFile(record._replace(path=tree.path(record.name), title=record.name), label,
                                        None if text is None else tree.path(text)))
        return files

    def _add(self, record: Record, key: int | None = None) -> None:
        key = partition_hash(record.name) if key is None else key
        if self._keep(key):
            self._spill.add(record, key)

    def _add_media(self, record: Record, size: int = 0) -> None:
        self.files.add(record.name)
        if record.path is None or is_url(record.path):
            self.remote_bytes += size
        self._add(record)

    def _add_other(self, name: str) -> None:
        """Add a file that is no medium. a.mp4.json and a.mp4.txt belong to a.mp4; the latter's text to a.mp4.mov."""
        inner = stem_of(name)
        belongs = suffix_of(name) in SIDECAR_EXTENSIONS and suffix_of(inner) in MEDIA
        self._add(Record(name), partition_hash(inner if belongs else name))
        if belongs and suffix_of(name) == ".txt":
            self._add(Record(name, role="text"))

    def _scan_tree(self, tree: Tree) -> None:
        self._tree, tars, lists, parquet = tree, list[str](), list[str](), list[str]()
        media = names = 0
        for name, version_tag, size in tree.files():
            names += 1
            suffix = suffix_of(name)
            if name.endswith(".tar"):
                tars.append(name)
            elif is_metadata(name):
                lists.append(name)
            elif suffix == ".parquet":
                parquet.append(name)
            if suffix in MEDIA:
                media += 1
                tree.note_folder(name.rpartition("/")[0])
                self._add_media(Record(name, version_tag=version_tag), size)
            else:
                self._add_other(name)
        for name, error in tree.unreadable:
            self._set_aside.append(tree.reject(name, error))
        if tars or lists or not media:
            self.files, self.remote_bytes = DistinctCount(), 0
        if tars:
            self._scan_tars([tree.path(name) for name in sorted(tars, key=_folders)], tree.root)
        elif lists or (parquet and not media):
            self._lists = sorted(lists or parquet, key=_folders)
            self._scan_lists([tree.path(name) for name in self._lists], tree.root)
        elif not media:
            raise UserError(f"{tree.root} holds no videos or photos ({names} other files in it); expected "
                            f"{' '.join(MEDIA)}")

    def _scan_tars(self, tars: Sequence[str], root: str) -> None:
        self._tars = tars
        wanted = [tar for tar in tars if self._keep(partition_hash(f"{short_name(tar, root)}::"))]
        is_empty = len(wanted) == len(tars)
        for content in read_tars(wanted, root, self._backoff):
            self.left_out += content.left_out
            for record in content.records:
                self._add_media(record, record.size or 0)
            if content.rejected is not None:
                self._set_aside.append(content.rejected)
            is_empty = is_empty and not content.records and content.rejected is None
        if is_empty:
            raise UserError(f"the tars of {root} hold no videos or photos; expected {' '.join(MEDIA)}")

    def _scan_lists(self, lists: Sequence[str], root: str) -> None:
        """List the rows of manifests. Relative paths are relative to the manifest's own folder or URL."""
        for path in lists:
            base = path.rpartition("/")[0] or "."
            version_tag, here = version_tag_of(path, self._backoff), _relative_to(path, root)
            for row in _read_rows(path, self._columns, self._backoff):
                if row.cell is not None:
                    column, number = row.cell
                    name = path_text(f"{here}::{row.path or f'row-{number}'}")
                    record = Record(name, path, f"{version_tag}:{number}", number, column=column,
                                    title=row.path or name)
                else:
                    record = self._file_record(row.path, base, root)
                self._add_media(record._replace(start=row.start, end=row.end, captions=row.captions))

    def _file_record(self, path: str, base: str, root: str) -> Record:
        file = path if is_url(path) or path.startswith("/") else f"{base}/{path}"
        if not is_url(file):
            return Record(path_text(_relative_path(file, root)), file, title=path)
        name = path_text(path if is_url(path) else _relative_to(file, root))
        if self._tree is not None and (normal := os.path.normpath(name)) != name:
            self._add(Record(normal, role="named"))
        return Record(name, file, title=path)


def _folders(name: str) -> list[str]:
    return name.split("/")


def _relative_to(path: str, root: str) -> str:
    return path.removeprefix(root.rstrip("/") + "/")


def _relative_path(path: str, root: str) -> str:
    """Return a local path relative to a folder."""
    if path.startswith(f"{root}/") and os.path.normpath(path) == path:  # the usual case, in a tenth of the time
        return path[len(root) + 1:]
    return Path(os.path.relpath(path, root)).as_posix()


def _read_rows(path: str, columns: Sequence[str], backoff: Backoff) -> Iterator[ManifestRow]:
    """Yield the rows of a list. After a transient failure it is opened again, and the rows before are skipped."""
    rows: Iterator[ManifestRow] | None = None
    done = 0

    def read_some() -> list[ManifestRow]:
        nonlocal rows
        if rows is None:
            rows = islice(_open_rows(path, columns), done, None)
        try:
            return list(islice(rows, ROWS))
        except BaseException:
            rows = None
            raise

    while some := run_remote(read_some, path, backoff) if is_url(path) else backoff.run(read_some, is_transient):
        done += len(some)
        yield from some


def _open_rows(path: str, columns: Sequence[str]) -> Iterator[ManifestRow]:
    if not is_url(path):
        yield from iter_rows(path, columns)
        return
    with open_path(path) as file:
        yield from iter_rows(path, columns, file)
