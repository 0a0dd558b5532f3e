"""List WebDataset tars, local or at a URL."""

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
from .manifests import ManifestRow, parse_captions
from .sources import MediaRef, is_url, open_path, version_tag_of


def list_tars(tars: Sequence[str], root: str, backoff: Backoff) -> Listing:
    """List the samples of WebDataset tars: the files of one key, which is the path up to the first dot of the file
    name."""
    listing = Listing([], [], Counter())
    for tar in tars:
        short = path_text(tar.removeprefix(root).lstrip("/") or PurePosixPath(tar).name)
        try:
            members = backoff.run(partial(_list_tar, tar, short, backoff), partial(is_transient, remote=is_url(tar)))
        except Exception as error:  # each protocol has its own exceptions
            failure = to_video_error(error, path_text(tar), remote=is_url(tar))
            if failure.kind == "corrupt":
                failure = VideoError(f"{path_text(tar)} cannot be read as a tar ({error})",
                                     "create it or copy it again", "truncated")
            listing.set_aside.append((MediaRef(short, tar, ""), failure))
            continue
        listing.entries.extend(members.entries)
        listing.set_aside.extend(members.set_aside)
        listing.left_out.update(members.left_out)
    if not listing.entries and not listing.set_aside:
        raise UserError(f"the tars of {root} hold no videos or photos; expected {' '.join(MEDIA)}")
    return listing


def _list_tar(path: str, short: str, backoff: Backoff) -> Listing:
    files, left_out = list[ListedFile](), Counter[str]()
    with open_path(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        version_tag, samples = version_tag_of(path), dict[str, list[tarfile.TarInfo]]()
        for member in archive:
            if member.isfile():
                samples.setdefault(_sample_key(member.name), []).append(member)
        for key, members in samples.items():
            media = [member for member in members if suffix_of(member.name) in MEDIA]
            sidecars = {suffix_of(member.name): member for member in members if media and member not in media}
            left_out.update(suffix or "no extension" for suffix in (
                suffix_of(member.name) for member in members if member not in media)
                if not media or suffix not in (".txt", ".json", ".cls"))
            for member in media:
                ref = MediaRef(f"{short}::{path_text(member.name)}", path,
                               f"{version_tag}:{member.offset_data}:{member.size}", member.offset_data, member.size)
                files.append(ListedFile(ManifestRow(key), ref, None, partial(_tar_captions, archive, sidecars)))
        return read_captions(files, backoff)._replace(left_out=left_out)


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
