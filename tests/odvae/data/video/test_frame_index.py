"""Each frame that is read is the one shown at its time: containers x codecs x closed and open GOPs, in any order."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from numbered import CLOSED264, KINDS, OPEN264, Kind, needs_ffmpeg, read_number, write

from odvae.data.video import file as video_file
from odvae.data.video.reader import VideoError, VideoReader, count_readable

SAMPLE = ("h264-closed.mp4", "h264-open.mkv", "h264-open.avi", "h264-refresh-no-b.mp4",
          "h264-refresh-no-b.ts", "h265-open.mp4", "h265-open-cut.ts",
          "vp8.webm", "mpeg2.mpg", "mpeg2-open-cut.ts", "wmv2.wmv", "h264-edit-list-open.mov", "h265-vfr-open.mp4",
          "gif.gif")


def shown(path: Path, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, times) of the frames that a decoding from beginning to end gives. Frame n is drawn for n / rate s."""
    with av.open(str(path)) as container:
        numbers = np.array([read_number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])
    assert (np.diff(numbers) > 0).all()
    return numbers, (numbers - numbers[0]) / kind.rate


def check(folder: Path, kind: Kind, frames: int) -> None:
    path = write(folder, kind, frames)
    numbers, times = shown(path, kind)
    rng = np.random.default_rng(0)
    with VideoReader(path) as video:
        assert len(video.times) == len(numbers)
        assert np.abs(video.times - times).max() < 1e-3  # Matroska rounds to milliseconds
        stored = [read_number(frame) for frame in video.clip()]
        assert stored == numbers.tolist()
        starts = np.concatenate([np.arange(0, video.info.duration - 17 / 8, 17 / 8),  # as a build reads
                                 np.linspace(video.info.duration - 17 / 8 - .1, 0, 4),  # backwards
                                 rng.uniform(0, video.info.duration - 17 / 8 - .1, 6)])
        for start in starts:
            right = numbers[np.searchsorted(times, start + np.arange(17) / 8 + 1e-3, "right") - 1]
            found = [read_number(frame) for frame in video.clip(float(start), 17, 8.0)]
            assert found == right.tolist(), f"from {start} s"


@needs_ffmpeg
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in SAMPLE], ids=lambda kind: kind.name)
def test_a_sample_of_kinds(tmp_path: Path, kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    check(tmp_path, kind, 160)
    assert capfd.readouterr().err == ""


@needs_ffmpeg
@pytest.mark.parametrize("kind", [Kind("cut.mp4", f"{CLOSED264} -movflags +faststart"), Kind("cut.ts", OPEN264),
                                  Kind("cut.mkv", OPEN264)], ids=lambda kind: kind.name)
def test_readable_frames_of_a_truncated_file_are_those_that_are_read(tmp_path: Path, kind: Kind,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of threads; with the frames that the decoder holds at the end of the file."""
    path = write(tmp_path, kind, 60)
    whole = path.read_bytes()
    for share in (.55, .7, .83, .94):
        path.write_bytes(whole[:int(len(whole) * share)])
        counts, read = set(), []
        for large in (2**30, 0):  # one thread, many
            monkeypatch.setattr(video_file, "MIN_PIXELS_FOR_THREADS", large)
            counts.add(count_readable(path))
            with VideoReader(path, max(counts)) as video:
                read.append([read_number(frame) for frame in video.clip()])
                assert read_number(video.clip(float(video.times[-1]))[0]) == read[0][-1]
        (count,) = counts
        assert len(read[0]) == count and read[0] == read[1] == sorted(read[0]) and read[0][-1] >= count - 1
        with pytest.raises(VideoError, match="is too short"), VideoReader(path, count) as video:
            video.clip(0, count + 1)


@needs_ffmpeg
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_all_kinds(tmp_path: Path, kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    check(tmp_path, kind, 480)
    assert capfd.readouterr().err == ""
