"""Videos in which each frame's number is drawn as bars, in many containers and codecs, by Debian's ffmpeg."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

BITS, BAR, HEIGHT = 10, 16, 96
WIDTH = BITS * BAR
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg") and not os.environ.get("ODVAE_REQUIRE_ALL"),
                                  reason="Debian's ffmpeg makes the files")


def draw(number: int) -> np.ndarray:
    """A frame, uint8 (H, W, 3): bits of the number from the left, white for 1, the same inverted in the lower half."""
    bits = np.array([(number >> bit) & 1 for bit in range(BITS)], np.uint8).repeat(BAR)
    top = np.broadcast_to(bits, (HEIGHT // 2, WIDTH))
    return np.repeat((np.concatenate([top, 1 - top]) * 255)[..., None], 3, axis=-1)


def read_number(frame: np.ndarray) -> int:
    """The number drawn into a frame (H, W, 3) of any size; -1 where the two halves do not agree."""
    height, width = frame.shape[:2]
    grey = frame.astype(np.float32).mean(-1)

    def bits(rows: slice) -> list[bool]:
        columns = np.array_split(np.arange(width), BITS)
        return [bool(grey[rows, c[len(c) // 4: -len(c) // 4 or None]].mean() > 127) for c in columns]

    upper, lower = bits(slice(height // 8, height * 3 // 8)), bits(slice(height * 5 // 8, height * 7 // 8))
    return sum(bit << k for k, bit in enumerate(upper)) if [not bit for bit in lower] == upper else -1


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the file; the suffix chooses the container.
        arguments: of ffmpeg's encoder and muxer.
        size: (width, height) that the format demands.
        rate: frames a second.
        passes: of the encoder; VP8 makes pictures that are never shown in the second.
        remux: arguments of a second ffmpeg that copies the streams, e.g. cuts them.
    """

    name: str
    arguments: str
    size: tuple[int, int] = (WIDTH, HEIGHT)
    remux: str = ""
    rate: int = 24
    passes: int = 1


X264, X265 = "-c:v libx264 -pix_fmt yuv420p -preset veryfast", "-c:v libx265 -pix_fmt yuv420p -preset ultrafast"
OPEN264 = f"{X264} -bf 3 -x264-params open-gop=1:keyint=48:scenecut=0"
CLOSED264 = f"{X264} -bf 3 -x264-params keyint=48:scenecut=0"
OPEN265 = f"{X265} -x265-params keyint=48:bframes=4:b-adapt=0:log-level=none"
CLOSED265 = f"{X265} -x265-params keyint=48:bframes=4:b-adapt=0:open-gop=0:log-level=none"
MPEG2 = "-c:v mpeg2video -q:v 3 -g 15 -bf 2"
MPEG4 = "-c:v mpeg4 -q:v 3 -g 40"
KINDS = (
    *(Kind(f"h264-closed.{suffix}", CLOSED264) for suffix in ("mp4", "mov", "mkv", "avi", "ts", "flv")),
    *(Kind(f"h264-open.{suffix}", OPEN264) for suffix in ("mp4", "mov", "mkv", "avi", "ts", "flv")),
    Kind("h264-no-b.avi", f"{X264} -bf 0 -g 48"),
    Kind("h264-refresh.mp4", f"{X264} -x264-params intra-refresh=1:keyint=48"),
    Kind("h264-refresh-no-b.mp4", f"{X264} -bf 0 -x264-params intra-refresh=1:keyint=48"),
    Kind("h264-refresh-no-b.ts", f"{X264} -bf 0 -x264-params intra-refresh=1:keyint=48"),
    Kind("h264-one-keyframe.mp4", f"{X264} -g 9999"),
    Kind("h264-yuv444.mp4", "-c:v libx264 -pix_fmt yuv444p -bf 2 -g 30"),
    Kind("h264.3gp", f"{CLOSED264} -f 3gp"),
    *(Kind(f"h265-closed.{suffix}", CLOSED265) for suffix in ("mp4", "mkv", "ts")),
    *(Kind(f"h265-open.{suffix}", OPEN265) for suffix in ("mp4", "mov", "mkv", "ts")),
    *(Kind(f"av1.{suffix}", "-c:v libaom-av1 -cpu-used 8 -row-mt 1 -g 48 -crf 30 -pix_fmt yuv420p")
      for suffix in ("mp4", "mkv", "webm")),
    Kind("vp8.webm", "-c:v libvpx -g 48 -auto-alt-ref 1 -lag-in-frames 16 -b:v 400k -cpu-used 5",
         passes=2),
    *(Kind(f"vp9.{suffix}", "-c:v libvpx-vp9 -g 48 -auto-alt-ref 1 -lag-in-frames 16 -b:v 400k -cpu-used 8")
      for suffix in ("webm", "mkv", "mp4")),
    *(Kind(f"mpeg1.{suffix}", "-c:v mpeg1video -q:v 3 -g 15 -bf 2") for suffix in ("mpg", "mkv", "avi")),
    *(Kind(f"mpeg2.{suffix}", MPEG2) for suffix in ("mpg", "ts", "mkv", "mp4", "avi")),
    Kind("mpeg2-interlaced.ts", f"{MPEG2} -flags +ilme+ildct -top 1"),
    Kind("mpeg2.vob", f"{MPEG2} -f vob"),
    *(Kind(f"mpeg4.{suffix}", f"{MPEG4}") for suffix in ("mp4", "avi", "mkv")),
    *(Kind(f"mpeg4-b.{suffix}", f"{MPEG4} -bf 2") for suffix in ("mp4", "avi", "mkv")),
    *(Kind(f"mpeg4-v3.{suffix}", "-c:v msmpeg4 -q:v 3 -g 40") for suffix in ("avi",)),
    *(Kind(f"wmv{v}.wmv", f"-c:v wmv{v} -q:v 3 -g 40") for v in (1, 2)),
    *(Kind(f"prores.{suffix}", "-c:v prores_ks -profile:v 0") for suffix in ("mov", "mkv")),
    *(Kind(f"mjpeg.{suffix}", "-c:v mjpeg -q:v 3 -pix_fmt yuvj420p") for suffix in ("avi", "mov", "mkv")),
    *(Kind(f"theora.{suffix}", "-c:v libtheora -q:v 8 -g 48") for suffix in ("ogv", "mkv")),
    Kind("sorenson.flv", "-c:v flv -q:v 3 -g 40"),
    Kind("h263.3gp", "-c:v h263 -q:v 3 -g 40", (176, 144)),
    Kind("qtrle.mov", "-c:v qtrle"),
    Kind("ffv1.mkv", "-c:v ffv1"),
    Kind("gif.gif", "", rate=25),
    Kind("h264-vfr.mp4", f"{CLOSED264} -vf select='gt(mod(n,7),2)' -vsync vfr"),
    Kind("h264-vfr-open.mkv", f"{OPEN264} -vf select='gt(mod(n,7),2)' -vsync vfr"),
    Kind("h265-vfr-open.mp4", f"{OPEN265} -vf select='gt(mod(n,11),4)' -vsync vfr"),
    Kind("h264-edit-list.mp4", CLOSED264, remux="-ss 1.7 -i {} -c copy"),
    Kind("h264-edit-list-open.mov", OPEN264, remux="-ss 2.9 -i {} -c copy"),
    Kind("h265-edit-list.mp4", OPEN265, remux="-ss 3.3 -i {} -c copy"),
    Kind("h264-late.mp4", OPEN264, remux="-itsoffset 7.3 -i {} -c copy"),
    Kind("h264-late.mkv", OPEN264, remux="-itsoffset 7.3 -i {} -c copy"),
    Kind("h264-late.ts", OPEN264, remux="-i {} -c copy -muxdelay 0 -output_ts_offset 95440"),  # the clock wraps round
    Kind("h264-negative.mkv", OPEN264, remux="-itsoffset -2 -i {} -c copy -avoid_negative_ts disabled"),
    Kind("h264-open-cut.ts", OPEN264, remux="-ss 4 -i {} -c copy -copyinkf"),
    Kind("h265-open-cut.ts", OPEN265, remux="-ss 4 -i {} -c copy"),
    Kind("h265-open-cut.mkv", OPEN265, remux="-ss 4 -i {} -c copy"),
    Kind("mpeg2-open-cut.ts", MPEG2, remux="-ss 4 -i {} -c copy"),
    Kind("h264-fragmented.mp4", OPEN264, remux="-i {} -c copy -movflags frag_keyframe+empty_moov"),
    Kind("h264-audio.mp4", f"-f lavfi -i sine -shortest -c:a aac {OPEN264}"),
    Kind("h264-audio.ts", f"-f lavfi -i sine -shortest -c:a mp2 {OPEN264}"),
    Kind("mpeg2-audio.mpg", f"-f lavfi -i sine -shortest -c:a mp2 {MPEG2}"),
)


def write(folder: Path, kind: Kind, frames: int = 480) -> Path:
    """Make a file of this kind with `frames` frames numbered from 0."""
    target = folder / kind.name
    first = folder / f"first-{kind.name}" if kind.remux else target
    pixels = b"".join(draw(number).tobytes() for number in range(frames))
    before = f"ffmpeg -v error -y -f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {kind.rate} -i -".split()
    encode = [*before, *kind.arguments.split(), "-s", "{}x{}".format(*kind.size)]
    for number in range(1, kind.passes):
        log = ["-pass", str(number), "-passlogfile", str(folder / kind.name), "-f", "null", "-"]
        subprocess.run([*encode, *log], input=pixels, check=True)
    last = ["-pass", str(kind.passes), "-passlogfile", str(folder / kind.name)] if kind.passes > 1 else []
    subprocess.run([*encode, *last, str(first)], input=pixels, check=True)
    if kind.remux:
        head, tail = kind.remux.split("{}")
        copy = ["ffmpeg", "-v", "error", "-y", *head.split(), str(first), *tail.split(), str(target)]
        subprocess.run(copy, check=True)
        first.unlink()
    return target
