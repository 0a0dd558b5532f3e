"""How much faster than its VAE's decoder is a distilled one, in how much memory, and what does it lose?

    python benchmarks/distilled_decoder.py speed [SIDE]         the shipped VAE; the shape of `distill_demo.yaml`, 64
    python benchmarks/distilled_decoder.py paper [SIDE]         the paper's width, with random weights, 128
    python benchmarks/distilled_decoder.py quality DECODER VIDEOS [VAE]     PSNR on clips that neither has seen

Seconds of the CPU on one thread (what others run on the machine matters little to them), interleaved, of a stream of 17
frames in the chunks that the pipelines decode: two latents at once. Memory is that of live tensors at the peak.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import record, table

from odvae import AutoencoderKLODVAE
from odvae.data.files import list_folder
from odvae.data.transforms import to_tensor
from odvae.data.video.reader import read_clip
from odvae.inference.loading import load_decoder, load_vae
from odvae.inference.streaming import decode_stream
from odvae.metrics.psnr import psnr
from odvae.model.distilled_decoder import DistilledDecoder
from odvae.training.distill import DecoderConfig
from odvae.utils.live_memory import LiveMemory
from odvae.weights import DEMO_VAE

FRAMES, AT_ONCE, ROUNDS = 17, 2, 9


def main() -> None:
    torch.set_num_threads(1)
    what, *arguments = sys.argv[1:]
    with torch.inference_mode():
        if what == "quality":
            quality(Path(arguments[0]), Path(arguments[1]), Path(arguments[2]) if arguments[2:] else DEMO_VAE)
            return
        vae = load_vae(DEMO_VAE).eval() if what == "speed" else AutoencoderKLODVAE().eval()
        assert isinstance(vae, AutoencoderKLODVAE)
        vae.fuse()
        speed(what, vae, int(arguments[0]) if arguments else 64 if what == "speed" else 128)


def speed(what: str, vae: AutoencoderKLODVAE, side: int) -> None:
    ratio = vae.spatial_compression_ratio
    z = torch.randn(1, vae.latent_channels, vae.latent_frames(FRAMES), side // ratio, side // ratio)
    distilled = DistilledDecoder(vae.latent_channels, **DecoderConfig().model_dump()).eval()
    decoders: dict[str, Any] = {"the VAE's, fused": vae, "distilled": distilled}

    def decode(decoder: Any) -> None:
        for _ in decode_stream(decoder, [z], frames=AT_ONCE):
            pass

    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    rounds = ROUNDS if what == "speed" else 3
    for round_ in range(rounds + 1):
        for name, decoder in decoders.items():
            start = time.process_time()
            decode(decoder)
            if round_:
                seconds[name].append(time.process_time() - start)
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    rows = []
    for name, decoder in decoders.items():
        with LiveMemory() as memory:
            decode(decoder)
        weights = decoder.decoder.parameters() if decoder is vae else decoder.parameters()
        median = statistics.median(seconds[name])
        rows.append([name, sum(p.numel() for p in weights) / 1e6, median, FRAMES / median, memory.peak / 2**20])
    headers = ["decoder", "M parameters", "CPU s", "frames a CPU second", "MiB"]
    table(headers, rows)
    print(f"{statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)")
    record(f"speed of a distilled decoder, {what}", {"side": side, "frames": FRAMES, "at once": AT_ONCE},
           {"rows": [dict(zip(headers, row, strict=True)) for row in rows], "ratios": ratios})


def quality(folder: Path, videos: Path, vae_folder: Path) -> None:
    vae = load_vae(vae_folder).eval()
    assert isinstance(vae, AutoencoderKLODVAE)
    decoder = load_decoder(folder, vae)
    values: dict[str, list[float]] = {"the VAE's": [], "distilled": [], "distilled against the VAE's": []}
    for path in [ref.path for ref in list_folder(videos, images=False)]:
        clip = to_tensor(read_clip(path, 0, 33))[None]
        latents = vae.encode(clip).latent_dist.mode()
        own, fast = vae.decode(latents).sample, decoder.decode(latents).sample
        for name, (a, b) in zip(values, ((clip, own), (clip, fast), (own, fast)), strict=True):
            values[name].append(float(psnr(a, b).mean()))
    rows = [[name, statistics.mean(some), min(some)] for name, some in values.items()]
    table(["decoder", "dB", "worst clip"], rows)
    record("quality of a distilled decoder", {"decoder": str(folder), "videos": str(videos)},
           {name: statistics.mean(some) for name, some in values.items()})


if __name__ == "__main__":
    main()
