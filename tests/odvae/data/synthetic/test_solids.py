"""The world of solids: distances, poses, pictures, captions, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from odvae.data.synthetic.captions import scene_facts, solid_caption
from odvae.data.synthetic.files import write_rendered
from odvae.data.synthetic.ground import TILE, pattern
from odvae.data.synthetic.motion import poses
from odvae.data.synthetic.raycast import camera_rays, project, render_solids
from odvae.data.synthetic.shapes import SHAPES
from odvae.data.synthetic.solids import CAMERAS, CAMERAS_BY_MOTION, GROUNDS, MOTIONS, sample_solid_scene
from odvae.data.synthetic.vectors import Vector
from odvae.metrics.scene import chroma
from odvae.utils.errors import UserError


@pytest.mark.parametrize("name", SHAPES)
def test_a_distance_never_passes_the_surface_and_stays_within_the_reach(name):
    shape, rng = SHAPES[name], np.random.default_rng(0)
    a, b = rng.uniform(-1.6, 1.6, (2, 4000, 3))
    at_a, at_b = (shape.distance(Vector.of(points)) for points in (a, b))
    assert (np.abs(at_a - at_b) <= np.linalg.norm(a - b, axis=1) * 1.001 + 1e-6).all()  # so a march cannot overshoot
    inside = a[at_a < 0]
    assert len(inside) > 50 and np.linalg.norm(inside, axis=1).max() <= shape.reach
    assert inside[:, 1].min() >= -shape.height - 1e-6  # it stands on the ground, not in it


def test_a_point_is_seen_along_the_ray_of_its_pixel():
    size, points = 64, np.array([[.4, .7, 4.0], [-1.0, 0, 3.0], [0, 1.9, 9.0]])
    rays = camera_rays(size, 1).stack()
    for point, (across, down) in zip(points, project(points), strict=True):
        ray = rays[min(int(down * size), size - 1), int(across * size)]
        way = point - [0, 1.9, 0]
        assert ray @ way / np.linalg.norm(way) > .9997  # within a pixel


def test_a_scene_is_a_function_of_its_seed_and_of_time():
    scene = sample_solid_scene(7)
    assert scene == sample_solid_scene(7) != sample_solid_scene(8)
    assert solid_caption(scene) == solid_caption(sample_solid_scene(7))
    clip = render_solids(scene, 3, 32)
    assert clip.shape == (3, 32, 32, 3) and np.array_equal(render_solids(scene, 1, 32, first=2)[0], clip[2])


def test_every_scene_goes_on_for_ten_minutes():
    seconds = np.linspace(0, 600, 400)
    for seed in range(60):
        scene = sample_solid_scene(seed)
        place = poses(scene, seconds).positions
        assert np.isfinite(place).all() and np.abs(place).max() < 13
        seen = project(place[:, 0])
        assert ((seen > 0) & (seen < 1)).all(1).mean() > .5, scene  # the subject is mostly in the picture


def test_a_ground_has_no_seam():
    u, v = np.random.default_rng(0).uniform(0, TILE, (2, 50))
    for kind in GROUNDS:
        assert pattern(kind, u, v) == pytest.approx(pattern(kind, u + TILE, v - 3 * TILE), abs=1e-9)


def test_only_solids_are_saturated():
    for seed in range(6):
        scene = sample_solid_scene(seed)
        bare = replace(scene, solids=(replace(scene.subject, radius=1e-3),), polish=0.0)
        assert np.quantile(chroma(render_solids(bare, 1, 48)), .998) < 40  # but for a pixel or two of the tiny solid
        assert (chroma(render_solids(scene, 1, 48, first=3)) > 60).any() or scene.motion in ("left", "right", "away")


def test_captions_name_what_the_facts_say_in_many_ways():
    words = {"left": "left", "right": "right", "circles": "circle|ring", "sways": "side|forth|fro",
             "bounces": "bounc|up and"}
    captions = [(solid_caption(scene), scene_facts(scene)) for scene in map(sample_solid_scene, range(400))]
    assert len({caption for caption, _ in captions}) > 395
    assert {facts.motion for _, facts in captions} == set(MOTIONS) == set(CAMERAS_BY_MOTION)
    assert {facts.camera for _, facts in captions} == set(CAMERAS)
    for caption, facts in captions:
        assert any(word in caption for word in words.get(facts.motion, "").split("|")), caption
        assert facts.camera == "still" or any(word in caption for word in ("camera", "tracking", "view")), caption
        assert len(facts.colours) == len(set(facts.colours)) and "{" not in caption


def test_clips_are_written_once_with_caption_and_facts(tmp_path: Path):
    paths = write_rendered(tmp_path, 2, frames=(5, 13), size=16, seed=3, world="solids")
    scene = sample_solid_scene(3_000_000)
    assert paths[0].with_suffix(".txt").read_text() == solid_caption(scene) + "\n"
    assert json.loads(paths[0].with_suffix(".json").read_text())["motion"] == scene.motion
    before = [path.stat().st_mtime_ns for path in paths]
    assert write_rendered(tmp_path, 2, frames=(5, 13), size=16, seed=3, world="solids") == paths
    assert [path.stat().st_mtime_ns for path in paths] == before
    with pytest.raises(UserError, match="choose one of flat, solids"):
        write_rendered(tmp_path, 1, world="round")
