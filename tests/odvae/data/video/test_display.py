"""A picture is what a viewer shows: upright, with square pixels, in the right colours, deinterlaced, opaque."""

from __future__ import annotations

import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numbered import needs_ffmpeg
from PIL import Image, ImageCms

from odvae.data.video.display import FrameConverter
from odvae.data.video.reader import VideoReader, probe, read_clip, read_image

H, W = 32, 48


def write(path: Path, planes: list[np.ndarray], pixel_format: str, codec: str = "ffv1", frames: int = 3,
          options: dict[str, str] | None = None, **properties: Any) -> Path:
    """A file of equal frames of these planes (rows, columns[, channels]), losslessly, with properties of the codec."""
    height, width = planes[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        matrix = properties.pop("matrix", None)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        for name, value in properties.items():
            setattr(stream.codec_context, name, value)
        for number in range(frames):
            frame = av.VideoFrame(width, height, pixel_format)
            for plane, pixels in zip(frame.planes, planes, strict=True):
                row = np.zeros((plane.height, plane.line_size), np.uint8)
                data = np.ascontiguousarray(pixels).view(np.uint8).reshape(plane.height, -1)
                row[:, :data.shape[1]] = data
                plane.update(row)
            frame.pts = number
            for name in ("color_trc", "color_primaries", "colorspace", "color_range"):
                if name in properties:
                    setattr(frame, name, properties[name])
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def plain(height: int, width: int, code: tuple[int, int, int], depth: type = np.uint8) -> list[np.ndarray]:
    """The planes of a 4:4:4 picture of one colour."""
    return [np.full((height, width), value, depth) for value in code]


@pytest.mark.parametrize("a, b, c, d", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                                        (0, 1, 1, 0), (0, -1, -1, 0), (0, 1, -1, 0), (0, -1, 1, 0)])
def test_all_eight_display_matrices(tmp_path: Path, a: int, b: int, c: int, d: int) -> None:
    grey = np.random.default_rng(0).integers(40, 210, (H // 8, W // 8), np.uint8).repeat(8, 0).repeat(8, 1)
    chroma = np.full((H // 2, W // 2), 128, np.uint8)
    one = 1 << 16
    path = write(tmp_path / "a.mp4", [grey, chroma, chroma], "yuv420p", "libx264", options={"crf": "1"},
                 matrix=[a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30])
    found = read_clip(path)[0].astype(float).mean(-1)
    # The definition (ISO/IEC 14496-12, 6.2.2): (x, y) goes to (a x + c y, b x + d y), moved back into the quadrant.
    y, x = np.mgrid[:H, :W]
    to_x, to_y = a * x + c * y, b * x + d * y
    right = np.zeros((H, W) if a else (W, H))
    right[to_y - to_y.min(), to_x - to_x.min()] = (grey - 16.0) * 255 / 219
    assert found.shape == right.shape == (probe(path).height, probe(path).width)
    assert np.abs(found - right).mean() < 3


@pytest.mark.parametrize("size, ratio, shown", [((576, 720), Fraction(64, 45), (576, 1024)),
                                                ((480, 720), Fraction(8, 9), (540, 720)),
                                                ((64, 64), Fraction(1000, 1), (64, 64))])  # damage
def test_pixels_become_square(tmp_path: Path, size: tuple[int, int], ratio: Fraction, shown: tuple[int, int]) -> None:
    half = np.zeros(size, np.uint8) + 16
    half[:, size[1] // 4:] = 235
    chroma = np.full((size[0] // 2, size[1] // 2), 128, np.uint8)
    path = write(tmp_path / "a.mkv", [half, chroma, chroma], "yuv420p", "libx264", sample_aspect_ratio=ratio)
    info, picture = probe(path), read_clip(path, 0, 1)[0]
    assert (info.height, info.width) == picture.shape[:2] == shown
    assert np.argmax(picture[shown[0] // 2, :, 0] > 127) == pytest.approx(shown[1] / 4, abs=2)
    assert bool(info.notes) == (shown != size)


def to_code(rgb: tuple[float, float, float], red: float, blue: float) -> tuple[int, int, int]:
    """Limited-range 8-bit YCbCr of RGB in [0, 1], by the weights of a matrix (ITU-T H.273)."""
    r, g, b = rgb
    y = red * r + (1 - red - blue) * g + blue * b
    code = 16 + 219 * y, 128 + 224 * (b - y) / (2 * (1 - blue)), 128 + 224 * (r - y) / (2 * (1 - red))
    return tuple(round(value) for value in code)  # type: ignore[return-value]


BT601, BT709, BT2020 = (.299, .114), (.2126, .0722), (.2627, .0593)


@pytest.mark.parametrize("height, tag, matrix", [(480, None, BT601), (576, None, BT601), (720, None, BT709),
                                                 (1080, None, BT709), (720, 5, BT601), (240, 1, BT709)])
@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
def test_colour_matrix_by_tag_or_by_size(tmp_path: Path, height: int, tag: int | None, codec: str,
                                             matrix: tuple[float, float]) -> None:
    colour = (.8, .3, .1)
    properties = {} if tag is None else {"colorspace": tag}
    path = write(tmp_path / "a.mkv", plain(height, 64, to_code(colour, *matrix)), "yuv444p", codec, **properties)
    assert np.abs(read_clip(path, 0, 1)[0].reshape(-1, 3).mean(0) - 255 * np.array(colour)).max() < 3


def srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= .0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - .055)


@pytest.mark.parametrize("transfer", ["PQ", "HLG"])
def test_hdr_is_tone_mapped(tmp_path: Path, transfer: str) -> None:
    """Greys: by the inverse curves of BT.2100 in the other direction; saturated ones keep their hue."""
    nits = np.array([0, 5, 26, 100, 203, 400, 1000])
    if transfer == "PQ":
        power = (nits / 10000) ** (2610 / 16384)
        signal = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    else:  # 1000 cd/m2 at peak: system gamma 1.2
        scene = (nits / 1000) ** (1 / 1.2)
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene),
                          .17883277 * np.log(np.maximum(12 * scene - .28466892, 1e-9)) + .55991073)
    columns = np.round(64 + 876 * signal).astype(np.uint16).repeat(8)[None].repeat(H, 0)
    neutral = np.full_like(columns, 512)
    trc = 16 if transfer == "PQ" else 18
    path = write(tmp_path / "a.mkv", [columns, neutral, neutral], "yuv444p10le", color_trc=trc, color_primaries=9,
                 colorspace=9, color_range=1)
    with VideoReader(path) as video:
        assert video.info.notes == (f"tone-mapped from {transfer}",)
        found = video.clip(0, 1)[0, 0, 4::8].astype(int)
    assert np.ptp(found, axis=1).max() <= 1  # grey stays grey
    levels = found[:, 1]
    assert (np.diff(levels) > 0).all() and levels[-1] >= 254 and levels[0] == 0
    dark = nits[1:4] / 203  # below the bend, light is kept, relative to reference white
    assert np.abs(levels[1:4] - 255 * srgb(dark)).max() <= 3
    assert .78 < levels[4] / 255 < .95


def moving(number: int) -> np.ndarray:
    """A white bar that moves, uint8 (96, 160)."""
    picture = np.full((96, 160), 30, np.uint8)
    picture[:, 20 + 6 * number:50 + 6 * number] = 220
    return picture


@needs_ffmpeg
@pytest.mark.parametrize("name, codec", [("a.ts", "mpeg2video -q:v 2 -flags +ilme+ildct -top 1"),
                                         ("a.mp4", "libx264 -x264-params tff=1 -crf 12")])
def test_interlaced_material_has_no_comb(tmp_path: Path, name: str, codec: str) -> None:
    fields = [moving(number) for number in range(24)]
    woven = [np.stack([fields[k][0::2], fields[k + 1][1::2]], 1).reshape(96, 160) for k in range(0, 24, 2)]
    raw = b"".join(picture.tobytes() for picture in woven)
    command = "ffmpeg -v error -f rawvideo -pix_fmt gray -s 160x96 -r 12 -i - -vf setfield=tff -pix_fmt yuv420p -c:v"
    subprocess.run([*command.split(), *codec.split(), str(tmp_path / name)], input=raw, check=True)
    with VideoReader(tmp_path / name) as video:
        assert video.info.notes == ("deinterlaced",)
        found = video.clip()
        assert np.array_equal(video.clip(.5, 1)[0], found[6])  # a picture does not depend on where reading began
    whole = np.stack([fields[k] for k in range(0, 24, 2)]).astype(float)
    for frame, right in zip(found.astype(float).mean(-1), whole, strict=True):
        assert np.abs(frame - right).mean() < 3
        assert np.abs(np.diff(frame, axis=0)).mean() < 4  # a comb has 190 along both edges of the bar


@needs_ffmpeg
@pytest.mark.parametrize("codec, second, notes", [
    ("h264", "-x264-params tff=1", ("deinterlaced",)), ("hevc", "-color_trc smpte2084", ("tone-mapped from PQ",)),
    ("h264", "-crf 30", ()), ("hevc", "-crf 30", ())])
def test_frames_that_change_midway_are_converted_one_by_one(tmp_path: Path, codec: str, second: str,
                                                             notes: tuple[str, ...]) -> None:
    """What headers prove to be of one kind is decord's; else each picture is converted as alone."""
    encoder = {"h264": "libx264", "hevc": "libx265 -x265-params log-level=none"}[codec]
    command = f"ffmpeg -v error -y -f lavfi -i testsrc2=s=160x96:r=8:d=1 -pix_fmt yuv420p -bf 0 -c:v {encoder}"
    whole, streams = tmp_path / "a.mp4", []
    for more in "", second:
        subprocess.run([*command.split(), *more.split(), str(tmp_path / f"one.{codec}")], check=True)
        streams.append((tmp_path / f"one.{codec}").read_bytes())
    (tmp_path / f"both.{codec}").write_bytes(b"".join(streams))
    subprocess.run(["ffmpeg", "-v", "error", "-r", "8", "-i", str(tmp_path / f"both.{codec}"), "-c", "copy",
                    str(whole)], check=True)
    with av.open(str(whole)) as container:
        alone = np.stack([FrameConverter(frame, None)(frame) for frame in container.decode(video=0)])
    with VideoReader(whole) as video:
        assert video._source.suits_decord == (not notes) and video.notes == ()
        found = video.clip()
        assert video.notes == notes and np.array_equal(video.clip(1.5, 1)[0], found[12])
    assert found.shape == (16, 96, 160, 3) and np.abs(found.astype(int) - alone).max() <= (0 if notes else 4)


@needs_ffmpeg
@pytest.mark.parametrize("name, codec", [("a.webm", "libvpx-vp9 -pix_fmt yuva420p -crf 10 -b:v 0"),
                                         ("a.mov", "prores_ks -profile:v 4444 -pix_fmt yuva444p10le"),
                                         ("b.mov", "qtrle -pix_fmt argb"), ("a.png", "apng -pix_fmt rgba -f apng")])
def test_transparent_pixels_of_videos_show_white(tmp_path: Path, name: str, codec: str) -> None:
    rgba = np.zeros((4, 64, 96, 4), np.uint8)
    rgba[..., :3] = (200, 40, 40)
    rgba[:, :, 32:64, 3], rgba[:, :, 64:, 3] = 128, 255
    subprocess.run(["ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgba", "-s", "96x64", "-r", "8", "-i", "-",
                    "-c:v", *codec.split(), str(tmp_path / name)], input=rgba.tobytes(), check=True)
    with VideoReader(tmp_path / name) as video:
        assert video.info.notes == ("transparent pixels on white",)
        found = video.clip()
    assert found.shape == (4, 64, 96, 3)
    for column, right in (16, (255, 255, 255)), (48, (227, 147, 147)), (80, (200, 40, 40)):
        assert np.abs(found[:, 32, column].astype(int) - right).max() <= 4, column


def test_photos_with_alpha_and_of_16_bits(tmp_path: Path) -> None:
    rgba = np.zeros((4, 3, 4), np.uint8)
    rgba[..., :3], rgba[:, 1, 3], rgba[:, 2, 3] = (200, 40, 40), 128, 255
    for name in ("a.png", "a.webp"):
        Image.fromarray(rgba).save(tmp_path / name, lossless=True, exact=True)
        assert read_image(tmp_path / name)[0, 0].tolist() == [[255, 255, 255], [227, 147, 147], [200, 40, 40]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 255, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png")[0, 0].tolist() == [[255, 255, 255], [10, 20, 30]]
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png")[0, 0, :, 0].tolist() == [0, 1, 128, 255]


def test_colour_profiles_become_srgb(tmp_path: Path) -> None:
    """A wide-gamut red in its own profile is more than sRGB's; a colour inside both comes out as sRGB names it."""
    wide = ImageCms.ImageCmsProfile(str(make_wide_profile(tmp_path)))
    inside = np.full((8, 8, 3), (200, 90, 60), np.uint8)
    srgb_profile = ImageCms.createProfile("sRGB")
    as_wide = ImageCms.profileToProfile(Image.fromarray(inside), srgb_profile, wide)
    assert np.abs(np.asarray(as_wide)[0, 0].astype(int) - inside[0, 0]).max() > 10  # the numbers differ
    as_wide.save(tmp_path / "a.png", icc_profile=wide.tobytes())
    assert np.abs(read_image(tmp_path / "a.png")[0].astype(int) - inside).max() <= 2


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_animated_images_are_videos(tmp_path: Path, name: str) -> None:
    shades = [Image.fromarray(np.full((24, 40, 3), level, np.uint8)) for level in (10, 90, 170, 250)]
    shades[0].save(tmp_path / name, save_all=True, append_images=shades[1:], duration=[100, 300, 0, 200], loop=0,
                   **({"lossless": True} if name.endswith("webp") else {}))
    with VideoReader(tmp_path / name) as video:
        assert video.times.tolist() == pytest.approx([0, .1, .4, .5])  # 0 is .1 s, as in browsers
        assert video.info.duration == pytest.approx(.7)
        found = video.clip(0, 7, 10.0)[:, 12, 20, 0].astype(int)
        assert np.abs(found - [10, 90, 90, 90, 170, 250, 250]).max() <= 2
        assert abs(int(video.clip(.1, 1)[0, 0, 0, 0]) - 90) <= 2  # and back
    still = Image.fromarray(np.zeros((24, 40, 3), np.uint8))
    still.save(tmp_path / f"still-{name}")
    if not name.endswith("gif"):
        assert read_image(tmp_path / f"still-{name}").shape == (1, 24, 40, 3)


def make_wide_profile(folder: Path) -> Path:
    """A matrix profile with Display P3's primaries and a gamma of 2.2, by the ICC's format (ICC.1:2010)."""

    def fixed(value: float) -> bytes:
        return round(value * 65536).to_bytes(4, "big", signed=True)

    # Columns: XYZ under D50 of Display P3's primaries.
    primaries = {b"rXYZ": (.51512, .24120, -.00105), b"gXYZ": (.29198, .69225, .04189),
                 b"bXYZ": (.15710, .06657, .78407)}
    tags: dict[bytes, bytes] = {name: b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz)) for name, xyz in primaries.items()}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, (.9642, 1.0, .8249)))
    gamma = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(2.2 * 256).to_bytes(2, "big") + b"\0\0"
    tags |= {b"rTRC": gamma, b"gTRC": gamma, b"bTRC": gamma}
    text = b"desc\0\0\0\0" + (2).to_bytes(4, "big") + b"P\0" + bytes(4 + 4 + 2 + 1 + 67)
    tags |= {b"desc": text, b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + (offset + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    size = 132 + len(table) + len(body)
    header = (size.to_bytes(4, "big") + b"none" + bytes([2, 16, 0, 0]) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
              + bytes(28) + b"".join(map(fixed, (.9642, 1.0, .8249))) + bytes(48))
    path = folder / "wide.icc"
    path.write_bytes(header + len(tags).to_bytes(4, "big") + table + body)
    return path
