"""Remove the clips that no source lists any more, and nothing else.

A clip is known by its file's content, so a file may be renamed or moved. Of a file that is listed and cannot be used
now (it is being copied, its disk or network is away, it is cut off) the content may not be what it was: every clip that
bears its name stays.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ..data.listing import list_entries
from ..data.sources import MediaRef, is_url
from ..data.video.reader import VideoError
from ..utils.errors import UserError
from ..utils.files import hash_file, path_text
from ..utils.progress import track
from . import format as fmt
from .build.decode_pool import Workers
from .build.decode_worker import MediaInfo
from .build.probe import known_contents, scan
from .build.shard_index import ShardIndex
from .build.shared_plan import drop_plan
from .lease import BuildLease
from .shards import write_header, write_part


class Garbage(NamedTuple):
    """What was removed, or would be."""

    clips: int
    bytes: int
    files: dict[str, int]  # how many clips, by the path in the index
    kept: dict[str, str]  # files that are listed and cannot be used now, and whose clips stay; why

    def lines(self, most: int) -> list[str]:
        """What goes and what stays by path, at most `most` of each."""
        goes = [f"goes: {path} ({count} clips)" for path, count in sorted(self.files.items())]
        stays = [f"stays, as it is listed and cannot be used now: {path} ({why})"
                 for path, why in sorted(self.kept.items())]
        return [line for lines in (goes, stays)
                for line in lines[:most] + [f"... and {len(lines) - most} more files"] * (len(lines) > most)]


@dataclass
class _Listed:
    """What the sources list."""

    contents: set[str]  # SHA-256
    doubtful: dict[MediaRef, str]  # files that cannot be used now; why
    unknown: set[MediaRef]  # those of them whose content is not even known


def collect_garbage(cache: Path, sources: Sequence[str], columns: Sequence[str] = (), *, dry_run: bool = False,
                    max_share: float = 1.0, sure: bool = True) -> Garbage:
    """Remove the clips of files that none of `sources` lists any more, whatever their names.

    Args:
        columns: of lists, as a build takes them.
        max_share: of the cache's clips, from 0 to 1, that may go.
        sure: go on where a listed file can neither be read nor be recognised by its name, so that it may be one of
            those that would go.

    Raises:
        UserError: no cache, a source that is not there, a build at work; more would go than may, and nothing went.
    """
    header = fmt.read_header(cache)
    with BuildLease(cache / "work") as here:
        if here.live_peers():
            raise UserError(f"a build is at work in {cache} ({', '.join(here.live_peers())}); wait for it, or stop it")
        listed = _list(cache, sources, columns, here)
        contents = ShardIndex(cache)
        paths = {path for name in contents.shards
                 for path in fmt.read_index(fmt.shard_paths(cache, name)[1], ("path",))[0]["path"].to_pylist()}
        found = _by_name(paths, listed.doubtful)
        nameless = listed.unknown.difference(*found.values())
        kept_contents = pa.array(sorted(listed.contents), pa.string())
        kept_paths = pa.array(sorted(found), pa.string())
        clips, freed, files, changed = 0, 0, Counter[str](), dict[str, pa.Table]()
        for name in track(list(contents.shards), "look for garbage", "shard"):
            table, notes = fmt.read_index(fmt.shard_paths(cache, name)[1])
            stays = pc.or_(pc.is_in(table["content"], kept_contents), pc.is_in(table["path"], kept_paths))
            gone = table.filter(pc.invert(stays))
            if len(gone):
                changed[name] = table.filter(stays)
                clips += len(gone)
                freed += notes.tensor_bytes * len(gone) // len(table)
                files.update(gone["path"].to_pylist())
        garbage = Garbage(clips, freed, dict(files), {path: listed.doubtful[some[0]] for path, some in found.items()})
        if clips and not dry_run:
            _check(garbage, len(contents.ids), max_share, [] if sure else sorted(map(str, nameless)))
            drop_plan(cache)
            contents.remove_orphans()
            for name, rest in changed.items():
                tensors, index = fmt.shard_paths(cache, name)
                if len(rest):
                    write_part(cache, here, tensors, rest, contents.shards[name].notes.set_aside,
                               header.vae.latent_channels, [name])
                index.unlink()  # from here on its tensors are garbage that any build removes
                tensors.unlink()
            write_header(cache, header, here)
    return garbage


def _list(cache: Path, sources: Sequence[str], columns: Sequence[str], here: BuildLease) -> _Listed:
    """Every file of the sources, also those whose caption, or whose tar, cannot be read."""
    places, closed = dict[MediaRef, None](), dict[MediaRef, str]()  # closed: folders and tars that cannot be listed now
    for source in sources:
        listing = list_entries(source, columns)
        places |= dict.fromkeys(entry.place for entry in listing.entries)
        closed |= {place: error.reason for place, error in listing.set_aside if place not in places}
    known = known_contents(places, cache)
    rest = [place for place in places if place not in known]
    with Workers(min(8, os.cpu_count() or 1)) as workers:
        # What is cut off is looked at, too: a build may have kept what could be read of it.
        found = scan(rest, cache, here, workers, keep_truncated=True)
    listed = _Listed(set(known.values()), {}, set())
    for place, look in found.items():
        if isinstance(look, MediaInfo):
            listed.contents.add(look.content)
            if look.readable is not None:
                listed.doubtful[place] = "it is cut off"
            continue
        listed.doubtful[place] = look.reason
        content = None if look.kind in ("hang", "remote") else _content(place)
        if content is None:
            listed.unknown.add(place)
        else:
            listed.contents.add(content)
    listed.doubtful |= closed
    listed.unknown |= closed.keys()
    return listed


def _content(place: MediaRef) -> str | None:
    try:
        with place.open_local() as path:
            return hash_file(path)
    except (VideoError, OSError):
        return None


def _by_name(paths: Iterable[str], places: Iterable[MediaRef]) -> dict[str, list[MediaRef]]:
    """Of an index's paths those that mean one of `places`, whatever folder either is relative to: one is the end of the
    other. The name of a folder or of a tar means all that it holds."""
    by_last: dict[str, list[tuple[str, MediaRef]]] = {}
    for place in places:
        whole = str(place) if is_url(place.path) else os.path.abspath(path_text(place.path)) + str(place).removeprefix(
            path_text(place.path))
        for name in {_plain(place.name), _plain(whole)}:
            by_last.setdefault(name.rpartition("/")[2], []).append((name, place))
    found: dict[str, list[MediaRef]] = {}
    for path, mine in ((one, parent) for one in paths for parent in _with_parents(_plain(one))):
        for name, place in by_last.get(mine.rpartition("/")[2], []):
            if f"/{name}".endswith(f"/{mine}") or f"/{mine}".endswith(f"/{name}"):
                found.setdefault(path, []).append(place)
    return found


def _with_parents(path: str) -> list[str]:
    """It, the tar that it lies in, and the folders above."""
    tar = path.partition("::")[0]
    return list(dict.fromkeys([path, tar, *(str(parent) for parent in PurePosixPath(tar).parents)]))


def _plain(name: str) -> str:
    """Without what leads out of the source's folder."""
    while name.startswith(("../", "./", "/")):
        name = name.partition("/")[2]
    return name


def _check(garbage: Garbage, clips: int, max_share: float, nameless: Sequence[str]) -> None:
    """Raises UserError where more would go than may."""
    listing = "\n".join(["", *garbage.lines(20)])
    if nameless:
        raise UserError(f"{len(nameless)} files are listed, cannot be read now, and no clip bears their names (such as "
                        f"{nameless[0]}): some of what would go may be theirs. Make them readable, or remove it with "
                        f"--yes; nothing was removed{listing}")
    if garbage.clips > max_share * clips:
        raise UserError(f"{garbage.clips} of {clips} clips would go, more than {max_share:.0%}: see that the sources "
                        f"are whole and all are given, then remove them with --yes; nothing was removed{listing}")
