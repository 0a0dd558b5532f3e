"""How fast is the OD-VAE at the paper's width against its image VAE, run frame by frame? Same weights, float32.

The image VAE is diffusers' AutoencoderKL in the shape of Stable Diffusion's, with random weights; the OD-VAE is
inflated from it. `python benchmarks/vae_speed.py [FRAMES] [SIDE] [RUNS]`, 17 256 5 by default (an hour on two cores).
"""

from __future__ import annotations

import sys

import torch
from common import interleaved, record, table
from diffusers import AutoencoderKL

from odvae.convert.inflate import inflate

WIDTHS = (128, 256, 512, 512)


@torch.inference_mode()
def main() -> None:
    frames, side, runs = (int(a) for a in (sys.argv[1:] + ["17", "256", "5"][len(sys.argv) - 1:]))
    torch.manual_seed(0)
    image = AutoencoderKL(block_out_channels=WIDTHS, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
                          up_block_types=("UpDecoderBlock2D",) * 4).eval()
    plain, fused = inflate(image).eval(), inflate(image).eval()
    fused.fuse()
    x = torch.rand(1, 3, frames, side, side) * 2 - 1
    z = torch.randn(1, 4, plain.latent_frames(frames), side // 8, side // 8)

    def each(step, clip: torch.Tensor) -> None:
        for frame in clip.unbind(2):
            step(frame)

    # The image VAE decodes as many frames as it encodes; the OD-VAE decodes a fourth as many latents.
    times = interleaved({
        "image encode": lambda: each(image.encode, x),
        "encode": lambda: plain.encode(x),
        "image decode": lambda: each(image.decode, z[:, :, :1].expand(-1, -1, frames, -1, -1)),
        "decode": lambda: plain.decode(z),
        "decode, fused": lambda: fused.decode(z),
    }, runs)
    rows = [[name, times[name], frames / times[name], times[f"image {name.split(',')[0]}"] / times[name]]
            for name in ("encode", "decode", "decode, fused")]
    headers = ["what", "s", "frames a second", "x image VAE frame by frame"]
    table(headers, rows)
    record("speed beside the image VAE", {"frames": frames, "side": side, "runs": runs, "widths": WIDTHS},
           [dict(zip(headers, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
