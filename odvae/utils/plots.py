"""Contact sheets, curves, and videos side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import atomic_path

_BACKGROUND, _INK, _GAP, _LINE = 255, 0, 2, 16  # grey values; pixels between frames; pixels for a line of text


def contact_sheet(videos: Sequence[np.ndarray], path: Path | str, labels: Sequence[str] | None = None,
                  columns: int = 8, scale: int = 1) -> None:
    """Write a PNG with a row for each video: evenly spaced frames, the first and the last among them.

    Args:
        videos: uint8 (T, H, W, 3), sizes and lengths may differ; a video shorter than `columns` shows each frame once.
        labels: a line of text above each row, truncated to its width.
        scale: integer magnification without interpolation.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not videos:
        raise UserError(f"there is no video to show in {path}")
    if labels is not None and len(labels) != len(videos):
        raise UserError(f"{len(labels)} labels for {len(videos)} videos; give one for each")
    rows = [_row(video, columns, scale) for video in videos]
    text = _LINE if labels is not None else 0
    height = sum(len(row) + text + _GAP for row in rows) + _GAP
    sheet = Image.new("RGB", (max(row.shape[1] for row in rows) + 2 * _GAP, height), (_BACKGROUND,) * 3)
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(), _GAP
    for i, row in enumerate(rows):
        if labels is not None:
            label = _shortened(" ".join(labels[i].split()), sheet.width - 2 * _GAP, partial(draw.textlength, font=font))
            draw.text((_GAP, y + 1), label, (_INK,) * 3, font)
        sheet.paste(Image.fromarray(row), (_GAP, y + text))
        y += len(row) + text + _GAP
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _shortened(label: str, width: int, length: Callable[[str], float]) -> str:
    """Truncate a label to `width` pixels, with three dots at its end."""
    if length(label) <= width:
        return label
    while label and length(label + "...") > width:
        label = label[:-1]
    return label + "..."


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path | str, title: str, xlabel: str,
           ylabel: str, log_y: bool = False, log_x: bool = False) -> None:
    """Write a PNG with a line for each (xs, ys) of `series`, and a legend, outside the axes if there are many."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display, safe in any thread

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log" if log_y else "linear")
    if log_x:
        ticks = sorted({x for xs, _ in series.values() for x in xs})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    crowded = len(series) > 8  # colours repeat, dashed
    for i, (name, (xs, ys)) in enumerate(series.items()):
        axes.plot(xs, ys, "--" if i >= 10 else "-", label=name, marker="." if len(xs) < 3 else None)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)) if crowded else axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def side_by_side(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Put two uint8 videos (T, H, W, C) next to each other: (T, H, W_a + 2 + W_b, C), with a white gap.

    The gap is even, so that two even widths stay even, as H.264 requires.

    Raises:
        UserError: length, height or channels differ.
    """
    if a.shape[:2] != b.shape[:2] or a.shape[3] != b.shape[3]:
        raise UserError(f"cannot put videos of shape {a.shape} and {b.shape} side by side: only widths may differ")
    gap = np.full((*a.shape[:2], _GAP, a.shape[3]), 255, dtype=np.uint8)
    return np.concatenate([a, gap, b], axis=2)


def _row(video: np.ndarray, columns: int, scale: int) -> np.ndarray:
    """(T, H, W, 3) -> uint8 (H * scale, about columns * W * scale, 3)."""
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or not len(video):
        raise UserError(f"expected a uint8 video (T, H, W, 3), found {video.dtype} {video.shape}")
    indices = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
    frames = video[indices].repeat(scale, axis=1).repeat(scale, axis=2)
    padded = np.pad(frames, ((0, 0), (0, 0), (0, _GAP), (0, 0)), constant_values=_BACKGROUND)
    return np.concatenate(list(padded), axis=1)[:, :-_GAP]
