"""Figures as lines of text, one column below the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Column = tuple[str, str, str]  # title, key in the figures, format


def table(title: str, columns: Sequence[Column], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line of titles and one a row, by its label under `title`. A column that no row has a figure for is left out."""
    shown = [c for c in columns if any(figures.get(c[1]) is not None for figures in rows.values())]
    cells = [[title, *(name for name, _, _ in shown)]]
    for label, figures in rows.items():
        values = [figures.get(key) for _, key, _ in shown]
        cells.append([label, *("-" if value is None else format(value, form) for value, (_, _, form) in
                               zip(values, shown, strict=True))])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                      enumerate(zip(row, widths, strict=True))) for row in cells]
