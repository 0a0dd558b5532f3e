"""Read the log of a training while it grows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

MAX_POINTS = 150  # of a curve


def read_lines(path: Path) -> list[dict[str, float]]:
    """Return the complete lines of a growing log, without values that are not finite."""
    lines = []
    with suppress(OSError):
        for text in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError, AttributeError):
                line = {name: value for name, value in json.loads(text).items() if math.isfinite(value)}
                lines += [line] * ("step" in line)
    return lines


def series_of(lines: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Return curves of named values as (step, value), at most about `MAX_POINTS` each, always with the last point."""
    series = {}
    for name in names:
        points = [(line["step"], float(f"{line[name]:.5g}")) for line in lines if name in line]
        if points:
            series[name] = points[:: -max(1, len(points) // MAX_POINTS)][::-1]
    return series
