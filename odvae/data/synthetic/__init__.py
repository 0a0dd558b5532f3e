"""Render captioned synthetic clips, for the demo, for tests and for users: the flat world and the world of solids."""

from .files import WORLDS, write_rendered
from .flat import BACKGROUNDS, COLOURS, DIRECTIONS, FRAME_RATE, SHAPES, Scene, render, sample_scene

__all__ = ["BACKGROUNDS", "COLOURS", "DIRECTIONS", "FRAME_RATE", "SHAPES", "WORLDS", "Scene", "render", "sample_scene",
           "write_rendered"]
