"""H.264's sequence parameter sets, written by ITU-T H.264, 7.3.2.1.1 and E.1, and read again."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from odvae.data.video.bitstream import is_uniform

MAIN, HIGH, HIGH_444 = 77, 100, 244
PLAIN: dict[str, Any] = {
    "profile": HIGH, "chroma": 1, "scaling": False, "order": 0, "cycle": [], "progressive": True, "crop": None,
    "vui": True, "aspect": None, "overscan": False, "signal": None, "chroma_location": None, "timing": False,
    "nal_hrd": None, "vcl_hrd": None, "pic_struct": False}
NUMBERS = st.integers(0, 300)
FIELDS = st.fixed_dictionaries({
    "profile": st.sampled_from([MAIN, HIGH, HIGH_444]), "chroma": st.integers(0, 3), "scaling": st.booleans(),
    "order": st.integers(0, 2), "cycle": st.lists(NUMBERS, max_size=3), "progressive": st.booleans(),
    "crop": st.none() | st.tuples(*[NUMBERS] * 4), "vui": st.booleans(), "aspect": st.sampled_from([None, 1, 255]),
    "overscan": st.booleans(), "signal": st.none() | st.booleans(), "chroma_location": st.none() | NUMBERS,
    "timing": st.booleans(), "nal_hrd": st.none() | st.lists(NUMBERS, min_size=1, max_size=3),
    "vcl_hrd": st.none() | st.lists(NUMBERS, min_size=1, max_size=3), "pic_struct": st.booleans()})


class BitWriter:
    def __init__(self) -> None:
        self.bits = ""

    def put(self, value: int, count: int = 1) -> None:
        self.bits += f"{int(value):0{count}b}"

    def golomb(self, *values: int) -> None:
        for value in values:
            digits = f"{value + 1:b}"
            self.bits += "0" * (len(digits) - 1) + digits

    def optional(self, value: Any) -> bool:
        """Write whether a part follows."""
        self.put(value is not None and value is not False)
        return value is not None and value is not False

    def unit(self) -> bytes:
        """A NAL unit of type 7, with a stop bit and emulation prevention."""
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        data, zeros = bytearray([0x67]), 0
        for byte in int(bits, 2).to_bytes(len(bits) // 8, "big"):
            if zeros >= 2 and byte <= 3:
                data.append(3)
                zeros = 0
            data.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return bytes(data)


def write_hrd(writer: BitWriter, buffers: list[int] | None) -> None:
    if writer.optional(buffers) and buffers:
        writer.golomb(len(buffers) - 1)
        writer.put(0x5A, 8)
        for rate in buffers:
            writer.golomb(rate, 300 - rate)
            writer.put(1)
        writer.put(0x5A5A5, 20)


def write_vui(writer: BitWriter, fields: dict[str, Any]) -> None:
    if writer.optional(fields["aspect"]):
        writer.put(fields["aspect"], 8)
        if fields["aspect"] == 255:
            writer.put(0x00280021, 32)
    if writer.optional(fields["overscan"]):
        writer.put(1)
    writer.put(fields["signal"] is not None)
    if fields["signal"] is not None:
        writer.put(0b1010, 4)
        if writer.optional(fields["signal"]):
            writer.put(0x010101, 24)
    if writer.optional(fields["chroma_location"]):
        writer.golomb(fields["chroma_location"], 2)
    if writer.optional(fields["timing"]):
        writer.put((1 << 64) | (50 << 1) | 1, 65)
    write_hrd(writer, fields["nal_hrd"])
    write_hrd(writer, fields["vcl_hrd"])
    if fields["nal_hrd"] or fields["vcl_hrd"]:
        writer.put(0)
    writer.put(fields["pic_struct"])
    writer.put(0)


def parameter_set(fields: dict[str, Any]) -> bytes:
    writer = BitWriter()
    writer.put(fields["profile"], 8)
    writer.put(40, 16)
    writer.golomb(0)
    if fields["profile"] != MAIN:
        writer.golomb(fields["chroma"])
        if fields["chroma"] == 3:
            writer.put(0)
        writer.golomb(0, 2)
        writer.put(0)
        writer.put(fields["scaling"])
        if fields["scaling"]:
            writer.put(0, 8 if fields["chroma"] != 3 else 12)  # no list is present
    writer.golomb(5, fields["order"])
    if fields["order"] == 0:
        writer.golomb(2)
    elif fields["order"] == 1:
        writer.put(1)
        writer.golomb(3, 0, len(fields["cycle"]), *fields["cycle"])
    writer.golomb(4)
    writer.put(0)
    writer.golomb(119, 67)
    writer.put(fields["progressive"])
    if not fields["progressive"]:
        writer.put(1)
    writer.put(1)
    if writer.optional(fields["crop"]):
        writer.golomb(*fields["crop"])
    writer.put(fields["vui"])
    if fields["vui"]:
        write_vui(writer, fields)
    return writer.unit()


@given(FIELDS)
@example(PLAIN)
@example(PLAIN | {"pic_struct": True})
@example(PLAIN | {"progressive": False})
@example(PLAIN | {"order": 1, "cycle": [1, 2], "nal_hrd": [7], "vcl_hrd": [1, 2]})
@settings(max_examples=300, deadline=None)
def test_a_stream_is_progressive_by_its_parameter_set(fields: dict[str, Any]) -> None:
    is_parsed = fields["profile"] == MAIN or not fields["scaling"]  # scaling matrices are taken for interlaced
    marked = fields["vui"] and fields["pic_struct"]
    assert is_uniform({parameter_set(fields)}, "h264") == (is_parsed and fields["progressive"] and not marked)


@given(FIELDS, st.data())
@settings(max_examples=100, deadline=None)
def test_a_parameter_set_that_is_cut_off_says_nothing_wrong(fields: dict[str, Any], data: st.DataObject) -> None:
    """A frame is decoded and looked at where the header is damaged: no exception, and never progressive if the whole
    is not."""
    whole = parameter_set(fields)
    part = whole[:data.draw(st.integers(0, len(whole) - 1))]
    assert is_uniform({part}, "h264") in (False, is_uniform({whole}, "h264"))


def test_two_formats_or_none_are_not_uniform() -> None:
    sets = {parameter_set(PLAIN), parameter_set(PLAIN | {"crop": (0, 0, 0, 4)})}
    assert not is_uniform(sets, "h264") and not is_uniform(set(), "h264") and not is_uniform({b"@\1"}, "hevc")
