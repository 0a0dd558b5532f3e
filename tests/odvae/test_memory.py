"""Memory is constant, and known before."""

from __future__ import annotations

import pytest
import torch
from builders import random_video, tiny_vae

from odvae import AutoencoderKLODVAE, decode_stream, encode_stream
from odvae.memory import LiveMemory, Plan, auto_plan, memory_estimate
from odvae.model.tiling import Tiling
from odvae.runtime.errors import UserError

WIDER = {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8}
HEIGHT, WIDTH = 32, 48


def measured(vae: AutoencoderKLODVAE, part: str, latents: int, frames: int) -> int:
    """Peak of the live bytes of a stream whose pieces come and go one by one."""
    pieces = 1 + (latents - 1) // (frames // 4)

    def video():
        yield random_video(1, height=HEIGHT, width=WIDTH)
        for _ in range(pieces):
            yield random_video(frames, height=HEIGHT, width=WIDTH)

    def codes():
        for _ in range(pieces + 1):
            yield torch.randn(1, 4, frames // 4, HEIGHT // 8, WIDTH // 8)

    with LiveMemory() as memory:
        stream = (encode_stream(vae, video(), frames=frames) if part == "encode"
                  else decode_stream(vae, codes(), frames=frames // 4))
        for _ in stream:
            del _
    return memory.peak


@pytest.mark.parametrize("part", ["encode", "decode"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_estimate_is_what_is_measured_and_length_does_not_matter(part, fused):
    vae = tiny_vae(**WIDER)
    if fused:
        vae.fuse()
    short, long = (measured(vae, part, latents, frames=8) for latents in (5, 17))
    assert long == pytest.approx(short, rel=.02)
    assert memory_estimate(vae, part, HEIGHT, WIDTH, frames=8) == pytest.approx(long, rel=.15)


def test_at_the_papers_width_a_stream_fits_what_the_issue_asks():
    """17x256x256 in float32, and any length; nothing is computed."""
    with torch.device("meta"):
        vae = AutoencoderKLODVAE()
    assert memory_estimate(vae, "encode", 256, 256) < .63 * 2**30
    assert memory_estimate(vae, "decode", 160, 160) < 2.06 * 2**30


def test_tiles_bound_memory_and_the_automatic_plan_is_the_largest_that_fits():
    vae = tiny_vae(**WIDER)
    need = {frames: memory_estimate(vae, "decode", 160, 160, frames=frames) for frames in (4, 8)}
    tiled = memory_estimate(vae, "decode", 160, 160, frames=4, tiling=Tiling(64, 64, 16))
    assert tiled < need[4] < need[8]

    def plan(size: float) -> Plan:
        return auto_plan(vae, "decode", 160, 160, free=int(size / .8) + 1)

    assert plan(need[4]) == Plan(4, None)
    assert plan(need[4] - 1).tiling is not None and plan(need[4] - 1).tiling.height < 160
    assert auto_plan(vae, "decode", 160, 160, free=2**40) == Plan(vae.piece_frames(160, 160), None)
    with pytest.raises(UserError, match="MiB free"):
        plan(1000)


def test_a_state_is_not_used_up_unless_it_is_handed_over():
    vae, x = tiny_vae(), random_video(9)
    with torch.no_grad():
        _, past = vae.encode_piece(x[:, :, :1], ())
        first, _ = vae.encode_piece(x[:, :, 1:], past)
        again, _ = vae.encode_piece(x[:, :, 1:], past)
    assert first.equal(again)


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_no_graph_breaks(part):
    vae = tiny_vae(block_out_channels=(8, 8), time_compression=2)
    vae.fuse()
    step = getattr(vae, f"{part}_piece")
    x = random_video(5) if part == "encode" else torch.randn(1, 4, 3, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x)[0], step(x)[0], atol=2e-5, rtol=0)
