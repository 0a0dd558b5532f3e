"""Uploads are probed, stored under names of our own, and found by their id only."""

import asyncio
import io
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from app.storage.jobs import is_id, new_id
from app.storage.probe_upload import probe
from app.storage.uploads import Uploads, sanitize_filename
from odvae.utils.errors import UserError

RATE = 25  # frames a second, which MPEG-2 knows too


def video(frames=50, size=(48, 64), container="mp4", codec="libx264", options=None) -> bytes:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115  (faststart opens it once more, by its name)
    with av.open(file.name, "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=RATE)
        stream.height, stream.width = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for k in range(frames):
            picture = np.full((*size, 3), 12 * k % 256, np.uint8)
            picture[:, k % size[1]] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with file:
        return Path(file.name).read_bytes()


def image(kind="PNG", size=(20, 10), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8192), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it has side x side pixels."""
    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", data) + part(b"IEND", b"")


@pytest.fixture
def uploads(tmp_path) -> Uploads:
    return Uploads(tmp_path / "uploads", max_bytes=2**20, max_seconds=10)


def left(uploads: Uploads) -> list[str]:
    return sorted(path.name for path in uploads.folder.glob("*"))


@pytest.mark.parametrize("container, codec, extension", [
    ("mp4", "libx264", ".mp4"), ("mov", "libx264", ".mp4"), ("matroska", "libx264", ".mkv"),
    ("webm", "libvpx-vp9", ".mkv"), ("avi", "mpeg4", ".avi"), ("mpegts", "libx264", ".ts"),
    ("mpeg", "mpeg2video", ".mpg"), ("gif", "gif", ".gif"),
])
def test_videos_are_identified_by_content(uploads, container, codec, extension):
    content = video(container=container, codec=codec)
    found = uploads.receive([content[:100], content[100:]], "holiday.exe", "ada")
    assert (found.kind, found.width, found.height, found.name, found.owner) == ("video", 64, 48, "holiday.exe", "ada")
    assert found.path == uploads.folder / f"{found.id}{extension}" and is_id(found.id)
    assert found.path.read_bytes() == content
    assert found.frames == 50 and found.seconds == pytest.approx(2, rel=0.05)
    assert found.frame_rate == pytest.approx(25, rel=0.05)
    assert uploads.find(found.id, "ada") == found


@pytest.mark.parametrize("kind, extension", [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp"), ("BMP", ".bmp")])
def test_images_are_identified_by_content(uploads, kind, extension):
    turned = Image.Exif()
    turned[0x0112] = 6  # shown on its side
    found = uploads.receive([image(kind, exif=turned)], "a.mp4", "ada")
    upright = (20, 10) if kind == "BMP" else (10, 20)
    assert (found.kind, found.width, found.height, found.frames) == ("image", *upright, 1)
    assert found.path.suffix == extension and found.seconds is None


def test_single_frames_and_animated_images_are_videos(uploads):
    assert uploads.receive([video(frames=1)], "one.mp4", "ada").frames == 1
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (20, 10), (level, 0, 0)) for level in (0, 100, 200)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    found = uploads.receive([buffer.getvalue()], "a.webp", "ada")
    assert (found.kind, found.frames, found.seconds) == ("video", 3, pytest.approx(.3))


def test_adding_a_server_file_leaves_it_in_place(uploads, tmp_path):
    source = tmp_path / "blob"
    source.write_bytes(video())
    found = uploads.add(source, "a.mp4", "ada")
    assert source.read_bytes() == found.path.read_bytes()
    source.unlink()
    assert uploads.find(found.id, None).path.is_file()
    (tmp_path / "link").symlink_to(found.path)
    with pytest.raises(UserError, match="is not a file"):
        uploads.add(tmp_path / "link", "a.mp4", "ada")


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
MPD = b'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:isoff-live:2011"></MPD>'
WHOLE = video(frames=200, options={"movflags": "faststart"})

BAD = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "a text": (b"Once upon a time", "not a video or image of an accepted type.*MP4"),
    "a playlist": (PLAYLIST, "not a video or image of an accepted type"),
    "a list of files": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "not a video or image of an accepted type"),
    "an SVG": (SVG, "not a video or image of an accepted type"),
    "DASH": (MPD, "not a video or image of an accepted type"),
    "DASH that begins as MP4": (b"AAAAftyp" + MPD, "cannot be opened as a video"),
    "SDP": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", "not a video or image of an accepted type"),
    "a page": (b"<html><script>alert(1)</script>", "not a video or image of an accepted type"),
    "a program": (b"\x7fELF\x02\x01\x01", "not a video or image of an accepted type"),
    "no table of contents": (video()[:2000], "cannot be opened as a video.*truncated"),
    "a video cut off": (WHOLE[: len(WHOLE) // 2], "is truncated"),
    "a Matroska cut off": (video(frames=200, container="matroska")[:1500], "is truncated|cannot be opened"),
    "only the beginning": (video()[:40], "cannot be opened as a video"),
    "noise in MP4": (b"\0\0\0\x18ftypisom" + bytes(range(256)) * 40, "cannot be opened as a video"),
    "sound": (sound(), "holds no video, only audio"),
    "too long": (video(frames=270), r"is too long: 10\.8 s, and the limit is 10 s"),
    "too wide": (video(frames=1, size=(16, 8200), codec="ffv1", container="avi"), "is too large: 8200x16 pixels"),
    "too many bytes": (bytes(2**20 + 1), r"is too large: at most 1\.0 MiB"),
    "a strange codec": (video(codec="flv", container="avi"), "is encoded as flv.*H.264"),
    "an image cut off": (image("JPEG", (640, 480))[:900], "damaged or truncated"),
    "an image bomb": (bomb(60_000), "is too large: 60000x60000 pixels, and a side may have at most 8192"),
    "an image too wide": (image("PNG", (8193, 1)), "is too large: 8193x1 pixels"),
    "noise in PNG": (b"\x89PNG\r\n\x1a\n" + bytes(500), "damaged or truncated|not a readable image"),
}


@pytest.mark.parametrize("content, problem", BAD.values(), ids=BAD.keys())
def test_invalid_uploads_are_refused_with_a_reason_and_leave_no_file(uploads, content, problem):
    with pytest.raises(UserError, match=rf"^mine\.mp4 .*({problem})"):
        uploads.receive([content], "../mine.mp4", "ada")
    assert left(uploads) == []


def test_a_too_large_upload_is_refused_while_it_is_received(uploads):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 2**16
            yield bytes(2**16)

    async def also_endless():
        for chunk in endless():
            yield chunk

    with pytest.raises(UserError, match="too large"):
        uploads.receive(endless(), "big.mp4", "ada")
    with pytest.raises(UserError, match="too large"):
        asyncio.run(uploads.receive_async(also_endless(), "big.mp4", "ada"))
    assert taken <= 2 * (2**20 + 2**16) and left(uploads) == []


def test_a_broken_connection_leaves_no_file(uploads):
    def breaking():
        yield b"\0\0\0\x18ftyp"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        uploads.receive(breaking(), "a.mp4", "ada")
    assert left(uploads) == []


def test_an_upload_by_http(uploads):
    async def chunks():
        for start in range(0, len(WHOLE), 1000):
            yield WHOLE[start : start + 1000]

    assert asyncio.run(uploads.receive_async(chunks(), "a.mp4", "ada")).frames == 200


@pytest.mark.parametrize("name, shown", [
    ("../../etc/passwd", "passwd"),
    ("..\\..\\boot.ini", "boot.ini"),
    ("a\0b\n\x1b[31m.mp4", "ab[31m.mp4"),
    ("cat\u202egpj.exe", "catgpj.exe"),
    ("\u200f\ufeff", "upload"),
    ("", "upload"),
    ("..", "upload"),
    ("/", "upload"),
    ("CON", "_CON"),
    ("nul.mp4", "_nul.mp4"),
    ("--help", "help"),
    (".bashrc", "bashrc"),
    ("a" * 10_000 + ".mp4", "a" * 96 + ".mp4"),
    ("b." + "x" * 10_000, ("b." + "x" * 98)),
    ("<img src=x>.png", "_img src=x_.png"),
    ("\ud800.png", "png"),
    ("Grüße  ans Meer 海.mp4", "Grüße ans Meer 海.mp4"),
])
def test_filenames_are_sanitized(name, shown):
    assert sanitize_filename(name) == shown and sanitize_filename(shown) == shown


def test_only_its_owner_finds_an_upload_and_only_by_its_id(uploads, tmp_path):
    found = uploads.receive([image()], "a.png", "ada")
    again = Uploads(uploads.folder, 2**20, 10)  # the server was started again
    assert again.find(found.id, "ada") == again.find(found.id, None) == found
    (tmp_path / "secret.png").write_bytes(image())
    for wrong in (new_id(), "../secret", "../secret.png", str(found.path), f"{found.id}.png", f"../uploads/{found.id}",
                  "", "\0", "%2e%2e/secret", found.id.upper(), None, 5, [found.id]):
        with pytest.raises(UserError, match="not here any more"):
            uploads.find(wrong, "ada")
    with pytest.raises(UserError, match="not here any more"):
        uploads.find(found.id, "eve")


def test_unused_uploads_are_removed(uploads):
    old, used, new = (uploads.receive([image()], "a.png", "ada") for _ in range(3))
    for one in (old, used):
        for path in (one.path, one.path.with_suffix(".json")):
            os.utime(path, (1, 1))
    (uploads.folder / f"{new_id()}.mp4").write_bytes(b"a kill came before it was accepted")
    (uploads.folder / ".upload.tmp-1-0").write_bytes(b"a kill came while it came in")
    uploads.find(used.id, "ada")
    assert uploads.remove_orphans(3600) == 1
    with pytest.raises(UserError):
        uploads.find(old.id, "ada")
    assert uploads.find(used.id, "ada") == used and uploads.find(new.id, "ada") == new
    for leftover in uploads.folder.glob("*"):
        os.utime(leftover, (1, 1))
    assert uploads.remove_orphans(3600) == 4 and left(uploads) == []


def test_a_crashing_decoder_only_fails_the_upload(uploads, monkeypatch):
    for code in ("import os; os.abort()", "import sys; sys.stdout.write('{')", "bytearray(10**15)"):
        run = subprocess.run
        monkeypatch.setattr("subprocess.run", lambda command, code=code, run=run, **how: run(
            [sys.executable, "-c", code], **how))
        with pytest.raises(UserError, match=r"a\.png cannot be read"):
            uploads.receive([image()], "a.png", "ada")
        monkeypatch.undo()
    monkeypatch.setattr("app.storage.uploads.PROBE_TIMEOUT", 0.0)
    with pytest.raises(UserError, match="takes too long"):
        uploads.receive([image()], "a.png", "ada")
    assert left(uploads) == []


def test_the_probe_opens_no_playlist(tmp_path):
    """Also where the first bytes were no guard: FFmpeg may only be the one reader, and open the one file."""
    (tmp_path / "b.ts").write_bytes(video(container="mpegts"))
    playlist = tmp_path / "a.mp4"
    for content in (PLAYLIST.replace(b"file:///etc/passwd", b"b.ts"), b"ffconcat version 1.0\nfile 'b.ts'\n", MPD, SVG):
        playlist.write_bytes(content)
        for reader in ("mov", "mpegts"):
            with pytest.raises(UserError, match="cannot be opened as a video"):
                probe(playlist, reader, 9)
