"""Tars in WebDataset's layout, here or at a URL."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath

from ..utils.backoff import Backoff
from ..utils.errors import UserError
from ..utils.files import path_text
from .entries import MEDIA, ListedFile, Listing, decode_text, read_captions
from .errors import VideoError
from .failures import is_transient, to_video_error
from .files import suffix_of
from .manifests import ManifestRow, captions_in
from .sources import MediaRef, is_url, open_path, version_tag_of


def list_tars(tars: Sequence[str], root: str, backoff: Backoff) -> Listing:
    """The samples of WebDataset tars: files of one key, the name up to the first dot of its last part."""
    listing = Listing([], [], Counter())
    for tar in tars:
        short = path_text(tar.removeprefix(root).lstrip("/") or PurePosixPath(tar).name)
        try:
            found = backoff.run(partial(_tar, tar, short, backoff), partial(is_transient, remote=is_url(tar)))
        except Exception as error:  # each protocol has exceptions of its own
            failure = to_video_error(error, path_text(tar), remote=is_url(tar))
            if failure.kind == "corrupt":
                failure = VideoError(f"{path_text(tar)} cannot be read as a tar ({error})", "make or copy it again",
                                     "truncated")
            listing.set_aside.append((MediaRef(short, tar, ""), failure))
            continue
        listing.entries.extend(found.entries)
        listing.set_aside.extend(found.set_aside)
        listing.left_out.update(found.left_out)
    if not listing.entries and not listing.set_aside:
        raise UserError(f"{root} holds tars, but no videos or photos in them; looked for {' '.join(MEDIA)}")
    return listing


def _tar(path: str, short: str, backoff: Backoff) -> Listing:
    found, left_out = list[ListedFile](), Counter[str]()
    with open_path(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        version_tag, samples = version_tag_of(path), dict[str, list[tarfile.TarInfo]]()
        for member in archive:
            if member.isfile():
                samples.setdefault(_key(member.name), []).append(member)
        for key, members in samples.items():
            media = [member for member in members if suffix_of(member.name) in MEDIA]
            about = {suffix_of(member.name): member for member in members if media and member not in media}
            left_out.update(ending or "no ending" for ending in (
                suffix_of(member.name) for member in members if member not in media)
                if not media or ending not in (".txt", ".json", ".cls"))
            for member in media:
                ref = MediaRef(f"{short}::{path_text(member.name)}", path,
                              f"{version_tag}:{member.offset_data}:{member.size}", member.offset_data, member.size)
                found.append(ListedFile(ManifestRow(key), ref, None, partial(_tar_captions, archive, about)))
        return read_captions(found, backoff)._replace(left_out=left_out)


def _key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _tar_captions(archive: tarfile.TarFile, about: Mapping[str, tarfile.TarInfo]) -> Sequence[str] | None:
    """From .txt, from `caption` or `text` in .json, from .cls."""
    def text(suffix: str) -> str:
        file = archive.extractfile(about[suffix])
        assert file is not None
        return decode_text(file.read(), about[suffix].name)

    if ".txt" in about:
        return [text(".txt")]
    if ".json" in about:
        name = about[".json"].name
        try:
            found = json.loads(text(".json"))
            fields = [found.get(key) for key in ("caption", "text")] if isinstance(found, dict) else []
            captions = next(filter(None, (captions_in(field, name) for field in fields)), None)
            if captions:
                return [one.strip() for one in captions]
        except ValueError as error:
            if isinstance(error, VideoError):
                raise
            raise VideoError(str(error) if isinstance(error, UserError) else f"{name} is not JSON ({error})",
                             "write it again", "caption") from error
    return [text(".cls")] if ".cls" in about else None
