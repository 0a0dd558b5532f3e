"""The training manifests of the shipped OD-VAE for natural footage (`natural_footage.py`) with rendered clips.

`python benchmarks/natural_manifests.py NATURAL RENDERED` writes NATURAL/images.csv and NATURAL/videos.csv, whose first
rows are the held-out clips. Training samples at 8 frames per second, as the LVDM does; of every filmed shot there is a
second copy, in NATURAL/slow, that plays its own frames at that rate, so that the VAE also sees footage at its own pace.
Camera moves over photos exist only at that pace.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from random import Random

from odvae.data.video.reader import probe

RATE, SPAN = 8, 2.2  # frames per second; seconds per row, 17 frames at that rate
Row = tuple[Path, float | str, float | str]


def spans(path: Path, count: int) -> list[Row]:
    """Return at most `count` random spans of a shot; a shorter shot whole."""
    duration = probe(path).duration
    starts = [i * SPAN for i in range(max(1, int(duration // SPAN)))]
    Random(path.name).shuffle(starts)
    return [(path, round(start, 3), round(min(duration, start + SPAN), 3)) for start in sorted(starts[:count])]


def slowed(path: Path, folder: Path) -> Path:
    """Return a copy of the shot that plays all of its frames at `RATE`."""
    target = folder / path.name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        slower = f"setpts=PTS*{probe(path).frame_rate / RATE}"
        subprocess.run(["ffmpeg", "-v", "error", "-i", str(path), "-vf", slower, "-r", str(RATE), "-crf", "10",
                        str(target)], check=True)
    return target


def write(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "start", "end"), *((str(path.resolve()), *span) for path, *span in rows)])


def main() -> None:
    natural, rendered = map(Path, sys.argv[1:3])

    def clips(folder: Path) -> list[Path]:
        return sorted(folder.glob("*.mp4"))

    held = [row for clip in clips(natural / "held") for row in spans(clip, 2)]
    filmed = [row for clip in clips(natural / "video") for row in
              spans(clip, 5) + spans(slowed(clip, natural / "slow"), 6)]
    moves: list[Row] = [(slowed(clip, natural / "slow"), 0, "") for clip in clips(natural / "moves")]
    photos: list[Row] = [(photo, "", "") for photo in sorted((natural / "photos").iterdir())]
    scenes: list[Row] = [(clip, 0, 4.1) for clip in clips(rendered)[:400]]
    write(natural / "videos.csv", held + filmed + moves + scenes)
    write(natural / "images.csv", held + filmed[::2] + photos + scenes[:200])
    print(f"{len(held)} rows held out, {len(filmed)} filmed, {len(moves)} camera moves, {len(photos)} photos, "
          f"{len(scenes)} rendered; held_out={len(held)}")


if __name__ == "__main__":
    main()
