"""Measure the background of a rendered (or generated) scene: its pattern and its contrast, wherever it has drifted.

The power of a spatial frequency does not depend on a texture's position, and a scene's texture consists of a few whole
cycles across the picture (`odvae.data.synthetic`), so the powers of the lowest frequencies reveal the pattern.
"""

from __future__ import annotations

import numpy as np

from .scene import chroma

CYCLES = 4  # highest number of whole cycles across the picture that is measured
COLOURED = 40  # of 255, chroma above which a pixel belongs to the shape or to its soft edge
FAINT = 1.5  # of 255, root mean square below which a background has no pattern
STRIPES = ((3, 0), (0, 3), (2, 2), (2, -2))  # cycles (across, down) of one wave
CHECKS = (((4, 0), (0, 4)), ((3, 3), (3, -3)))  # two waves multiplied give their sum and their difference
PLAIN = ((1, 0), (0, 1), (1, 1), (1, -1))


def background_spectrum(frames: np.ndarray) -> np.ndarray:
    """Return power by cycles down (-4 to 4) and across (0 to 4): uint8 (T, H, W, 3) -> (2 CYCLES + 1, CYCLES + 1).

    The mean over the frames, in squared grey levels: a wave of amplitude a gives a²/2 at its frequency. The shape's
    pixels are replaced by the mean of the others."""
    grey = frames.astype(np.float64).mean(-1)
    ground = ~_dilate(chroma(frames) > COLOURED)
    count = np.maximum(ground.sum(axis=(1, 2), keepdims=True), 1)
    grey = np.where(ground, grey - (grey * ground).sum(axis=(1, 2), keepdims=True) / count, 0)
    wave = np.fft.rfft2(grey) / (ground.shape[1] * ground.shape[2])
    power = 2 * (np.abs(wave) ** 2).mean(0)
    power[:, 0] /= 2  # waves that only go down stand at both signs
    return np.concatenate([power[-CYCLES:], power[:CYCLES + 1]])[:, :CYCLES + 1]


def background_pattern(spectrum: np.ndarray) -> str | None:
    """Classify a `background_spectrum` as a pattern of `synthetic.BACKGROUNDS`; None if it has none."""
    total = spectrum.sum()
    if total < FAINT**2:
        return None

    def share(*waves: tuple[int, int]) -> float:
        bins = {(down, across) for across, down in waves} | {(-down, across) for across, down in waves if not across}
        return sum(float(spectrum[CYCLES + down, across]) for down, across in bins) / total

    shares = {"striped": max(map(share, STRIPES)), "checkered": max(share(*pair) for pair in CHECKS),
              "plain": max(map(share, PLAIN))}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] > .5 else "cloudy"  # clouds consist of several waves


def contrast_kept(first: np.ndarray, last: np.ndarray) -> float:
    """Return the ratio of the background's contrast (root mean square) in `last` to that in `first`, both uint8
    (T, H, W, 3)."""
    before, after = (float(np.sqrt(background_spectrum(frames).sum())) for frames in (first, last))
    return after / max(before, 1e-6)


def _dilate(mask: np.ndarray) -> np.ndarray:
    """Dilate (T, H, W) bool by two pixels on the torus."""
    for axis in (1, 2):
        mask = mask | np.logical_or.reduce([np.roll(mask, step, axis) for step in (-2, -1, 1, 2)])
    return mask
