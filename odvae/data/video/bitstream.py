"""What headers and keyframes of a video stream say of its pictures, without decoding them."""

from __future__ import annotations

import io
from collections.abc import Iterator

import av

SPS = {"h264": 7, "hevc": 33}  # the kind of NAL unit that says what the pictures after it are like
WITH_CHROMA = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}  # H.264's profiles whose SPS names it


def begins_anew(packet: memoryview, codec: str) -> bool:
    """Whether a keyframe's packet, of MP4 or Matroska, needs no picture before it. H.264 also marks recovery points:
    pictures from which decoding becomes right after a while (`intra-refresh`, open GOPs). True for other codecs."""
    if codec not in SPS:
        return True
    return any(kind == 5 if codec == "h264" else 16 <= kind <= 21  # IDR; an intra random access picture
               for kind, _ in _units(packet, codec))


def formats_in_packet(packet: av.Packet, codec: str) -> set[bytes]:
    """What a keyframe's packet, of MP4 or Matroska, says of its pictures' size, colours and fields; empty where it, or
    the codec, says nothing."""
    data = memoryview(packet)
    if codec == "vp9":  # the uncompressed header, as far as to the size
        return {bytes(data[:8])}
    if codec not in SPS:
        return set()
    found = {bytes(unit) for kind, unit in _units(data, codec) if kind == SPS[codec]}
    if packet.has_sidedata("new_extradata"):  # MP4 may have several headers
        found |= formats_in_header(bytes(packet.get_sidedata("new_extradata")), codec)
    return found


def formats_in_header(header: bytes, codec: str) -> set[bytes]:
    """What a stream's header says of that (avcC and hvcC, ISO 14496-15)."""
    found: set[bytes] = set()
    if codec not in SPS:
        return found
    file = io.BytesIO(header)

    def number(size: int) -> int:
        return int.from_bytes(file.read(size), "big")

    file.seek(5 if codec == "h264" else 22)
    for _ in range(1 if codec == "h264" else number(1)):
        kind, count = (SPS["h264"], number(1) & 0x1F) if codec == "h264" else (number(1) & 0x3F, number(2))
        units = [file.read(number(2)) for _ in range(count)]
        found.update(units if kind == SPS[codec] else ())
    return found


def is_uniform(formats: set[bytes], codec: str) -> bool:
    """Whether all pictures of a stream in these formats are known to be like the first, and none to be interlaced
    unless it is."""
    if codec not in SPS:
        return len(formats) <= 1
    return len(formats) == 1 and all(_is_progressive(sps, codec) for sps in formats)


def _units(packet: memoryview, codec: str) -> Iterator[tuple[int, memoryview]]:
    """(kind, bytes) of NAL units, each behind its length."""
    at = 0
    while at + 4 < len(packet):
        kind = packet[at + 4] & 0x1F if codec == "h264" else packet[at + 4] >> 1 & 0x3F
        size = int.from_bytes(packet[at:at + 4], "big")
        yield kind, packet[at + 4:at + 4 + size]
        at += 4 + size


def _is_progressive(sps: bytes, codec: str) -> bool:
    """Whether a sequence parameter set excludes pictures that are interlaced, or marked as such by a message."""
    data = sps.replace(b"\0\0\3", b"\0\0")
    try:
        # HEVC: general_frame_only_constraint_flag (ITU-T H.265, 7.3.3).
        return bool(data[8] & 0x10) if codec == "hevc" else _h264_is_progressive(_Bits(data[1:]))
    except (IndexError, ValueError):  # damaged
        return False


def _h264_is_progressive(bits: _Bits) -> bool:
    """By frame_mbs_only_flag and pic_struct_present_flag; what lies before them is passed over (ITU-T H.264, 7.3.2.1.1
    and E.1.1)."""
    profile, _, _ = bits.take(8), bits.take(16), bits.golomb()
    if profile in WITH_CHROMA:
        chroma = bits.golomb()
        if chroma == 3:
            bits.take(1)
        bits.golomb(2)
        bits.take(1)
        if bits.take(1):
            return False  # scaling matrices of its own: rare, and not read here
    bits.golomb()
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.take(1)
        bits.golomb(2)
        bits.golomb(bits.golomb())
    bits.golomb()
    bits.take(1)
    bits.golomb(2)
    if not bits.take(1):
        return False
    bits.take(1)
    if bits.take(1):
        bits.golomb(4)
    return not bits.take(1) or not _marks_pictures(bits)


def _marks_pictures(bits: _Bits) -> bool:
    """Of H.264's video usability information: whether messages say how pictures are to be shown."""
    if bits.take(1) and bits.take(8) == 255:  # the pixels' shape
        bits.take(32)
    if bits.take(1):
        bits.take(1)
    if bits.take(1):  # range and colours
        bits.take(4)
        if bits.take(1):
            bits.take(24)
    if bits.take(1):
        bits.golomb(2)
    if bits.take(1):  # timing
        bits.take(65)
    buffers = _pass_over_buffer(bits) + _pass_over_buffer(bits)
    if buffers:
        bits.take(1)
    return bool(bits.take(1))


def _pass_over_buffer(bits: _Bits) -> int:
    """Returns how many buffers are described."""
    if not bits.take(1):
        return 0
    count = bits.golomb() + 1
    bits.take(8)
    for _ in range(count):
        bits.golomb(2)
        bits.take(1)
    bits.take(20)
    return count


class _Bits:
    """Takes numbers from bytes, bit by bit. ValueError at the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def golomb(self, count: int = 1) -> int:
        """The last of `count` numbers in Exp-Golomb code."""
        value = 0
        for _ in range(count):
            zeros = 0
            while not self.take(1):
                zeros += 1
            value = (1 << zeros) - 1 + self.take(zeros)
        return value
