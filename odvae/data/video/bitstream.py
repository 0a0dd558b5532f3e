"""Read properties of a video stream's frames from its headers and keyframes, without decoding."""

from __future__ import annotations

import io
from collections.abc import Iterator

import av

SPS = {"h264": 7, "hevc": 33}  # nal_unit_type of the sequence parameter set
# H.264's profiles whose SPS has chroma_format_idc
PROFILES_WITH_CHROMA = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}


def is_random_access_point(packet: memoryview, codec: str) -> bool:
    """Return whether a keyframe's packet, of MP4 or Matroska, needs no earlier frame. H.264 also marks recovery points
    as keyframes: frames from which decoding converges (`intra-refresh`, open GOPs). True for other codecs."""
    if codec not in SPS:
        return True
    return any(kind == 5 if codec == "h264" else 16 <= kind <= 21  # IDR; IRAP
               for kind, _ in _nal_units(packet, codec))


def formats_in_packet(packet: av.Packet, codec: str) -> set[bytes]:
    """Return the bytes of a keyframe's packet, of MP4 or Matroska, that describe its frames' size, colours and fields;
    empty if it, or the codec, has none."""
    data = memoryview(packet)
    if codec == "vp9":  # the uncompressed header, up to the size
        return {bytes(data[:8])}
    if codec not in SPS:
        return set()
    formats = {bytes(unit) for kind, unit in _nal_units(data, codec) if kind == SPS[codec]}
    if packet.has_sidedata("new_extradata"):  # MP4 may have several headers
        formats |= formats_in_header(bytes(packet.get_sidedata("new_extradata")), codec)
    return formats


def formats_in_header(header: bytes, codec: str) -> set[bytes]:
    """Return the same from a stream's header (avcC and hvcC, ISO 14496-15)."""
    formats: set[bytes] = set()
    if codec not in SPS:
        return formats
    file = io.BytesIO(header)

    def number(size: int) -> int:
        return int.from_bytes(file.read(size), "big")

    file.seek(5 if codec == "h264" else 22)
    for _ in range(1 if codec == "h264" else number(1)):
        kind, count = (SPS["h264"], number(1) & 0x1F) if codec == "h264" else (number(1) & 0x3F, number(2))
        units = [file.read(number(2)) for _ in range(count)]
        formats.update(units if kind == SPS[codec] else ())
    return formats


def is_uniform(formats: set[bytes], codec: str) -> bool:
    """Return whether all frames of a stream with these formats certainly have the first one's format, and none is
    interlaced unless it is."""
    if codec not in SPS:
        return len(formats) <= 1
    return len(formats) == 1 and all(_is_progressive(sps, codec) for sps in formats)


def _nal_units(packet: memoryview, codec: str) -> Iterator[tuple[int, memoryview]]:
    """Yield (nal_unit_type, bytes) of length-prefixed NAL units."""
    offset = 0
    while offset + 4 < len(packet):
        kind = packet[offset + 4] & 0x1F if codec == "h264" else packet[offset + 4] >> 1 & 0x3F
        size = int.from_bytes(packet[offset:offset + 4], "big")
        yield kind, packet[offset + 4:offset + 4 + size]
        offset += 4 + size


def _is_progressive(sps: bytes, codec: str) -> bool:
    """Return whether a sequence parameter set excludes frames that are interlaced, or marked so by an SEI message."""
    data = sps.replace(b"\0\0\3", b"\0\0")
    try:
        # HEVC: general_frame_only_constraint_flag (ITU-T H.265, 7.3.3).
        return bool(data[8] & 0x10) if codec == "hevc" else _h264_is_progressive(_Bits(data[1:]))
    except (IndexError, ValueError):  # damaged
        return False


def _h264_is_progressive(bits: _Bits) -> bool:
    """Evaluate frame_mbs_only_flag and pic_struct_present_flag, skipping the fields before (ITU-T H.264, 7.3.2.1.1 and
    E.1.1)."""
    profile, _, _ = bits.take(8), bits.take(16), bits.golomb()
    if profile in PROFILES_WITH_CHROMA:
        chroma = bits.golomb()
        if chroma == 3:
            bits.take(1)
        bits.golomb(2)
        bits.take(1)
        if bits.take(1):
            return False  # custom scaling matrices: rare, not parsed here
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
    return not bits.take(1) or not _has_pic_struct(bits)


def _has_pic_struct(bits: _Bits) -> bool:
    """Return pic_struct_present_flag of H.264's video usability information: whether SEI messages give pic_struct."""
    if bits.take(1) and bits.take(8) == 255:  # sample aspect ratio
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
    buffers = _skip_hrd_parameters(bits) + _skip_hrd_parameters(bits)
    if buffers:
        bits.take(1)
    return bool(bits.take(1))


def _skip_hrd_parameters(bits: _Bits) -> int:
    """Skip hrd_parameters; returns the number of buffers they describe."""
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
    """Reads numbers bit by bit. Raises ValueError at the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def golomb(self, count: int = 1) -> int:
        """Read `count` numbers in Exp-Golomb code and return the last."""
        value = 0
        for _ in range(count):
            zeros = 0
            while not self.take(1):
                zeros += 1
            value = (1 << zeros) - 1 + self.take(zeros)
        return value
