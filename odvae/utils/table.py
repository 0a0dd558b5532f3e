"""Metrics as a text table with aligned columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Column = tuple[str, str, str]  # title, key in a row's metrics, format


def table(title: str, columns: Sequence[Column], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a header line and a line per row, with the rows' labels under `title`. Empty columns are left out."""
    used = [c for c in columns if any(metrics.get(c[1]) is not None for metrics in rows.values())]
    cells = [[title, *(name for name, _, _ in used)]]
    for label, metrics in rows.items():
        values = [metrics.get(key) for _, key, _ in used]
        cells.append([label, *("-" if value is None else format(value, spec) for value, (_, _, spec) in
                               zip(values, used, strict=True))])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                      enumerate(zip(row, widths, strict=True))) for row in cells]
