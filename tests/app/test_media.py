"""A video that grows is a valid video after every piece."""

import av
import numpy as np
import pytest

from app.media import GrowingVideo, enlargement, read_settings, write_poster
from odvae.runtime.errors import UserError


def picture(time_now: int) -> np.ndarray:
    """A bright column that moves one step a frame, so that each frame can be told from the others."""
    frame = np.full((32, 64, 3), 30, np.uint8)
    frame[:, 4 * time_now % 64 :][:, :4] = 230
    return frame


def decode(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_each_piece_makes_a_longer_valid_video_with_the_same_beginning(tmp_path):
    path = tmp_path / "video.mp4"
    video = GrowingVideo(path, 8.0, {"prompt": "a cat", "seed": 3})
    made = 0
    for size in (1, 8, 8, 3, 1):
        pieces = np.stack([picture(made + k) for k in range(size)])
        made += size
        assert video.append(pieces) == made
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.frames == made
            assert float(stream.duration * stream.time_base) == pytest.approx(made / 8)
        frames = decode(path)
        wanted = np.stack([picture(k) for k in range(made)]).repeat(8, axis=1).repeat(8, axis=2)
        assert frames.shape == wanted.shape
        assert np.abs(frames.astype(int) - wanted).mean() < 3, "every frame is the right one, in its place"
        assert read_settings(path) == {"prompt": "a cat", "seed": 3, "frames_made": made}
    video.close()
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"], "nothing is left beside it"


def test_pieces_are_copied_not_encoded_again(tmp_path):
    path = tmp_path / "video.mp4"
    video = GrowingVideo(path, 8.0, {})
    video.append(np.stack([picture(k) for k in range(5)]))
    with av.open(str(path)) as container:
        before = [bytes(packet) for packet in container.demux(video=0) if packet.dts is not None]
    video.append(np.stack([picture(k) for k in range(5, 9)]))
    with av.open(str(path)) as container:
        after = [bytes(packet) for packet in container.demux(video=0) if packet.dts is not None]
    video.close()
    assert after[:5] == before and len(after) == 9


def test_a_failed_write_leaves_the_old_video(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    video = GrowingVideo(path, 8.0, {})
    video.append(np.stack([picture(0)]))
    before = path.read_bytes()

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_join", full)
    with pytest.raises(OSError, match="No space"):
        video.append(np.stack([picture(1)]))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["video.mp4"]


def test_odd_sides_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"even sides.*301x512"):
        GrowingVideo(tmp_path / "video.mp4", 8.0, {}).append(np.zeros((1, 301, 512, 3), np.uint8))


@pytest.mark.parametrize("height, width", [(64, 64), (31, 33), (200, 900), (256, 256), (480, 832), (1, 1)])
def test_small_pictures_are_enlarged_to_what_can_be_looked_at(height, width):
    scale = enlargement(height, width)
    assert min(height, width) * scale >= 256 and (scale == 1 or scale % 2 == 0)
    assert scale == 1 or min(height, width) * (scale - 2) < 256


def test_a_video_of_somebody_else_has_no_settings(tmp_path):
    (tmp_path / "other.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no settings"):
        read_settings(tmp_path / "other.mp4")


def test_poster_is_a_picture(tmp_path):
    from PIL import Image

    write_poster(tmp_path / "poster.webp", picture(3))
    with Image.open(tmp_path / "poster.webp") as image:
        assert image.size == (64, 32)
