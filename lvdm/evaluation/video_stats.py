"""What an evaluation keeps of a generated video: statistics, some frames, and the whole only where needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from odvae.data.video.writer import VideoWriter

from ..generation.drift import Drift
from ..sampling.params import GenerationParams
from ..sampling.prompts import format_prompt
from .scenes import MEASURED_FRAMES

THUMBNAILS = 8  # frames of a video in a contact sheet


class ContactSheetRow(NamedTuple):
    """A row of a contact sheet."""

    mark: str  # whether the video follows its prompt, where that is measured
    prompt: str
    pictures: np.ndarray  # uint8 (8, H, W, 3)


class VideoStats:
    """Statistics of a video of `frames` frames, which is added in chunks.

    Attributes:
        drift: of the frames so far.
        thumbnails: evenly spaced frames (H, W, 3), including the first and the last.
        whole: all chunks, if requested; else None.
    """

    def __init__(self, frames: int, frame_rate: float, whole: bool = False) -> None:
        self.drift = Drift(frame_rate)
        self.thumbnails: list[np.ndarray] = []
        self.whole: list[np.ndarray] | None = [] if whole else None
        self._thumbnail_indices = set(np.linspace(0, frames - 1, min(THUMBNAILS, frames)).round().astype(int).tolist())
        self._length = 0
        self._head: np.ndarray | None = None
        self._tail: np.ndarray | None = None

    def add(self, frames: np.ndarray) -> None:
        """Add the frames of the next group, uint8 (t, H, W, 3)."""
        self.drift.add(frames)
        self.thumbnails += [frame.copy() for i, frame in enumerate(frames, self._length)
                            if i in self._thumbnail_indices]
        self._length += len(frames)
        if self._head is None or len(self._head) < MEASURED_FRAMES:
            self._head = _concat(self._head, frames)[:MEASURED_FRAMES]
        self._tail = _concat(self._tail, frames)[-MEASURED_FRAMES:]
        if self.whole is not None:
            self.whole.append(frames)

    @property
    def head_and_tail(self) -> np.ndarray:
        """The first frames followed by the last ones, as many of each as `scene_accuracy` measures; they overlap in a
        short video. A video that is shorter than that is returned whole."""
        assert self._head is not None and self._tail is not None
        return np.concatenate([self._head, self._tail]) if self._length > MEASURED_FRAMES else self._head


@dataclass
class Beginnings:
    """The first `frames` frames of the videos of a batch, which are added in chunks: to statistics, and to files."""

    stats: list[VideoStats]
    frames: int
    writers: list[VideoWriter] = field(default_factory=list)
    length: int = 0  # frames so far, of the whole videos

    def add(self, chunk: np.ndarray) -> None:
        """Add the next frames of all videos, uint8 (B, t, H, W, 3), as far as they count."""
        rest, self.length = self.frames - self.length, self.length + chunk.shape[1]
        if rest <= 0:
            return
        for stats, frames in zip(self.stats, chunk[:, :rest], strict=True):
            stats.add(frames)
        for writer, frames in zip(self.writers, chunk[:, :rest], strict=bool(self.writers)):
            writer.write(frames)


def drift_of(videos: Sequence[VideoStats]) -> dict[str, float | None]:
    """Medians over the videos of `Drift.report`: the jump at joins, and the change from the first second to the last;
    None where no video has a value."""
    reports = [video.drift.report() for video in videos]
    values: dict[str, list[Any]] = {"jump": [report["jump"] for report in reports]}
    for name in ("colour", "contrast", "sharpness"):
        values[name] = [report["first_to_last"][name] for report in reports]
    known = {name: [value for value in column if value is not None] for name, column in values.items()}
    return {name: float(np.median(column)) if column else None for name, column in known.items()}


def sheet_rows(stats: Sequence[VideoStats], videos: Sequence[GenerationParams],
               right: Sequence[bool] | None) -> Iterator[ContactSheetRow]:
    """A row for each video; `right`: which follow their prompts, if that is measured."""
    marks = [""] * len(stats) if right is None else ["ok    " if ok else "WRONG " for ok in right]
    for mark, video_stats, video in zip(marks, stats, videos, strict=True):
        yield ContactSheetRow(mark, format_prompt(video.prompts), np.stack(video_stats.thumbnails))


def _concat(before: np.ndarray | None, frames: np.ndarray) -> np.ndarray:
    return frames if before is None else np.concatenate([before, frames])
