"""What the background of a rendered (or generated) scene shows: its pattern and its contrast, wherever it has drifted.

The power of a spatial frequency does not depend on where a texture lies, and a scene's texture is made of a few whole
cycles across the picture (`odvae.data.synthetic`), so the pattern is read off the powers of the lowest frequencies.
"""

from __future__ import annotations

import numpy as np

from .scene import chroma

CYCLES = 4  # highest number of whole cycles across the picture that is looked at
COLOURED = 40  # of 255, chroma above which a pixel belongs to the shape or to its soft edge
FAINT = 1.5  # of 255, root mean square under which a background shows nothing
STRIPES = ((3, 0), (0, 3), (2, 2), (2, -2))  # cycles (across, down) of one wave
CHECKS = (((4, 0), (0, 4)), ((3, 3), (3, -3)))  # two waves multiplied give their sum and their difference
PLAIN = ((1, 0), (0, 1), (1, 1), (1, -1))


def background_spectrum(frames: np.ndarray) -> np.ndarray:
    """uint8 (T, H, W, 3) -> (2 CYCLES + 1, CYCLES + 1) power by cycles down (-4 to 4) and across (0 to 4).

    The mean over the frames, in squared grey levels: a wave of amplitude a gives a²/2 at its frequency. The shape's
    pixels are replaced by the mean of the others."""
    grey = frames.astype(np.float64).mean(-1)
    ground = ~_grown(chroma(frames) > COLOURED)
    count = np.maximum(ground.sum(axis=(1, 2), keepdims=True), 1)
    grey = np.where(ground, grey - (grey * ground).sum(axis=(1, 2), keepdims=True) / count, 0)
    wave = np.fft.rfft2(grey) / (ground.shape[1] * ground.shape[2])
    power = 2 * (np.abs(wave) ** 2).mean(0)
    power[:, 0] /= 2  # waves that only go down stand at both signs
    return np.concatenate([power[-CYCLES:], power[:CYCLES + 1]])[:, :CYCLES + 1]


def background_pattern(spectrum: np.ndarray) -> str | None:
    """The pattern of `synthetic.BACKGROUNDS` that a `background_spectrum` shows, None where it shows nothing."""
    whole = spectrum.sum()
    if whole < FAINT**2:
        return None

    def share(*waves: tuple[int, int]) -> float:
        places = {(down, across) for across, down in waves} | {(-down, across) for across, down in waves if not across}
        return sum(float(spectrum[CYCLES + down, across]) for down, across in places) / whole

    shares = {"striped": max(map(share, STRIPES)), "checkered": max(share(*pair) for pair in CHECKS),
              "plain": max(map(share, PLAIN))}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] > .5 else "cloudy"  # clouds are several waves


def contrast_kept(first: np.ndarray, last: np.ndarray) -> float:
    """Contrast (root mean square) of the background in `last` against `first`, both uint8 (T, H, W, 3): 1 is neither
    faded nor grown."""
    before, after = (float(np.sqrt(background_spectrum(frames).sum())) for frames in (first, last))
    return after / max(before, 1e-6)


def _grown(mask: np.ndarray) -> np.ndarray:
    """(T, H, W) bool, grown by two pixels on the torus."""
    for axis in (1, 2):
        mask = mask | np.logical_or.reduce([np.roll(mask, step, axis) for step in (-2, -1, 1, 2)])
    return mask
