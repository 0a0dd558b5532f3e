"""Render scenes of the world of solids: rays from a pinhole camera, marched where a solid may be, and lit by sun, sky
and ground. Ground and sky, which are smooth, take one ray a pixel, solids four."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .ground import ground_colour, hills, mist, openness, rgb, sky_colour, sunlight
from .lights import LIGHTS, Light
from .motion import FOCAL, poses
from .shapes import SHAPES
from .solids import TONES, Solid, SolidScene
from .vectors import Vector

HEIGHT, PITCH = 1.9, math.radians(17)  # of the camera: units over the ground, downwards
SAMPLES = 2  # rays a pixel of a solid, along each side
STEPS = 20  # of a ray's march
FRAME_RATE = 8.0
CHUNK = 32  # frames rendered together

Placed = tuple[str, float, np.ndarray, np.ndarray]  # shape, radius, centre (3,), rotation (3, 3)


class _Surroundings(NamedTuple):
    """What lights a solid."""

    light: Light
    sun: Vector
    others: list[Placed]  # that may cast a shadow on it
    floor: np.ndarray  # (3,) reflectance of the ground below


def render_solids(scene: SolidScene, frames: int, size: int = 96, first: int = 0) -> np.ndarray:
    """Render frames `first` to `first + frames` of a scene at 8 fps as uint8 (frames, size, size, 3)."""
    return np.concatenate(list(render_stream(scene, frames, size, first)))


def render_stream(scene: SolidScene, frames: int, size: int = 96, first: int = 0) -> Iterator[np.ndarray]:
    """As `render_solids`, in chunks uint8 (t, size, size, 3): a clip of any length takes little memory."""
    for begin in range(first, first + frames, CHUNK):
        times = np.arange(begin, min(begin + CHUNK, first + frames)) / FRAME_RATE
        turn, ground, positions, rotations = poses(scene, times)
        yield np.stack([_frame(scene, float(turn[i]), ground[i], positions[i], rotations[i], size)
                        for i in range(len(times))])


@lru_cache(4)
def camera_rays(size: int, samples: int) -> Vector:
    """The unit vectors (size * samples, size * samples) along which the camera sees."""
    axis = ((np.arange(size * samples, dtype=np.float32) + .5) / (size * samples) * 2 - 1) / FOCAL
    right, up = np.meshgrid(axis, -axis)
    return Vector(right, up * math.cos(PITCH) - math.sin(PITCH), up * math.sin(PITCH) + math.cos(PITCH)).unit()


def project(points: np.ndarray) -> np.ndarray:
    """Where the camera sees points (..., 3), as (across, down), 0 to 1 in the picture."""
    x, y, z = np.moveaxis(points - np.array([0, HEIGHT, 0]), -1, 0)
    ahead = np.maximum(z * math.cos(PITCH) - y * math.sin(PITCH), 1e-3)
    up = y * math.cos(PITCH) + z * math.sin(PITCH)
    return .5 + .5 * FOCAL * np.stack([x / ahead, -up / ahead], -1)


def _frame(scene: SolidScene, turn: float, below: np.ndarray, centres: np.ndarray, rotations: np.ndarray,
           size: int) -> np.ndarray:
    light = LIGHTS[scene.light]
    azimuth, eye = scene.sun - turn, np.array([0, HEIGHT, 0])
    sun = Vector.of(np.array([math.sin(azimuth) * math.cos(light.height), math.sin(light.height),
                              math.cos(azimuth) * math.cos(light.height)]))
    placed: list[Placed] = [(solid.shape, solid.radius, centre, rotation) for solid, centre, rotation
                            in zip(scene.solids, centres, rotations, strict=True)]
    picture = _backdrop(scene, light, sun, placed, turn, below, size)
    order = np.argsort([-np.linalg.norm(centre - eye) for centre in centres])
    for mirrored in ((True, False) if scene.polish else (False,)):
        for i in order:
            others = [other for j, other in enumerate(placed) if j != i]
            around = _Surroundings(light, sun, others, rgb(light.ground))
            _add_solid(picture, scene.solids[i], placed[i], around, scene.polish, mirrored, size)
    return _develop(picture)


def _backdrop(scene: SolidScene, light: Light, sun: Vector, placed: list[Placed], turn: float, below: np.ndarray,
              size: int) -> np.ndarray:
    """Sky and ground, with the solids' shade: linear light (size, size, 3)."""
    rays = camera_rays(size, 1)
    picture = sky_colour(light, rays, sun)
    cover, colour = hills(scene, light, rays, turn, 2 / FOCAL / size)
    picture += .55 * cover[..., None] * (colour - picture)
    down = rays.y < -.04
    ray = rays.at(down)
    way = -HEIGHT / ray.y
    points = Vector(ray.x * way, np.zeros_like(way), ray.z * way)
    base = ground_colour(scene, light, points, turn, below)
    lit = sunlight(placed, points, sun) * sun.y
    colour = base * (lit[:, None] * rgb(light.sun) + openness(placed, points)[:, None] * rgb(light.ambient))
    haze = mist(points.z)[:, None]
    picture[down] = colour + haze * (rgb(light.horizon) - colour)
    return picture


def _add_solid(picture: np.ndarray, solid: Solid, placed: Placed, around: _Surroundings, polish: float,
               mirrored: bool, size: int) -> None:
    """Draw a solid, or its image in a polished ground, over linear light (size, size, 3), in place."""
    shape, radius, centre, _ = placed
    sign = -1 if mirrored else 1
    seen = centre * np.array([1, sign, 1], np.float32)
    reach, samples = SHAPES[shape].reach * radius, 1 if mirrored else SAMPLES
    (across, down), ahead = project(seen), max(seen[2], .3)
    half = .5 * FOCAL * reach / ahead * 1.35 + 1 / size
    if ahead < reach + .2:
        half = 2.0  # so near that it may be anywhere
    left, right, top, bottom = (int(min(max(round(value * size), 0), size)) for value in
                                (across - half - .5 / size, across + half + .5 / size, down - half - .5 / size,
                                 down + half + .5 / size))
    if left >= right or top >= bottom:
        return
    box = (slice(top * samples, bottom * samples), slice(left * samples, right * samples))
    rays = camera_rays(size, samples).at(box)
    eye = np.array([0, sign * HEIGHT, 0], np.float32)
    rays = Vector(rays.x, sign * rays.y, rays.z)
    cover, colour = _cast(solid, placed, around, eye, rays, 2 / FOCAL / size / samples)
    if mirrored:
        slant = np.abs(rays.y)  # Schlick's approximation of what a dielectric mirrors
        cover = cover * polish * (.14 + .75 * (1 - slant)**2) * (camera_rays(size, 1).at(box).y < -.04)
    shape4 = (bottom - top, samples, right - left, samples)
    alpha = cover.reshape(shape4).mean((1, 3))[..., None]
    paint = (colour * cover[..., None]).reshape(*shape4, 3).mean((1, 3))
    part = picture[top:bottom, left:right]
    part *= 1 - alpha
    part += paint


def _cast(solid: Solid, placed: Placed, around: _Surroundings, eye: np.ndarray, rays: Vector,
          pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of each ray (h, w) a solid covers, 0 to 1, and its light (h, w, 3) there."""
    name, radius, centre, rotation = placed
    shape, inverse = SHAPES[name], rotation.T
    start = inverse @ ((eye - centre) / np.float32(radius))
    local = rays.rotated(inverse)
    middle = -(local.x * start[0] + local.y * start[1] + local.z * start[2])
    gap = float(start @ start) - middle**2
    near = gap < (shape.reach + 2 * pixel * middle)**2
    cover, colour = np.zeros(near.shape, np.float32), np.zeros((*near.shape, 3), np.float32)
    if not near.any():
        return cover, colour
    ray, origin = local.at(near), Vector(*start)
    half = np.sqrt(np.maximum(shape.reach**2 - gap[near], 0))
    best, closest = _march(shape.distance, origin, ray, np.maximum(middle[near] - half, .05), middle[near] + half)
    part = np.clip(1.25 - closest / (pixel * best), 0, 1)
    some = part > 0
    if not some.any():
        return cover, colour
    index = np.flatnonzero(near)[some]
    hit = origin.plus(ray, best).at(some)
    cover.reshape(-1)[index] = part[some]
    colour.reshape(-1, 3)[index] = _shade(solid, placed, around, hit, rays.at(near).at(some), best[some] * radius)
    return cover, colour


def _march(distance: Callable[[Vector], np.ndarray], origin: Vector, ray: Vector, t: np.ndarray,
           end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """March rays (N,) from `t` to `end`; return where each is nearest to the surface, and how near."""
    nearest, least, live = t.copy(), np.full_like(t, 9), np.arange(len(t))
    here, low = t, np.full_like(t, 9)
    for step in range(STEPS):
        gap = distance(origin.plus(ray, t))
        here, low = np.where(gap < low, t, here), np.minimum(low, gap)
        t = t + np.maximum(gap, 0)
        if step % 4 == 3:  # go on with those that have neither arrived nor passed
            nearest[live], least[live] = here, low
            going = (gap > .003) & (t < end)
            if not going.any():
                break
            ray = ray.at(going)
            live, t, end, here, low = (value[going] for value in (live, t, end, here, low))
    return nearest, least


def _normal(name: str, p: Vector) -> Vector:
    """The gradient of the distance, by four differences (the corners of a tetrahedron)."""
    total = Vector(np.zeros_like(p.x), np.zeros_like(p.x), np.zeros_like(p.x))
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        step = Vector.of(np.array(corner))
        total = total.plus(step, SHAPES[name].distance(p.plus(step, .01)))
    return total.unit()


def _shade(solid: Solid, placed: Placed, around: _Surroundings, hit: Vector, rays: Vector,
           way: np.ndarray) -> np.ndarray:
    """The light (N, 3) that comes from points `hit` (in the solid's coordinates) against the rays."""
    name, radius, centre, rotation = placed
    light, sun = around.light, around.sun
    normal = _normal(name, hit).rotated(rotation)
    points = hit.rotated(rotation * np.float32(radius))
    points = Vector(*(value + middle for value, middle in zip(points, centre, strict=True)))
    base = _reflectance(solid, hit)
    facing = normal.dot(sun)
    lit = np.clip(facing, 0, 1) * sunlight(around.others, points.plus(normal, .02), sun)
    up, nearness = .5 + .5 * normal.y, np.clip(points.y / (.9 * radius), 0, 1)
    sky = (.35 + .65 * np.sqrt(nearness))[:, None] * up[:, None] * rgb(light.ambient)
    floor = around.floor * (.55 * light.height * rgb(light.sun) + .4 * rgb(light.ambient))
    sky = sky + (.30 * (1 - up) * (.3 + .7 * nearness))[:, None] * floor
    diffuse = base * (lit[:, None] * rgb(light.sun) + sky)
    if solid.material != "matte":
        mirror = rays.plus(normal, -2 * rays.dot(normal)).unit()
        seen = sky_colour(light, mirror, sun)
        below = np.clip(-6 * mirror.y + .2, 0, 1)[:, None]
        seen = (seen + below * (.75 * floor - seen)) * (.2 + .8 * nearness)[:, None]
        edge = (1 - np.clip(-rays.dot(normal), 0, 1))[:, None]**5
        shine = (lit > 0) * np.clip(mirror.dot(sun), 0, 1)
        if solid.material == "metallic":
            tint = base + (1 - base) * edge
            diffuse = .35 * diffuse + tint * (.95 * seen + 1.6 * (shine**24)[:, None] * rgb(light.sun))
        else:
            diffuse = diffuse + (.04 + .5 * edge) * seen + 1.5 * (shine**60)[:, None] * rgb(light.sun)
    haze = mist(points.z)[:, None]
    return diffuse + haze * (rgb(light.horizon) - diffuse)


def _reflectance(solid: Solid, hit: Vector) -> np.ndarray:
    """The solid's colour (N, 3), as linear reflectance."""
    base = np.power(np.array(TONES[solid.colour], np.float32) / 255, 2.2)
    if not solid.striped:
        return np.broadcast_to(base, (len(hit.x), 3))
    stripe = .5 + .5 * np.tanh(5 * np.sin(3 * np.arctan2(hit.x, hit.z)))
    pale = base + .42 * (1 - base) * (base.max() if solid.colour != "yellow" else .6)
    return base + stripe[:, None] * (pale - base)


def _develop(picture: np.ndarray) -> np.ndarray:
    """Map linear light to uint8 sRGB: a filmic curve (K. Narkowicz's fit of ACES), then gamma."""
    light = np.maximum(picture, 0) * .86
    curve = light * (2.51 * light + .03) / (light * (2.43 * light + .59) + .14)
    return np.round(255 * np.power(np.clip(curve, 0, 1), 1 / 2.2)).astype(np.uint8)
