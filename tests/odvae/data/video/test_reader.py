"""Video files: what is written is what is read, at any cut and rate, and bad files say what is wrong with them."""

from __future__ import annotations

import errno
import io
import tracemalloc
import wave
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from lvdm.capabilities import VideoGrid, capabilities
from lvdm.generation.requests import load_context_frames
from odvae.data.dataset import DataConfig, VideoClipDataset
from odvae.data.transforms import resize_crop
from odvae.data.video import writer as writing
from odvae.data.video.reader import VideoError, VideoReader, probe, read_clip, read_image, read_stream
from odvae.data.video.writer import VideoWriter, write_video
from odvae.utils.errors import UserError

SHARED = Path(__file__).parents[4].parent / "shared" / "clips"
ODD = SHARED / "odd"
needs_odd = pytest.mark.skipif(not ODD.is_dir(), reason="the odd files are not on this machine")


def numbered(frames: int, height: int = 32, width: int = 64) -> np.ndarray:
    """A video whose frames differ: frame k has the grey level 10 + 6k, over a slope to the right."""
    level = 10 + 6 * np.arange(frames)[:, None, None]
    slope = np.linspace(0, 20, width)[None, None, :]
    return np.repeat((level + slope + np.zeros((1, height, 1)))[..., None], 3, axis=-1).round().astype(np.uint8)


def numbers(video: np.ndarray) -> list[int]:
    """Which frames of `numbered` these are."""
    return [round((float(frame.mean()) - 20) / 6) for frame in video]


def write_at(path: Path, times: list[int], rotation: int = 0, size: tuple[int, int] = (32, 64)) -> None:
    """Frames of `numbered` that begin at `times` (ms), by PyAV alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for time, picture in zip(times, numbered(len(times), *size), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    video = numbered(33)
    path = tmp_path / f"a:b %d{suffix}"  # a name that FFmpeg might take for a protocol or a pattern
    write_video(path, [video[:1], video[1], video[2:20], video[20:20], video[20:]], 8.0,
                metadata={"title": "numbers", "prompt": "ein Täst"})
    info = probe(path)
    assert (info.frames, info.height, info.width) == (33, 32, 64)
    assert info.frame_rate == pytest.approx(8, abs=.01) and info.duration == pytest.approx(33 / 8, abs=2e-3)
    found = read_clip(path)
    assert found.dtype == np.uint8 and found.shape == video.shape
    assert np.abs(found.astype(int) - video).mean() < 2
    assert numbers(found) == list(range(33))
    with av.open(str(path.absolute())) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
        assert tags["title"] == "numbers" and tags["prompt"] == "ein Täst"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (64, 96), (2, 2), (34, 66), (54, 480)])
def test_sizes_that_decord_pads(tmp_path: Path, size: tuple[int, int]) -> None:
    video = numbered(5, *size)  # decord2 3.4 fails where a padded row is a multiple of the width
    write_video(tmp_path / "a.mp4", [video], 8.0)
    assert np.abs(read_clip(tmp_path / "a.mp4").astype(int) - video).mean() < 2


@pytest.mark.parametrize("decord_works", [True, False])
def test_a_time_shows_the_latest_frame_that_has_begun(tmp_path: Path, decord_works: bool) -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum([0, *rng.integers(20, 400, 30)])
    write_at(tmp_path / "vfr.mp4", times.tolist())
    with VideoReader(tmp_path / "vfr.mp4") as video:
        video._source.suits_decord = decord_works
        for start, frames, rate in [(0.0, 20, 8.0), (1.3, 11, 3.0), (0.7, 40, 60.0), (0.0, None, 24.0), (2.0, 1, 1.0)]:
            found = video.clip(start, frames, rate)
            asked = start + np.arange(len(found)) / rate
            assert numbers(found) == (np.searchsorted(times / 1000, asked + 1e-3, "right") - 1).tolist()
        assert len(video.clip(0.0, None, 24.0)) == pytest.approx(video.info.duration * 24, abs=1)
        first = int(np.searchsorted(times / 1000, 1.0, "right")) - 1
        assert numbers(video.clip(1.0, 5)) == list(range(first, first + 5))  # as stored
        assert video._source.suits_decord is decord_works


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
@pytest.mark.parametrize("rate", [None, 8.0, 30.0])
def test_a_stream_of_chunks_is_the_whole(tmp_path: Path, chunk: int, rate: float | None) -> None:
    write_video(tmp_path / "a.mp4", [numbered(25)], 12.0)
    chunks = list(read_stream(tmp_path / "a.mp4", rate, chunk))
    assert all(len(part) == chunk for part in chunks[:-1])
    assert np.array_equal(np.concatenate(chunks), read_clip(tmp_path / "a.mp4", frame_rate=rate))


@pytest.mark.parametrize("decord_works", [True, False])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_honoured(tmp_path: Path, rotation: int, decord_works: bool) -> None:
    write_at(tmp_path / "turned.mp4", [0, 100, 200], rotation)
    with VideoReader(tmp_path / "turned.mp4") as video:
        video._source.suits_decord = decord_works
        found = video.clip()
        assert (video.info.height, video.info.width) == found.shape[1:3] == ((32, 64) if rotation == 180 else (64, 32))
    upright = np.rot90(numbered(3), rotation // 90, axes=(1, 2))
    assert np.abs(found.astype(int) - upright).mean() < 2


def test_spans_outside_the_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, [numbered(16)], 8.0)
    assert len(read_clip(path, 0, 16, 8.0)) == len(read_clip(path, 1.0, 8)) + 8 == 16
    with pytest.raises(VideoError, match=r"a\.mp4 is too short: it lasts 2\.000 s.* gives 16 frames .* 17 are needed"):
        read_clip(path, 0, 17, 8.0)
    with pytest.raises(VideoError, match="gives 8 frames as stored"):
        read_clip(path, 1.0, 9)
    with pytest.raises(VideoError, match="gives 0 frames"):
        read_clip(path, 2.0)
    for wrong in [{"start": -1.0}, {"frames": 0}, {"frame_rate": 0.0}]:
        with pytest.raises(UserError, match="cannot read"):
            read_clip(path, **wrong)


def test_errors_of_bad_files(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", [np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), np.uint8)], 8.0)
    good = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "cut.mp4").write_bytes(good[:len(good) * 2 // 3])
    (tmp_path / "headless.mp4").write_bytes(good[:400])
    (tmp_path / "folder.mp4").mkdir()
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(bytes(8000))
    for name, message in [("missing", "there is no such file"), ("empty", "is empty"), ("folder", "is a folder"),
                          ("text", "cannot be opened as a video"), ("headless", "truncated"),
                          ("cut", "is truncated"), ("sound", "no video, only audio")]:
        for read in (probe, read_clip, lambda path: list(read_stream(path))):
            with pytest.raises(VideoError, match=message) as caught:
                read(tmp_path / f"{name}.mp4")
            assert f"{name}.mp4" in str(caught.value)


def test_damage_inside_a_file_is_an_error_or_a_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", [np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), np.uint8)], 8.0)
    data = bytearray((tmp_path / "good.mp4").read_bytes())
    data[len(data) // 2:len(data) // 2 + 2000] = bytes(2000)
    (tmp_path / "bad.mp4").write_bytes(data)
    try:
        assert len(read_clip(tmp_path / "bad.mp4")) == 30
    except VideoError as error:
        assert "bad.mp4 cannot be decoded beyond" in str(error)


@pytest.mark.parametrize("decord_works", [True, False])
def test_a_size_that_changes_midway_stays_the_first(tmp_path: Path, decord_works: bool) -> None:
    path = tmp_path / "change.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(20):
            jpeg = io.BytesIO()
            Image.fromarray(np.full((48 if number < 10 else 96, 64, 3), 12 * number, np.uint8)).save(jpeg, "JPEG")
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
            container.mux(packet)
    with VideoReader(path) as opened:
        opened._source.suits_decord = decord_works
        video = opened.clip()
    assert video.shape == (20, 48, 64, 3)
    assert np.abs(video.astype(int).mean((1, 2, 3)) - 12 * np.arange(20)).max() < 3


@needs_odd
@pytest.mark.parametrize("name, shape, frames", [
    ("alpha_odd.webm", (55, 129), 25), ("av1.mp4", (68, 160), 25), ("hevc10.mp4", (272, 640), 25),
    ("ocean.ogv", (240, 320), 249), ("rectangles.gif", (300, 400), 3), ("rot90.mp4", (640, 272), 250),
    ("single.mp4", (272, 640), 1), ("tree.avi", (240, 320), 68), ("vfr.mp4", (136, 320), 95)])
def test_odd_files_are_read(name: str, shape: tuple[int, int], frames: int) -> None:
    info = probe(ODD / name)
    assert (info.height, info.width, info.frames) == (*shape, frames)
    few = min(5, frames)
    assert read_clip(ODD / name, 0, few).shape == (few, *shape, 3)
    resampled = sum(len(chunk) for chunk in read_stream(ODD / name, 2.0))
    assert resampled == pytest.approx(info.duration * 2, abs=1)


@needs_odd
@pytest.mark.parametrize("name, message", [
    ("audio_only.m4a", "holds no video, only audio"), ("empty.mp4", "is empty"), ("text.mp4", "cannot be opened"),
    ("trunc_faststart.mp4", "is truncated in the middle of frame 141"), ("trunc_nomoov.mp4", "cannot be opened")])
def test_odd_files_that_cannot_be_read(name: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VideoError, match=message):
        read_clip(ODD / name)
    assert capfd.readouterr().err == ""


def test_the_writer_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, [numbered(3)], 8.0)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"even sides, not 33x64; .* 32x64 or 34x64"):
        write_video(path, [numbered(2, 33, 64)], 8.0)
    with pytest.raises(UserError, match="change from 32x64 to 16x16 after 2 frames"):
        write_video(path, [numbered(2), numbered(2, 16, 16)], 8.0)
    with pytest.raises(UserError, match="at least one frame"):
        write_video(path, [], 8.0)
    with pytest.raises(UserError, match="float64"):
        write_video(path, [numbered(2) / 255], 8.0)
    with pytest.raises(UserError, match=r"must end in one of \.mp4"):
        write_video(tmp_path / "a.avi", [numbered(2)], 8.0)
    with pytest.raises(KeyError), VideoWriter(path, 8.0) as writer:
        writer.write(numbered(4))
        raise KeyError
    writer = VideoWriter(path, 8.0)
    writer.write(numbered(4))
    assert path.read_bytes() == before  # nothing shows before the end
    writer.abort()
    writer.abort()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the always full disk is Linux's")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "atomic_path", lambda path: nullcontext(Path("/dev/full")))
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), np.uint8)
    with pytest.raises(OSError) as caught:
        write_video(tmp_path / "a.mp4", [noise], 8.0, crf=0)
    assert caught.value.errno == errno.ENOSPC


def test_photos(tmp_path: Path) -> None:
    from PIL import Image

    picture = numbered(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(picture, -1)[None])
    (tmp_path / "b.png").write_text("no")
    with pytest.raises(VideoError, match=r"b\.png is not a readable image"):
        read_image(tmp_path / "b.png")


def test_a_span_is_resized_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live full-size frames do not grow with the span: of a read, a training window, a continuation."""
    path, (height, width) = tmp_path / "a.mp4", (120, 160)
    write_video(path, (numbered(20, height, width) for _ in range(12)), 8.0)  # 30 s
    monkeypatch.setattr("odvae.data.video.reader.TRANSFORM_BYTES", 8 * height * width * 3)
    small = partial(resize_crop, height=16, width=16)
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4"}\n')
    clips = VideoClipDataset(DataConfig(files=tmp_path / "list.jsonl", frames=17, height=16, width=16, held_out=0))
    pipeline = SimpleNamespace(kind="LVDMPipeline", grid=VideoGrid(height=16, width=16),
                               capabilities=capabilities("LVDMPipeline", {}))

    def peak(read: Callable[[], np.ndarray]) -> float:
        """In full-size frames, less what is returned."""
        read()
        tracemalloc.start()
        found = read()
        most = tracemalloc.get_traced_memory()[1] - found.nbytes
        tracemalloc.stop()
        return most / (height * width * 3)

    short, long = (peak(lambda frames=frames: read_clip(path, 0, frames, 8.0, small)) for frames in (40, 240))
    assert long < 1.1 * short and long < 3 * 8
    assert peak(lambda: clips._pixels(0, 0, clips.buckets[0])) < 3 * 8
    whole = read_clip(path, 0, None, 8.0, small)
    found = load_context_frames(pipeline, path)  # type: ignore[arg-type]
    assert np.array_equal(found, whole[-17:])  # the first latent and two groups of two
    assert peak(lambda: load_context_frames(pipeline, path)) < 3 * 8  # type: ignore[arg-type]
