"""How does memory grow with the length of a video? Ours at the paper's width against diffusers' autoencoders at their
published widths; 256x256, float32, with each model's own options.

Nothing is computed: the models run on fake tensors, and the bytes of live ones are counted, without weights. Ours is a
stream whose chunks are freed; a peer's `encode` takes and its `decode` returns the whole video, so its figures include
it: they have no other interface.
Other lengths: `python benchmarks/memory.py 17 33`.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import record, table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from odvae import AutoencoderKLODVAE, decode_stream, encode_stream
from odvae.inference.adapters import AutoencoderAdapter
from odvae.utils.live_memory import LiveMemory
from odvae.utils.plots import curves

SIZE, LENGTHS = 256, (17, 33, 65, 129, 257, 1025)
MAX_PEER_FRAMES = 129  # up to which peers are run: beyond, their curves continue as before
OUT = Path(__file__).parents[1] / "docs" / "memory.png"
SD: dict[str, Any] = {  # Stable Diffusion's; the defaults of diffusers are for tests
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "sample_size": SIZE}


def plain(model: Any) -> None:
    """Leave the model as it is."""


def tiled(model: Any) -> None:
    """Enable tiles of half the side that overlap by a fourth; other options of `enable_tiling` keep their defaults."""
    options = {f"tile_sample_{name}_{side}": value for name, value in (("min", SIZE // 2), ("stride", 3 * SIZE // 8))
               for side in ("height", "width")}
    parameters = inspect.signature(model.enable_tiling).parameters
    model.enable_tiling(**{name: value for name, value in options.items() if name in parameters})


def framewise(model: Any) -> None:
    model.use_framewise_encoding = model.use_framewise_decoding = True


# name: class, config that differs from the class's defaults (which are the published model's), options
PEERS: dict[str, tuple[str, dict[str, Any], Callable[[Any], None]]] = {
    "SD, frame by frame": ("AutoencoderKL", SD, plain),
    "SVD": ("AutoencoderKLTemporalDecoder",
            {key: value for key, value in SD.items() if key != "up_block_types"}, plain),
    "CogVideoX": ("AutoencoderKLCogVideoX", {}, plain),
    "CogVideoX, tiled": ("AutoencoderKLCogVideoX", {}, tiled),
    "Wan 2.1": ("AutoencoderKLWan", {}, plain),
    "Wan 2.1, tiled": ("AutoencoderKLWan", {}, tiled),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", {}, plain),
    "HunyuanVideo, tiled": ("AutoencoderKLHunyuanVideo", {}, tiled),
    "Mochi": ("AutoencoderKLMochi", {}, plain),
    "Mochi, tiled": ("AutoencoderKLMochi", {}, tiled),
    "LTX": ("AutoencoderKLLTXVideo", {}, plain),
    "LTX, framewise": ("AutoencoderKLLTXVideo", {}, framewise),
    "Allegro": ("AutoencoderKLAllegro", {}, plain),
}


def peer(name: str, part: str, frames: int) -> int:
    """Return the live bytes at the peak of one call, including its input."""
    kind, config, option = PEERS[name]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = getattr(diffusers, kind)(**copy.deepcopy(config)).eval()
        adapter = AutoencoderAdapter(model)
        option(model)
        if part == "decode":
            latents = adapter.encode(torch.empty(1, 3, frames, SIZE, SIZE))
            shape = latents.shape
            del latents
            gc.collect()
        with LiveMemory() as memory:
            if part == "encode":
                adapter.encode(torch.empty(1, 3, frames, SIZE, SIZE))
            else:
                adapter.decode(torch.empty(shape), frames, SIZE, SIZE)
        return memory.peak


def ours(part: str, frames: int, tiles: bool = False) -> int:
    """Return the same for `encode_stream` or `decode_stream`, with chunks of four frames."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = AutoencoderKLODVAE().eval()
        if tiles:
            vae.enable_tiling(SIZE // 2, SIZE // 2)
        with LiveMemory() as memory:
            stream = encode_stream(vae, video(frames), frames=4) if part == "encode" else \
                decode_stream(vae, latents(frames), frames=1)
            for chunk in stream:
                del chunk
        return memory.peak


def video(frames: int) -> Iterator[Tensor]:
    for first in range(0, frames, 4):
        yield torch.empty(1, 3, min(4, frames - first), SIZE, SIZE)


def latents(frames: int) -> Iterator[Tensor]:
    for _ in range(1 + (frames - 1) // 4):
        yield torch.empty(1, 4, 1, SIZE // 8, SIZE // 8)


def measure(part: str) -> dict[str, dict[int, float]]:
    """Return name -> frames -> GiB; a model that fails is left out, with a message."""
    gib = {"OD-VAE (ours)": {n: ours(part, n) / 2**30 for n in LENGTHS},
           "OD-VAE (ours), tiled": {n: ours(part, n, tiles=True) / 2**30 for n in LENGTHS if n <= MAX_PEER_FRAMES}}
    for name in PEERS:
        try:
            gib[name] = {n: peer(name, part, n) / 2**30 for n in LENGTHS if n <= MAX_PEER_FRAMES}
        except Exception as error:  # whatever a peer raises on fake tensors
            sys.stderr.write(f"{name}, {part}: left out, {type(error).__name__}: {str(error)[:200]}\n")
        gc.collect()
    return gib


def main() -> None:
    global LENGTHS
    LENGTHS = tuple(map(int, sys.argv[1:])) or LENGTHS
    logging.disable(logging.WARNING)
    gib = {}
    for part in ("encode", "decode"):
        gib[part] = measure(part)
        sys.stdout.write(f"\n{part}, {SIZE}x{SIZE}, float32: GiB of live tensors at the peak\n")
        table(["model", *LENGTHS], [[name, *(row.get(n, "") for n in LENGTHS)] for name, row in gib[part].items()])
        record("memory against length", {"size": SIZE, "part": part, "unit": "GiB of live tensors"}, gib[part])
    curves({name: (list(row), list(row.values())) for name, row in gib["decode"].items()}, OUT,
           f"Memory for decoding a video of {SIZE}x{SIZE}, float32, without weights", "frames",
           "GiB of live tensors", log_x=True, log_y=True)


if __name__ == "__main__":
    main()
