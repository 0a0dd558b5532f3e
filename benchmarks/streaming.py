"""Is memory constant with streaming, and what does streaming cost? The shipped OD-VAE; 64x64, float32.

Peak memory is that of a new process per row, minus that of a process that only loads the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from common import interleaved, record, table

from odvae import decode_stream, encode_stream
from odvae.inference.loading import load_vae
from odvae.weights import DEMO_VAE

SIZE, LENGTHS = 64, (17, 65, 257)


@torch.inference_mode()
def once(way: str, frames: int) -> None:
    """Encode and decode `frames` frames, generated on the fly so that the video itself takes no memory."""
    vae = load_vae(DEMO_VAE).eval()
    generator = torch.Generator().manual_seed(0)

    def chunks():
        for first in range(0, frames, 8):
            yield torch.rand(1, 3, min(8, frames - first), SIZE, SIZE, generator=generator) * 2 - 1

    if way == "streamed":
        for _ in decode_stream(vae, encode_stream(vae, chunks())):
            pass
    elif way == "whole":
        moments, _ = vae.encode_chunk(torch.cat(list(chunks()), 2))  # `encode` would stream by itself
        vae.decode_chunk(moments[:, : vae.latent_channels])


def peak(way: str, frames: int) -> float:
    """Return the peak memory of a new process in MiB."""
    out = subprocess.run([sys.executable, __file__, way, str(frames)], capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def main() -> None:
    if len(sys.argv) == 3:
        once(sys.argv[1], int(sys.argv[2]))
        # VmHWM, not ru_maxrss, which includes the peak of the parent process.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    base = peak("nothing", 17)
    rows = []
    for frames in LENGTHS:
        times = interleaved({way: lambda w=way, f=frames: once(w, f) for way in ("streamed", "whole")}, runs=3)
        rows.append([frames, peak("streamed", frames) - base, peak("whole", frames) - base,
                     frames / times["streamed"], frames / times["whole"]])
    headers = ["frames", "streamed MiB", "whole MiB", "streamed fps", "whole fps"]
    table(headers, rows)
    record("streaming memory and speed", {"size": SIZE}, [dict(zip(headers, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
