"""A small picture of what was uploaded. Read in a process of its own, as every stranger's file."""

from __future__ import annotations

import base64
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

SIDE = 160  # pixels at most
PATIENCE = 20.0  # seconds


@lru_cache(maxsize=32)
def thumbnail(path: Path, kind: str) -> str:
    """As a data URL; "" where none can be had: nothing else depends on it."""
    try:  # this file by itself: nothing of the app, and no gradio, is imported
        done = subprocess.run([sys.executable, "-P", __file__, str(path), kind], check=True, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"data:image/webp;base64,{base64.b64encode(done.stdout).decode()}"


def main() -> None:
    """In the other process: PATH KIND from the command line, WebP to stdout."""
    import av
    from PIL import Image

    path, kind = sys.argv[1:]
    if kind == "video":
        with open(path, "rb") as file, av.open(file, "r") as container:
            picture = next(container.decode(video=0)).to_image()
    else:
        picture = Image.open(path).convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    picture.save(sys.stdout.buffer, format="WEBP", quality=80)


if __name__ == "__main__":
    main()
