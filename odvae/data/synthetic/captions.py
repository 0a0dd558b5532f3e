"""Captions of the world of solids, in varied English, with the facts that each one states.

A caption names every solid's colour and shape, how the subject moves and, unless it is still, what the camera does;
sometimes also materials, ground and time of day. Words and their order are drawn from the scene's seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .solids import Solid, SolidScene

_COLOURS = {"red": ("red", "red", "crimson", "scarlet"), "yellow": ("yellow", "yellow", "golden", "lemon-yellow"),
            "green": ("green", "green", "emerald", "grass-green"), "cyan": ("cyan", "cyan", "turquoise", "teal"),
            "blue": ("blue", "blue", "cobalt", "royal blue"), "magenta": ("magenta", "magenta", "pink", "fuchsia")}
_SHAPES = {"sphere": ("ball", "ball", "sphere"), "cube": ("cube", "cube", "box", "block"),
           "cylinder": ("cylinder", "cylinder", "drum", "pillar"), "cone": ("cone",),
           "ring": ("ring", "ring", "torus", "hoop")}
_MATERIALS = {"matte": ("matte", "dull"), "glossy": ("shiny", "glossy", "polished"), "metallic": ("metal", "metallic")}
_GROUNDS = {"checkered": ("on a checkered floor", "over a chessboard floor", "on checkered tiles"),
            "striped": ("on a striped floor", "over a floor with stripes"),
            "rippled": ("on rippled sand", "over dunes of sand", "on wavy sand"),
            "mottled": ("on bare ground", "over mottled ground", "on a stone floor")}
_LIGHTS = {"morning": ("in the morning", "in soft morning light"), "noon": ("at noon", "under a bright sky"),
           "evening": ("in the evening", "at dusk"), "overcast": ("on a cloudy day", "under an overcast sky"),
           "night": ("at night", "in the moonlight")}
_MOTIONS = {  # {goes} is a verb that suits the shape
    "left": ("{goes} to the left", "{goes} left", "{goes} leftwards", "{goes} from right to left"),
    "right": ("{goes} to the right", "{goes} right", "{goes} rightwards", "{goes} from left to right"),
    "towards": ("{goes} towards us", "comes closer", "{goes} towards the viewer", "comes nearer and nearer"),
    "away": ("{goes} away", "{goes} away from us", "{goes} into the distance", "gets farther and farther away"),
    "bounces": ("bounces", "bounces up and down", "hops up and down", "keeps bouncing", "jumps up and down"),
    "turns": ("turns on the spot", "spins", "rotates", "turns around its axis", "spins on the spot"),
    "circles": ("goes round in circles", "{goes} in a circle", "circles round and round", "{goes} around in a ring"),
    "sways": ("{goes} from side to side", "{goes} back and forth", "{goes} to and fro", "swings from side to side"),
    "rests": ("stands still", "rests", "does not move", "stays where it is", "sits motionless")}
_CAMERAS = {
    "still": ("the camera is still", "a static shot", "the camera does not move"),
    "follows": ("the camera follows it", "the camera keeps up with it", "a tracking shot", "the camera moves along"),
    "orbits": ("the camera circles around the scene", "the camera orbits the scene", "the camera goes around it"),
    "pans left": ("the camera pans to the left", "the camera turns left", "the view pans left"),
    "pans right": ("the camera pans to the right", "the camera turns right", "the view pans right"),
    "approaches": ("the camera moves in", "the camera approaches", "the camera pushes forward",
                   "the camera comes closer"),
    "retreats": ("the camera pulls back", "the camera retreats", "the camera backs away",
                 "the camera moves backwards")}
_STILL_SAID = .25  # share of the captions that say that the camera is still


@dataclass(frozen=True)
class SceneFacts:
    """What a caption states, in the words of `solids`."""

    colours: tuple[str, ...]  # of all solids, the subject's first
    shape: str  # of the subject
    motion: str  # of the subject
    camera: str


def scene_facts(scene: SolidScene) -> SceneFacts:
    return SceneFacts(tuple(solid.colour for solid in scene.solids), scene.subject.shape, scene.motion, scene.camera)


def solid_caption(scene: SolidScene) -> str:
    """Describe a scene; the same words for the same scene."""
    rng = np.random.default_rng(np.random.SeedSequence([0xCA97, scene.seed]))
    subject = _solid(rng, scene.subject)
    goes = _one(rng, ("rolls", "rolls", "moves") if scene.subject.shape == "sphere" else ("moves", "slides", "glides"))
    motion = _one(rng, _MOTIONS[scene.motion]).format(goes=goes)
    others = _others(rng, scene)
    places = [_one(rng, table[name]) for table, name, share in
              ((_GROUNDS, scene.ground, .5), (_LIGHTS, scene.light, .35)) if rng.random() < share]
    camera = _one(rng, _CAMERAS[scene.camera])
    if scene.camera == "still" and rng.random() > _STILL_SAID:
        camera = ""
    return _sentence(rng, subject, motion, others, places, camera)


def _sentence(rng: np.random.Generator, subject: str, motion: str, others: str, places: list[str], camera: str) -> str:
    """Put the parts in one of several orders."""
    front = places.pop() + ", " if places and rng.random() < .3 else ""
    if rng.random() < .15:
        front, motion = front + "there is ", "that " + motion
    elif rng.random() < .1:
        front, motion = front + "we see ", "that " + motion
    text = " ".join([front + subject, motion, *([others] if others else []), *places])
    if not camera:
        return text
    if camera.startswith(("a ", "the view")) or rng.random() < .5:
        return f"{camera}: {text}" if rng.random() < .4 else f"{text}, {camera}"
    return f"{text} while {camera}"


def _solid(rng: np.random.Generator, solid: Solid) -> str:
    colour, shape = _one(rng, _COLOURS[solid.colour]), _one(rng, _SHAPES[solid.shape])
    words = [colour, shape]
    if rng.random() < .45:
        material = _one(rng, _MATERIALS[solid.material])
        words = [material, colour, shape] if rng.random() < .75 else [f"{colour},", material, shape]
    if solid.striped and rng.random() < .4:
        words.insert(0, "striped")
    return _article(" ".join(words))


def _others(rng: np.random.Generator, scene: SolidScene) -> str:
    """The other solids, as where the subject moves."""
    names = [_solid(rng, solid) for solid in scene.solids[1:]]
    if not names:
        return ""
    passing = scene.motion in ("left", "right", "towards", "away")
    near = ("past", "near", "beside") if passing else ("beside", "next to", "near")
    return f"{_one(rng, near)} {' and '.join(names)}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _one(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]
