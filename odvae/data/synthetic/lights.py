"""Times of day of the world of solids: the colours of sky, sun, mist and ground. All are pale, so that only
the solids are saturated."""

from __future__ import annotations

from typing import NamedTuple

Rgb = tuple[float, float, float]  # linear light, 1 is white


class Light(NamedTuple):
    zenith: Rgb  # the sky above
    horizon: Rgb  # the sky at the horizon, and the mist
    sun: Rgb
    ambient: Rgb  # from the sky, on a surface that faces it
    ground: Rgb  # reflectance of the ground, the paler tone
    height: float  # of the sun, radians over the horizon


LIGHTS: dict[str, Light] = {
    "morning": Light((.17, .24, .37), (.78, .66, .57), (1.45, 1.24, 1.00), (.32, .37, .47), (.33, .29, .265), .60),
    "noon": Light((.11, .22, .42), (.58, .68, .80), (1.55, 1.50, 1.38), (.34, .40, .50), (.31, .31, .295), .95),
    "evening": Light((.11, .105, .18), (.62, .44, .40), (1.32, 1.07, .88), (.27, .26, .34), (.305, .268, .275), .50),
    "overcast": Light((.25, .28, .31), (.55, .58, .59), (.70, .70, .68), (.60, .63, .66), (.25, .26, .265), 1.0),
    "night": Light((.024, .029, .043), (.132, .15, .19), (.75, .80, .90), (.17, .19, .235), (.30, .31, .338), .80)}
