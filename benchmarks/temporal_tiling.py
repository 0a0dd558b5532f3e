"""What does the paper's temporal tiling lose that streaming does not? PSNR, and deviation from the whole clip.

The shipped OD-VAE on rendered clips it has not seen (64x64, 65 frames); and the same weights with the public code's
norm over the clip and trilinear upsampling, which cannot be streamed.
"""

from __future__ import annotations

import torch
from common import record, table

from odvae import AutoencoderKLODVAE, decode_stream, encode_stream
from odvae.data.synthetic import render, sample_scene
from odvae.data.transforms import to_tensor
from odvae.inference.loading import load_vae
from odvae.inference.streaming import decode_groups, encode_groups
from odvae.metrics.psnr import psnr
from odvae.weights import DEMO_VAE

FRAMES, CLIPS, GROUPS = 65, 8, (9, 17, 33)


@torch.inference_mode()
def main() -> None:
    causal = load_vae(DEMO_VAE).eval()
    config = {key: value for key, value in causal.config.items() if not key.startswith("_")}
    public = AutoencoderKLODVAE(**config | {"norm": "clip", "upsample": "trilinear"}).eval()
    public.load_state_dict(causal.state_dict())
    clips = torch.stack([to_tensor(render(sample_scene(99_000_100 + i), FRAMES)) for i in range(CLIPS)])

    def score(name: str, way: str, decoded: torch.Tensor, whole: torch.Tensor) -> list[object]:
        return [name, way, float(psnr(clips, decoded).mean()), float((decoded - whole).abs().max())]

    rows = []
    for name, vae in (("frame norm, nearest", causal), ("clip norm, trilinear", public)):
        z = vae.encode_chunk(clips)[0][:, : vae.latent_channels]
        whole = vae.decode_chunk(z)[0]
        rows.append(score(name, "whole", whole, whole))
        if vae.causal:
            streamed = torch.cat(list(decode_stream(vae, encode_stream(vae, clips.split(7, 2), frames=4))), 2)
            rows.append(score(name, "streamed", streamed, whole))
        for group in GROUPS:
            tiled = decode_groups(vae, encode_groups(vae, clips, group=group), group=group)
            rows.append(score(name, f"groups of {group}", tiled, whole))
    headers = ["model", "way", "PSNR dB", "largest deviation from whole"]
    table(headers, rows)
    record("loss of temporal tiling", {"frames": FRAMES, "clips": CLIPS},
           [dict(zip(headers, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
