"""List WebDataset tars, local or at a URL."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

from ..utils.backoff import Backoff
from ..utils.errors import UserError
from ..utils.files import path_text
from ..utils.threads import map_ahead
from .entries import MEDIA, caption_error, decode_text
from .errors import VideoError
from .failures import is_transient, to_video_error
from .files import suffix_of
from .manifests import parse_captions
from .sources import MediaRef, is_url, open_path, version_tag_of
from .spill import Record

THREADS = 8  # tars that are read at once


class TarContent(NamedTuple):
    """The samples of a tar: the files of one key, which is the path up to the first dot of the file name."""

    records: list[Record]
    left_out: Counter[str]
    rejected: tuple[MediaRef, VideoError] | None = None  # if it cannot be read


def short_name(tar: str, root: str) -> str:
    """Return the name of a tar in its source."""
    return path_text(tar.removeprefix(root).lstrip("/") or PurePosixPath(tar).name)


def read_tars(tars: Sequence[str], root: str, backoff: Backoff) -> Iterator[TarContent]:
    """Yield the content of tars, in order; several are read at once, with their captions."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from map_ahead(pool, lambda tar: _try_tar(tar, short_name(tar, root), backoff), tars, THREADS)


def _try_tar(tar: str, short: str, backoff: Backoff) -> TarContent:
    try:
        return backoff.run(partial(_read_tar, tar, short, backoff), partial(is_transient, remote=is_url(tar)))
    except Exception as error:  # each protocol has its own exceptions
        failure = to_video_error(error, path_text(tar), remote=is_url(tar))
        if failure.kind == "corrupt":
            failure = VideoError(f"{path_text(tar)} cannot be read as a tar ({error})",
                                 "create it or copy it again", "truncated")
        return TarContent([], Counter(), (MediaRef(short, tar, ""), failure))


def _read_tar(path: str, short: str, backoff: Backoff) -> TarContent:
    content = TarContent([], Counter())
    with open_path(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        version_tag, samples = version_tag_of(path, backoff), dict[str, list[tarfile.TarInfo]]()
        for member in archive:
            if member.isfile():
                samples.setdefault(_sample_key(member.name), []).append(member)
        for key, members in samples.items():
            media = [member for member in members if suffix_of(member.name) in MEDIA]
            sidecars = {suffix_of(member.name): member for member in members if media and member not in media}
            content.left_out.update(suffix or "no extension" for suffix in (
                suffix_of(member.name) for member in members if member not in media)
                if not media or suffix not in (".txt", ".json", ".cls"))
            for member in media:
                name = f"{short}::{path_text(member.name)}"
                record = Record(name, path, f"{version_tag}:{member.offset_data}:{member.size}", member.offset_data,
                                member.size, title=key)
                content.records.append(_with_captions(record, archive, sidecars, backoff))
    return content


def _with_captions(record: Record, archive: tarfile.TarFile, sidecars: Mapping[str, tarfile.TarInfo],
                   backoff: Backoff) -> Record:
    assert record.path is not None
    try:
        captions = backoff.run(partial(_tar_captions, archive, sidecars),
                               partial(is_transient, remote=is_url(record.path)))
    except Exception as error:  # each remote protocol has its own exceptions
        failure = caption_error(error, f"{path_text(record.path)}::{record.name.rpartition('::')[2]}")
        return record._replace(caption_error=(failure.reason, failure.advice))
    return record if captions is None else record._replace(captions=tuple(captions))


def _sample_key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _tar_captions(archive: tarfile.TarFile, sidecars: Mapping[str, tarfile.TarInfo]) -> Sequence[str] | None:
    """Read captions from .txt, else from `caption` or `text` in .json, else from .cls."""
    def text(suffix: str) -> str:
        file = archive.extractfile(sidecars[suffix])
        assert file is not None
        return decode_text(file.read(), sidecars[suffix].name)

    if ".txt" in sidecars:
        return [text(".txt")]
    if ".json" in sidecars:
        name = sidecars[".json"].name
        try:
            data = json.loads(text(".json"))
            fields = [data.get(key) for key in ("caption", "text")] if isinstance(data, dict) else []
            captions = next(filter(None, (parse_captions(field, name) for field in fields)), None)
            if captions:
                return [caption.strip() for caption in captions]
        except ValueError as error:
            if isinstance(error, VideoError):
                raise
            raise VideoError(str(error) if isinstance(error, UserError) else f"{name} is not JSON ({error})",
                             "write it again", "caption") from error
    return [text(".cls")] if ".cls" in sidecars else None
