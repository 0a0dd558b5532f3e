"""Write rendered clips with their captions to a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...utils.errors import UserError
from ...utils.files import write_json, write_text
from ...utils.processes import process_context
from ...utils.progress import track
from ..video.writer import write_video
from . import flat, raycast
from .captions import scene_facts, solid_caption
from .solids import sample_solid_scene

FRAME_RATE = 8.0
SCENES_PER_SEED = 1_000_000
TEMPORAL_STRIDE = 4  # lengths that vary are 1 + 4k, as video VAEs take them


class RenderedClip(NamedTuple):
    """A scene, ready to be written."""

    name: str  # of the file, without its number
    caption: str
    facts: dict[str, object] | None  # what the caption states
    render: Callable[[int, int], Iterable[np.ndarray]]  # frames, size -> uint8 (t, size, size, 3)


def flat_clip(seed: int) -> RenderedClip:
    scene = flat.sample_scene(seed)
    return RenderedClip(f"{scene.colour}-{scene.shape}-{scene.direction}-{scene.background}", scene.caption, None,
                        lambda frames, size: [flat.render(scene, frames, size)])


def solid_clip(seed: int) -> RenderedClip:
    scene = sample_solid_scene(seed)
    facts = scene_facts(scene)
    name = f"{facts.colours[0]}-{facts.shape}-{facts.motion}-{facts.camera.replace(' ', '-')}"
    return RenderedClip(name, solid_caption(scene), asdict(facts), partial(raycast.render_stream, scene))


class World(NamedTuple):
    clip: Callable[[int], RenderedClip]  # a pure function of its seed
    size: int  # of the picture, unless another is asked for


WORLDS = {"flat": World(flat_clip, 64), "solids": World(solid_clip, 96)}


def write_rendered(folder: Path, count: int, *, frames: int | tuple[int, int] = 33, size: int | None = None,
                   seed: int = 0, world: str = "flat", workers: int = 1) -> list[Path]:
    """Write `count` scenes as H.264 MP4 at 8 fps, each with its caption in a .txt beside it, and with what the caption
    states in a .json (world "solids").

    Scene seeds are seed * 1,000,000 + 0, 1, 2 ..., so that two seeds share no clip. Existing files are kept, so an
    interrupted call continues where it stopped.

    Args:
        frames: of every clip, or the least and the most: 1 + 4k between these, by the scene's seed.
        size: height and width; None: the world's.
        workers: processes that render.

    Raises:
        UserError: invalid numbers, or no such world.
    """
    least, most = (frames, frames) if isinstance(frames, int) else frames
    if count < 1 or least < 1 or most < least:
        shown = f"{least}" if least == most else f"{least} to {most}"
        raise UserError(f"cannot render {count} clips of {shown} frames; both must be at least 1")
    if world not in WORLDS:
        raise UserError(f"there is no world {world!r}; choose one of {', '.join(WORLDS)}")
    folder.mkdir(parents=True, exist_ok=True)
    write = partial(_write_clip, folder, world, SCENES_PER_SEED * seed, (least, most), size or WORLDS[world].size)
    return list(track(_map(write, count, workers), "render", "clip", total=count))


def _map(write: Callable[[int], Path], count: int, workers: int) -> Iterator[Path]:
    with ProcessPoolExecutor(workers, process_context(__name__)) if workers > 1 else nullcontext() as pool:
        yield from map(write, range(count)) if pool is None else pool.map(write, range(count))


def _write_clip(folder: Path, world: str, first_seed: int, frames: tuple[int, int], size: int, number: int) -> Path:
    clip = WORLDS[world].clip(first_seed + number)
    path = folder / f"{number:05d}-{clip.name}.mp4"
    if not path.exists():
        if clip.facts is not None:
            write_json(path.with_suffix(".json"), clip.facts)
        write_text(path.with_suffix(".txt"), clip.caption + "\n")
        write_video(path, clip.render(_length(first_seed + number, *frames), size), FRAME_RATE)
    return path


def _length(seed: int, least: int, most: int) -> int:
    """A number of frames, by the scene's seed."""
    choices = range(least, most + 1, TEMPORAL_STRIDE)
    return choices[int(np.random.default_rng(np.random.SeedSequence([0xF4A3E, seed])).integers(len(choices)))]
