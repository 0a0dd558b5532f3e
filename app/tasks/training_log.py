"""Read what a training logs while it grows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

POINTS = 150  # of a curve


def read_lines(path: Path) -> list[dict[str, float]]:
    """The whole lines of a log that may be growing; what is not finite is left out."""
    found = []
    with suppress(OSError):
        for text in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError, AttributeError):
                line = {name: value for name, value in json.loads(text).items() if math.isfinite(value)}
                found += [line] * ("step" in line)
    return found


def series_of(lines: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Curves of some figures of a log, as (step, value), at most about `POINTS` of each, the last among them."""
    series = {}
    for name in names:
        points = [(line["step"], float(f"{line[name]:.5g}")) for line in lines if name in line]
        if points:
            series[name] = points[:: -max(1, len(points) // POINTS)][::-1]
    return series
