"""How does memory grow with the length of a video? Ours at the paper's width against diffusers' autoencoders at their
published widths; 256x256, float32, by each model's own options.

Nothing is computed: the models run on tensors that have shapes and no values, and the bytes of those that live are
counted. Weights are not. Ours is a stream whose chunks come and go; a peer's `encode` takes the whole video and its
`decode` gives the whole, so theirs is in the figures: they have no other interface.
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
from odvae.inference.memory import LiveMemory
from odvae.utils.plots import curves

SIZE, LENGTHS = 256, (17, 33, 65, 129, 257, 1025)
MOST = 129  # frames up to which the others are run: beyond, a line goes on as it came
OUT = Path(__file__).parents[1] / "docs" / "memory.png"
SD: dict[str, Any] = {  # Stable Diffusion's; the defaults of diffusers are a test's
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "sample_size": SIZE}


def plain(model: Any) -> None:
    """As it comes."""


def tiled(model: Any) -> None:
    """Tiles of half the side that share a fourth; what else the model's `enable_tiling` sets (temporal tiles) as it
    comes."""
    wanted = {f"tile_sample_{name}_{side}": value for name, value in (("min", SIZE // 2), ("stride", 3 * SIZE // 8))
              for side in ("height", "width")}
    known = inspect.signature(model.enable_tiling).parameters
    model.enable_tiling(**{name: value for name, value in wanted.items() if name in known})


def framewise(model: Any) -> None:
    model.use_framewise_encoding = model.use_framewise_decoding = True


# name: class, what differs from the class's defaults (which are the published model's), how it is run
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
    """Bytes alive at the peak of one call, the video or the latents that go in among them."""
    kind, config, option = PEERS[name]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = getattr(diffusers, kind)(**copy.deepcopy(config)).eval()
        face = AutoencoderAdapter(model)
        option(model)
        if part == "decode":
            latents = face.encode(torch.empty(1, 3, frames, SIZE, SIZE))
            shape = latents.shape
            del latents
            gc.collect()
        with LiveMemory() as memory:
            if part == "encode":
                face.encode(torch.empty(1, 3, frames, SIZE, SIZE))
            else:
                face.decode(torch.empty(shape), frames, SIZE, SIZE)
        return memory.peak


def ours(part: str, frames: int, tiles: bool = False) -> int:
    """The same through `encode_stream` and `decode_stream`, four frames at once."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = AutoencoderKLODVAE().eval()
        if tiles:
            vae.enable_tiling(SIZE // 2, SIZE // 2)
        with LiveMemory() as memory:
            stream = encode_stream(vae, video(frames), frames=4) if part == "encode" else \
                decode_stream(vae, codes(frames), frames=1)
            for chunk in stream:
                del chunk
        return memory.peak


def video(frames: int) -> Iterator[Tensor]:
    for first in range(0, frames, 4):
        yield torch.empty(1, 3, min(4, frames - first), SIZE, SIZE)


def codes(frames: int) -> Iterator[Tensor]:
    for _ in range(1 + (frames - 1) // 4):
        yield torch.empty(1, 4, 1, SIZE // 8, SIZE // 8)


def measure(part: str) -> dict[str, dict[int, float]]:
    """name -> frames -> GiB; a model that cannot be run so is left out, with a message."""
    found = {"OD-VAE (ours)": {n: ours(part, n) / 2**30 for n in LENGTHS},
             "OD-VAE (ours), tiled": {n: ours(part, n, tiles=True) / 2**30 for n in LENGTHS if n <= MOST}}
    for name in PEERS:
        try:
            found[name] = {n: peer(name, part, n) / 2**30 for n in LENGTHS if n <= MOST}
        except Exception as error:  # whatever a peer raises on tensors without values
            sys.stderr.write(f"{name}, {part}: left out, {type(error).__name__}: {str(error)[:200]}\n")
        gc.collect()
    return found


def main() -> None:
    global LENGTHS
    LENGTHS = tuple(map(int, sys.argv[1:])) or LENGTHS
    logging.disable(logging.WARNING)
    found = {}
    for part in ("encode", "decode"):
        found[part] = measure(part)
        sys.stdout.write(f"\n{part}, {SIZE}x{SIZE}, float32: GiB alive at the peak\n")
        table(["model", *LENGTHS], [[name, *(row.get(n, "") for n in LENGTHS)] for name, row in found[part].items()])
        record("memory against length", {"size": SIZE, "part": part, "unit": "GiB of live tensors"}, found[part])
    curves({name: (list(row), list(row.values())) for name, row in found["decode"].items()}, OUT,
           f"Memory for decoding a video of {SIZE}x{SIZE}, float32, the weights not counted", "frames",
           "GiB of live tensors", log_x=True, log_y=True)


if __name__ == "__main__":
    main()
