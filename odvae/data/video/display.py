"""Convert decoded frames to what a viewer shows: upright, with square pixels, deinterlaced, opaque, in sRGB's range."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

BACKGROUND = 255  # behind transparent pixels: white, as in a browser
HD_LINES = 720  # from this height on, players assume BT.709 for untagged files
MAX_ASPECT_RATIO = 8  # a larger sample aspect ratio is damage
HDR = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}
MATRICES = {1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601,
            7: Colorspace.SMPTE240M, 9: Colorspace.BT2020, 10: Colorspace.BT2020}  # by ITU-T H.273, MatrixCoefficients
WHITE, PEAK = 203.0, 1000.0  # cd/m2: HDR reference white (ITU-R BT.2408); what becomes SDR's white


class FrameConverter:
    """Converts the frames of one stream to RGB pictures of one size.

    Args:
        first: the first frame.
        sample_aspect_ratio: width to height of a pixel; None for square.

    Attributes:
        height, width: of the pictures, in pixels. Non-square pixels are enlarged along their shorter side, so that
            nothing is lost.
        plain: the first frame needs no conversion beyond the BT.601 or BT.709 matrix that the file names, as any
            decoder applies.
        notes: conversions applied to the frames so far, the first included, to show to the user.
    """

    def __init__(self, first: av.VideoFrame, sample_aspect_ratio: Fraction | None) -> None:
        ratio = sample_aspect_ratio or Fraction(1)
        if not Fraction(1, MAX_ASPECT_RATIO) <= ratio <= MAX_ASPECT_RATIO:
            ratio = Fraction(1)
        self._size = (round(first.height / min(float(ratio), 1)), round(first.width * max(float(ratio), 1)))
        self._flip_x, self._flip_y, self._transpose = _orientation(first)
        self.height, self.width = self._size[::-1] if self._transpose else self._size
        self._lines = first.height
        self._reformatter = VideoReformatter()
        self.plain = (self._size == (first.height, first.width) and first.color_trc not in HDR and not has_alpha(first)
                      and not any((self._flip_x, self._flip_y, self._transpose, first.interlaced_frame))
                      and (first.height < HD_LINES or first.colorspace in MATRICES))
        self.notes = _conversions(first)
        if ratio != 1:
            self.notes += (f"shown at {self.width}x{self.height}, its pixels are not square",)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a frame to uint8 (H, W, 3)."""
        self.notes += tuple(note for note in _conversions(frame) if note not in self.notes)
        if frame.interlaced_frame:
            frame = deinterlace(frame)
        if frame.color_trc in HDR:
            picture = tone_map(self._rgb(frame, "rgb48le"), HDR[frame.color_trc], frame.color_primaries)
        elif has_alpha(frame):
            picture = composite(self._rgb(frame, "rgba"))
        else:
            picture = self._rgb(frame, "rgb24")
        if self._transpose:
            picture = picture.swapaxes(0, 1)
        return np.ascontiguousarray(picture[::-1 if self._flip_y else 1, ::-1 if self._flip_x else 1])

    def _rgb(self, frame: av.VideoFrame, pixel_format: str) -> np.ndarray:
        """Convert to RGB at the first frame's size, as FFmpeg's players do if a stream changes its size midway."""
        default = Colorspace.ITU709 if self._lines >= HD_LINES else Colorspace.ITU601
        matrix = MATRICES.get(frame.colorspace, default)
        height, width = self._size
        return self._reformatter.reformat(frame, width, height, pixel_format, src_colorspace=matrix,
                                          dst_color_range=ColorRange.JPEG, threads=1).to_ndarray()


def _conversions(frame: av.VideoFrame) -> tuple[str, ...]:
    """Return notes on the conversions of a frame, except its size."""
    return tuple(note for note, applies in (("deinterlaced", frame.interlaced_frame),
                                            (f"tone-mapped from {HDR.get(frame.color_trc)}", frame.color_trc in HDR),
                                            ("transparent pixels on white", has_alpha(frame))) if applies)


def has_alpha(frame: av.VideoFrame) -> bool:
    """Return whether some pixels may be transparent."""
    name = frame.format.name
    return name == "pal8" or any(component.is_alpha for component in frame.format.components)


def composite(pixels: np.ndarray) -> np.ndarray:
    """Blend uint8 (..., 4), with straight alpha, over a plain `BACKGROUND` -> (..., 3)."""
    if (pixels[..., 3] == 255).all():
        return pixels[..., :3]
    alpha = pixels[..., 3:].astype(np.uint32)
    return ((pixels[..., :3] * alpha + BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return (flip left to right, flip top to bottom, swap rows and columns first) of the display matrix.

    The matrix maps a pixel (x, y) to (a x + c y, b x + d y), in 16.16 fixed point: the rotations by quarter turns and
    mirrors are the eight matrices with one entry in each row and column.
    """
    data = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return a < 0, d < 0, False
    return c < 0, b < 0, True


def deinterlace(frame: av.VideoFrame) -> av.VideoFrame:
    """Keep the first field and interpolate the other's lines along edges (FFmpeg's estdif).

    It uses one frame alone, so that a picture does not depend on where reading began.
    """
    graph = av.filter.Graph()
    graph.link_nodes(graph.add_buffer(template=None, width=frame.width, height=frame.height, format=frame.format,
                                      time_base=frame.time_base),
                     graph.add("estdif", "mode=frame:deint=all"), graph.add("buffersink")).configure()
    graph.push(frame)
    graph.push(None)
    output = graph.pull()
    assert isinstance(output, av.VideoFrame)
    return output


def tone_map(pixels: np.ndarray, transfer: str, primaries: int) -> np.ndarray:
    """Tone-map full-range PQ or HLG to SDR in sRGB's primaries.

    Reference white (203 cd/m2, ITU-R BT.2408) becomes .8 of SDR's; brighter light, up to 1000 cd/m2, is rolled off to
    its white by the brightest channel, so that hues stay.

    Args:
        pixels: uint16 (H, W, 3).
        transfer: "PQ" (SMPTE ST 2084) or "HLG" (ITU-R BT.2100).
        primaries: as ITU-T H.273 numbers them; BT.2020 (9) is converted.
    """
    light = _linear(transfer)[pixels]  # 1 is reference white
    if transfer == "HLG":
        # The display's system gamma 1.2, on luminance (BT.2100, table 5).
        luma = light @ np.array([.2627, .6780, .0593], np.float32)
        light *= (PEAK / WHITE) * np.maximum(luma, 1e-6)[..., None] ** .2
    if primaries == int(ColorPrimaries.BT2020):
        light = light @ BT2020_TO_BT709.T
    light = np.maximum(light, 0)
    brightest = light.max(-1, keepdims=True)
    light *= roll_off(brightest) / np.maximum(brightest, 1e-6)
    return _encoded()[np.minimum(light * 4095 + .5, 4095).astype(np.uint16)]


BT2020_TO_BT709 = np.array([[1.6605, -.5876, -.0728], [-.1246, 1.1329, -.0083], [-.0182, -.1006, 1.1187]],
                           np.float32)  # ITU-R BT.2407


def roll_off(light: np.ndarray) -> np.ndarray:
    """Map light relative to reference white to SDR's white: linearly up to `KNEE`, then compressed so that PEAK is
    1."""
    top = PEAK / WHITE
    x = np.clip((light - KNEE) / (top - KNEE), 0, 1)
    # A rational curve through (0, KNEE) with slope 1 and (1, 1).
    slope = (top - KNEE) / (1 - KNEE)
    return np.where(light <= KNEE, light, KNEE + (1 - KNEE) * x * slope / (1 + x * (slope - 1))).astype(np.float32)


KNEE = .6


@cache
def _linear(transfer: str) -> np.ndarray:
    """Return light by code value, (65536,) float32: of PQ relative to reference white, of HLG to the scene's peak."""
    code = np.arange(65536) / 65535
    if transfer == "PQ":
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = code ** (1 / m2)
        return (10000 / WHITE * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)).astype(np.float32)
    a = .17883277
    b, c = 1 - 4 * a, .5 - a * math.log(4 * a)
    return np.where(code <= .5, code ** 2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


@cache
def _encoded() -> np.ndarray:
    """Return sRGB's code value by light, (4096,) uint8."""
    light = np.arange(4096) / 4095
    code = np.where(light <= .0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - .055)
    return np.round(code * 255).astype(np.uint8)
