"""Thumbnails of uploads, made in a process of their own, as for every untrusted file."""

from __future__ import annotations

import base64
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

SIDE = 160  # pixels at most
TIMEOUT = 20.0  # seconds


@lru_cache(maxsize=32)
def thumbnail(path: Path, kind: str) -> str:
    """Return a thumbnail as a data URL, "" if none can be made."""
    try:  # runs this file as a script, so that neither the app nor gradio is imported
        process = subprocess.run([sys.executable, "-P", __file__, str(path), kind], check=True,
                                 stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"data:image/webp;base64,{base64.b64encode(process.stdout).decode()}"


def main() -> None:
    """Read PATH and KIND from the command line and write WebP to stdout."""
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
