"""A growing video is valid after every chunk, chunks have constant cost, and restarts give the same bytes."""

import io
import signal
import subprocess
import sys

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from app.inference.fragmented_mp4 import (
    FragmentedMp4Writer,
    boxes,
    chunk_path,
    concat_fragments,
    display_scale,
    read_settings,
    write_picture,
)
from odvae.data.video.writer import VideoWriter
from odvae.utils.errors import UserError

SIZES = (1, 8, 8, 3, 1, 8)  # frames a chunk


def picture(time_now: int, height: int = 32, width: int = 64) -> np.ndarray:
    """A bright column that moves one step a frame, so that each frame can be message from the others."""
    frame = np.full((height, width, 3), 30, np.uint8)
    frame[:, 4 * time_now % width :][:, :4] = 230
    return frame


def chunks(sizes=SIZES, **size):
    made = 0
    for count in sizes:
        yield np.stack([picture(made + k, **size) for k in range(count)])
        made += count


def chunks_of(folder) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "chunks").iterdir())]


def decode(source) -> tuple[np.ndarray, list[float]]:
    with av.open(source) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [float(frame.time) for frame in frames]


def grow(folder, frame_rate=8.0, **options) -> FragmentedMp4Writer:
    video = FragmentedMp4Writer(folder, frame_rate)
    for chunk in chunks(**options):
        video.append(chunk)
    return video


@pytest.mark.parametrize("frame_rate", [8.0, 30000 / 1001])
def test_every_prefix_of_the_chunks_is_a_video_with_the_right_frames_at_the_right_times(tmp_path, frame_rate):
    video, made, content = FragmentedMp4Writer(tmp_path, frame_rate), 0, b""
    for number, chunk in enumerate(chunks()):
        made += len(chunk)
        assert video.append(chunk) == made
        chunk = chunk_path(tmp_path, number).read_bytes()
        kinds = [kind for kind, _ in boxes(chunk)]
        assert kinds == ([b"ftyp", b"moov"] if number == 0 else []) + [b"moof", b"mdat"]
        sequence = chunk[chunk.index(b"mfhd") + 8 :][:4]
        assert int.from_bytes(sequence, "big") == number + 1
        content += chunk

        expected = np.stack([picture(k) for k in range(made)]).repeat(8, axis=1).repeat(8, axis=2)
        for source in (io.BytesIO(content), io.BytesIO(b"".join(concat_fragments(tmp_path)))):
            frames, times = decode(source)
            assert frames.shape == expected.shape
            assert np.abs(frames.astype(int) - expected).mean() < 3, "every frame is the right one, in its place"
            assert times == pytest.approx([k / frame_rate for k in range(made)], abs=1e-6)
    assert len(chunks_of(tmp_path)) == len(SIZES), "and nothing is left beside them"


def test_the_final_video_has_all_frames_their_packets_and_the_settings(tmp_path):
    settings = {"prompt": "a „Katze“ \N{CAT FACE}", "seed": 3, "notes": ["smaller tiles"]}
    path = tmp_path / "final.mp4"
    with grow(tmp_path) as video:
        video.finish(path, settings)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.frames == sum(SIZES) and stream.average_rate == 8
        assert float(stream.duration * stream.time_base) == pytest.approx(sum(SIZES) / 8)
        packets = [packet for packet in container.demux(video=0) if packet.dts is not None]
        copied, keys = [bytes(packet) for packet in packets], [k for k, one in enumerate(packets) if one.is_keyframe]
    with av.open(io.BytesIO(b"".join(chunks_of(tmp_path)))) as container:
        assert copied == [bytes(packet) for packet in container.demux(video=0) if packet.dts is not None]
    assert [kind for kind, _ in boxes(path.read_bytes())][:2] == [b"ftyp", b"moov"], "it can play before all is there"
    assert read_settings(path) == settings
    from lvdm.generation.latent_store import read_settings as of_lvdm

    assert of_lvdm(path) == settings
    assert 16 in keys, "a key frame every 2 s"


def test_a_restarted_video_has_the_same_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    noise = np.random.default_rng(0).integers(0, 256, (6, 3, 512, 640, 3), np.uint8)  # large: several slices
    for folder in (one, two):
        with FragmentedMp4Writer(folder, 8.0) as video:
            for chunk in noise:
                video.append(chunk)
    assert chunks_of(one) == chunks_of(two)
    before = [path.stat().st_mtime_ns for path in sorted((one / "chunks").iterdir())]
    with FragmentedMp4Writer(one, 8.0) as video:
        for chunk in noise[:2]:
            video.append(chunk)
        assert [path.stat().st_mtime_ns for path in sorted((one / "chunks").iterdir())] == before, "all are kept"
        video.append(255 - noise[2])  # it goes another way: what followed is of another video
    assert chunks_of(one)[:2] == chunks_of(two)[:2] and len(chunks_of(one)) == 3


KILLED = """
import os, pathlib, signal, sys
import numpy as np
from app.inference.fragmented_mp4 import FragmentedMp4Writer
video = FragmentedMp4Writer(pathlib.Path(sys.argv[1]), 8.0)
write, left = pathlib.Path.write_bytes, [2]
def half(path, content):
    write(path, content[: len(content) // 2] if not left[0] else content)
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.write_bytes = half
for number in range(9):
    video.append(np.full((4, 32, 64, 3), 20 * number, np.uint8))
"""


def test_a_kill_in_the_middle_of_a_chunk_leaves_the_chunks_before_it(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "chunks").glob("[!.]*")) == ["000000.mp4", "000001.mp4"]
    assert len(decode(io.BytesIO(b"".join(concat_fragments(tmp_path))))[0]) == 8
    with FragmentedMp4Writer(tmp_path, 8.0) as video:  # the job begins again
        for number in range(9):
            video.append(np.full((4, 32, 64, 3), 20 * number, np.uint8))
        video.finish(tmp_path / "final.mp4", {})
    assert len(decode(str(tmp_path / "final.mp4"))[0]) == 36


def test_the_cost_of_a_chunk_does_not_grow_with_the_video(tmp_path):
    process, sizes, used = psutil.Process(), [], []
    with FragmentedMp4Writer(tmp_path, 8.0) as video:
        for number in range(300):
            video.append(np.stack([picture(2 * number), picture(2 * number + 1)]))
            sizes.append(chunk_path(tmp_path, number).stat().st_size)
            used.append(process.memory_info().rss)
        before = process.memory_info().rss
        video.finish(tmp_path / "final.mp4", {})
        assert process.memory_info().rss - before < 2**24
    assert max(sizes[200:]) <= 1.05 * max(sizes[20:120])
    assert used[-1] - used[100] < 2**23
    assert len(decode(str(tmp_path / "final.mp4"))[1]) == 600


def test_a_full_disk_leaves_the_chunks_before_it(tmp_path, monkeypatch):
    video = grow(tmp_path)
    before = chunks_of(tmp_path)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        video.append(picture(0)[None])
    assert chunks_of(tmp_path) == before
    monkeypatch.setattr("app.inference.fragmented_mp4._join", full)
    with pytest.raises(OSError, match="No space"):
        video.finish(tmp_path / "final.mp4", {})
    assert [path.name for path in tmp_path.iterdir()] == ["chunks"]


def test_invalid_sizes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"even sides.*301x512"):
        FragmentedMp4Writer(tmp_path, 8.0).append(np.zeros((1, 301, 512, 3), np.uint8))
    video = FragmentedMp4Writer(tmp_path, 8.0)
    with pytest.raises(UserError, match="no frame"):
        video.finish(tmp_path / "final.mp4", {})
    video.append(picture(0)[None])
    with pytest.raises(UserError, match="change from 32x64 to 48x64"):
        video.append(np.zeros((1, 48, 64, 3), np.uint8))
    with pytest.raises(UserError, match="no frame"):
        concat_fragments(tmp_path / "other")


def test_small_odd_pictures_are_enlarged(tmp_path):
    with grow(tmp_path, height=31, width=33):
        assert decode(io.BytesIO(b"".join(chunks_of(tmp_path))))[0].shape[1:] == (310, 330, 3)


@pytest.mark.parametrize("height, width", [(64, 64), (31, 33), (200, 900), (256, 256), (480, 832), (1, 1)])
def test_small_pictures_are_enlarged_to_the_minimum_display_size(height, width):
    scale = display_scale(height, width)
    assert min(height, width) * scale >= 256 and (scale == 1 or scale % 2 == 0)
    assert scale == 1 or min(height, width) * (scale - 2) < 256


@pytest.mark.parametrize("comment", [None, "a holiday", "[1, 2]", "[" * 100_000, "{\"seed\": "])
def test_a_foreign_video_has_no_settings(tmp_path, comment):
    path = tmp_path / "other.mp4"
    with VideoWriter(path, 8, metadata={"comment": comment} if comment else None) as writer:
        writer.write(picture(0))
    with pytest.raises(UserError, match=r"other\.mp4 has no settings"):
        read_settings(path)


@pytest.mark.parametrize("content", [b"", b"nothing", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"])
def test_no_video_has_no_settings(tmp_path, content):
    (tmp_path / "other.mp4").write_bytes(content)
    with pytest.raises(UserError, match="no settings"):
        read_settings(tmp_path / "other.mp4")
    with pytest.raises(UserError, match=r"holiday\.mp4 has no settings"):
        read_settings(tmp_path / "other.mp4", "holiday.mp4")


def test_still_pictures(tmp_path):
    write_picture(tmp_path / "poster.webp", picture(3))
    with Image.open(tmp_path / "poster.webp") as image:
        assert image.size == (64, 32)


def test_nothing_here_imports_torch():
    code = ("import sys, app.inference.fragmented_mp4, app.storage.uploads; "
            "sys.exit('torch' in sys.modules or 'gradio' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
