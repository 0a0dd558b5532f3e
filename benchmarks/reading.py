"""How fast and how exactly is video read, and in how much memory? Ours against PyAV alone, decord and torchcodec.

    python benchmarks/reading.py speed     # ms per random 17-frame clip at stride 2, and sequential frames per second
    python benchmarks/reading.py exact     # share of frames that are the one shown at their time, by kind of file
    python benchmarks/reading.py memory    # MiB that a span of 1080p takes at 64x64, for 10 to 60 s

One thread. ffmpeg writes the files. torchcodec is measured if it is installed (pip install torchcodec; it needs
ffmpeg's libraries), in its exact mode.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import interleaved, record, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before it: tests/odvae is no package of ours

from numbered import KINDS, read_number, write

from odvae.data.transforms import resize_crop
from odvae.data.video.reader import VideoReader, read_clip
from odvae.utils.progress import track

Indices = list[int]
FILES = {"1080p, GOPs of 2 s, open": (1920, 1080, "-x264-params open-gop=1:keyint=48"),
         "720p, GOPs of 2 s": (1280, 720, "-g 48"), "720p, 1 keyframe": (1280, 720, "-g 9999"),
         "480x270, GOPs of 2 s": (480, 270, "-g 48")}

SEQUENTIAL, LONG = 48, 10  # frames read in sequence; seconds of a file
PATIENCE = 600  # s that a reader may take for a file


def ours(path: Path) -> Callable[[Indices], np.ndarray]:
    """As `VideoReader` reads: by PyAV where decord must not or cannot."""
    video = VideoReader(path)

    def read(indices: Indices) -> np.ndarray:
        found = video._read_by_decord(np.array(indices))
        return np.stack([video._read_by_pyav(index) for index in indices]) if found is None else found

    return read


def ours_by_pyav(path: Path) -> Callable[[Indices], np.ndarray]:
    video = VideoReader(path)
    return lambda indices: np.stack([video._read_by_pyav(rank) for rank in indices])


def decord(path: Path) -> Callable[[Indices], np.ndarray]:
    import decord as library

    library.logging.set_level(library.logging.QUIET)
    reader = library.VideoReader(str(path), num_threads=1)
    return lambda indices: reader.get_batch(indices).asnumpy()


def torchcodec(path: Path) -> Callable[[Indices], np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return lambda indices: decoder.get_frames_at(indices).data.numpy()


READERS = {"ours": ours, "ours, PyAV alone": ours_by_pyav, "decord2": decord,
           **({"torchcodec": torchcodec} if importlib.util.find_spec("torchcodec") else {})}


def film(path: Path, width: int, height: int, arguments: str, seconds: int = 20, rate: int = 24) -> Path:
    """Write moving noise over a test pattern, which compresses about like natural footage."""
    source = f"testsrc2=s={width}x{height}:r={rate}:d={seconds},noise=alls=12:allf=t"
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-c:v", "libx264", "-preset", "ultrafast",
                    "-pix_fmt", "yuv420p", *arguments.split(), str(path)], check=True)
    return path


def speed(folder: Path) -> None:
    rows, figures = [], []
    for name, (width, height, arguments) in track(FILES.items(), "files"):
        path = film(folder / f"{len(rows)}.mp4", width, height, arguments, LONG)
        starts = np.random.default_rng(0).integers(0, LONG * 24 - 34, 2)
        clips = [list(range(int(start), int(start) + 34, 2)) for start in starts]
        readers = {reader: make(path) for reader, make in READERS.items()}

        def random_clips(read: Callable[[Indices], np.ndarray]) -> None:
            for clip in clips:  # noqa: B023
                read(clip)

        def sequential(read: Callable[[Indices], np.ndarray]) -> None:
            for first in range(0, SEQUENTIAL, 16):
                read(list(range(first, first + 16)))

        clip = interleaved({reader: functools.partial(random_clips, read) for reader, read in readers.items()})
        order = interleaved({reader: functools.partial(sequential, read) for reader, read in readers.items()})
        row = {reader: (1000 * clip[reader] / len(clips), SEQUENTIAL / order[reader]) for reader in readers}
        rows.append([name, *(f"{ms:.0f} / {fps:.0f}" for ms, fps in row.values())])
        figures.append({"file": name, **{reader: {"ms_a_clip": ms, "frames_a_second": fps}
                                         for reader, (ms, fps) in row.items()}})
    table(["ms per random clip / sequential frames per second", *READERS], rows)
    record("speed of reading", {"seconds": LONG, "rate": 24}, figures)


def exact(folder: Path) -> None:
    """Read frames at 8 fps in consecutive clips of 17, as a build does; the reference is decoding in order."""
    import av

    readers = {name: make for name, make in READERS.items() if name != "ours, PyAV alone"}
    rows, figures = [], []
    for kind in track(KINDS, "kinds of file"):
        path = write(folder, kind)
        with av.open(str(path)) as container:
            numbers = np.array([read_number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])
        times = (numbers - numbers[0]) / kind.rate
        expected = np.searchsorted(times, np.arange(0, times[-1], 1 / 8) + 1e-3, "right") - 1
        shares = {name: in_a_fork(functools.partial(right_share, make, path, expected, numbers))
                  for name, make in readers.items()}
        rows.append([kind.name, *(f"{share:.1%}" if isinstance(share, float) else share for share in shares.values())])
        figures.append({"file": kind.name, **shares})
        path.unlink()
    table(["right frames", *readers], rows)
    record("frames that are right", {"frames": 480}, figures)


def right_share(make: Callable[[Path], Callable[[Indices], np.ndarray]], path: Path, expected: np.ndarray,
                numbers: np.ndarray) -> float:
    """Return the share of the expected frames that a reader gives."""
    read = make(path)
    frames = [read_number(frame) for first in range(0, len(expected), 17)
              for frame in read(expected[first:first + 17].tolist())]
    return float(np.mean(np.array(frames) == numbers[expected]))


def in_a_fork(measure: Callable[[], float]) -> float | str:
    """Return what a function returns in a process of its own, else what ended it: some libraries crash or hang."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send(measure())
        except Exception as error:  # libraries fail in many ways
            theirs.send(type(error).__name__)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(PATIENCE) else "hangs"
    except EOFError:
        return "crashes"
    finally:
        process.kill()
        process.join()


def memory(folder: Path) -> None:
    path = film(folder / "a.mp4", 1920, 1080, "-g 48", seconds=62)
    rows = []
    for seconds in (10, 30, 60):
        command = [sys.executable, __file__, "peak", str(path), str(seconds)]
        rows.append([seconds, float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)])
    table(["seconds of 1080p at 64x64", "MiB"], rows)
    record("memory of reading", {"size": 64, "frame_rate": 8}, [{"seconds": s, "mib": mib} for s, mib in rows])


def peak(path: Path, seconds: int) -> float:
    """Return the MiB that reading a span adds to this process."""

    def high_water() -> float:  # VmHWM, not ru_maxrss, which includes the peak of the parent process
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    read_clip(path, 0, 2, 8.0, functools.partial(resize_crop, height=64, width=64))  # load libraries
    before = high_water()
    read_clip(path, 0, 8 * seconds, 8.0, functools.partial(resize_crop, height=64, width=64))
    return high_water() - before


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        print(peak(Path(sys.argv[2]), int(sys.argv[3])))
        return
    with tempfile.TemporaryDirectory() as folder:
        {"speed": speed, "exact": exact, "memory": memory}[sys.argv[1]](Path(folder))


if __name__ == "__main__":
    main()
