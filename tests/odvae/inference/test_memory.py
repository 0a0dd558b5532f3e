"""Memory is constant in a video's length, and estimated in advance."""

from __future__ import annotations

import logging
import re
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from builders import random_video, tiny_vae
from processes import preload_fork_server

from odvae import AutoencoderKLODVAE, decode_stream, encode_stream
from odvae.inference.memory import StreamPlan, _upper_bound, auto_plan, free_memory, memory_estimate
from odvae.model.conv import consume_state
from odvae.model.tiling import Tiling
from odvae.utils.errors import UserError
from odvae.utils.live_memory import LiveMemory

WIDER = {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8}
HEIGHT, WIDTH = 32, 48


def measured(vae: AutoencoderKLODVAE, part: str, latents: int, frames: int) -> int:
    """Peak of the live bytes of a stream whose chunks are freed one by one."""
    chunks = 1 + (latents - 1) // (frames // 4)

    def video():
        yield random_video(1, height=HEIGHT, width=WIDTH)
        for _ in range(chunks):
            yield random_video(frames, height=HEIGHT, width=WIDTH)

    def codes():
        for _ in range(chunks + 1):
            yield torch.randn(1, 4, frames // 4, HEIGHT // 8, WIDTH // 8)

    with LiveMemory() as memory:
        stream = (encode_stream(vae, video(), frames=frames) if part == "encode"
                  else decode_stream(vae, codes(), frames=frames // 4))
        for _ in stream:
            del _
    return memory.peak


@pytest.mark.parametrize("part", ["encode", "decode"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_estimate_is_the_measured_peak_whatever_the_length(part, fused):
    vae = tiny_vae(**WIDER)
    if fused:
        vae.fuse()
    short, long = (measured(vae, part, latents, frames=8) for latents in (5, 17))
    assert long == pytest.approx(short, rel=.02)
    assert memory_estimate(vae, part, HEIGHT, WIDTH, frames=8) == pytest.approx(long, rel=.15)


def test_memory_of_a_stream_at_the_papers_width():
    """256x256 in float32, any length; nothing is computed."""
    with torch.device("meta"):
        vae = AutoencoderKLODVAE()
    assert memory_estimate(vae, "encode", 256, 256) < .63 * 2**30
    assert memory_estimate(vae, "decode", 256, 256) < 2.06 * 2**30


def test_tiles_bound_memory_and_the_automatic_plan_is_the_largest_that_fits():
    vae = tiny_vae(**WIDER)
    need = {frames: memory_estimate(vae, "decode", 160, 160, frames=frames) for frames in (4, 8)}
    tiled = memory_estimate(vae, "decode", 160, 160, frames=4, tiling=Tiling(64, 64, 16))
    assert tiled < need[4] < need[8]

    def plan(size: float) -> StreamPlan:
        return auto_plan(vae, "decode", 160, 160, free=int(size / .8) + 1)

    assert plan(need[4]) == StreamPlan(4, None)
    assert plan(need[4] - 1).tiling is not None and plan(need[4] - 1).tiling.height < 160
    assert auto_plan(vae, "decode", 160, 160, free=2**40) == StreamPlan(vae.chunk_frames(160, 160), None)
    with pytest.raises(UserError, match="MiB of memory"):
        plan(1000)


def test_the_estimate_for_tiles_is_the_measured_peak():
    vae, height, width = tiny_vae(**WIDER), 112, 96
    for part in ("encode", "decode"):
        for tiling in (Tiling(48, 48, 8), Tiling(128, 48, 24)):
            vae.enable_tiling(tiling.height, tiling.width, overlap=tiling.overlap)
            with torch.inference_mode(), LiveMemory() as memory:
                state = ()
                for frames in (1, 4, 4):
                    x = (random_video(frames, height=height, width=width) if part == "encode"
                         else torch.randn(1, 4, 1, height // 8, width // 8))
                    state = consume_state(state)
                    output, state = getattr(vae, f"{part}_chunk")(x, state)
                    del x, output
            vae.disable_tiling()
            assert memory_estimate(vae, part, height, width, frames=4, tiling=tiling) == \
                pytest.approx(memory.peak, rel=.15), (part, tiling)


@pytest.mark.parametrize("part", ["encode", "decode"])
@pytest.mark.parametrize("change", [{"variant": 1}, {"variant": 2}, {"time_compression": 2}, {"patch_size": 2},
                                    {"block_out_channels": (64, 16, 16, 16)}, {"layers_per_block": 3}, {}])
def test_the_upper_bound_is_never_below_the_estimate(part, change):
    vae, frames = tiny_vae(**WIDER | change), 4 if change else 16
    assert memory_estimate(vae, part, 64, 64, frames=frames) < _upper_bound(vae, 64, 64, frames, 1)


def test_a_plan_with_tiles_is_logged_and_the_vae_is_restored(caplog):
    vae, free = tiny_vae(**WIDER), free_memory(torch.device("cpu"))
    whole = memory_estimate(vae, "decode", 160, 160, frames=4)
    with caplog.at_level(logging.WARNING):
        assert not auto_plan(vae, "decode", 160, 160, free=free).trim_heap
        plan = auto_plan(vae, "decode", 160, 160, free=int(whole / .8) - 2)
    assert plan.trim_heap and plan.tiling is not None and "not exact" in caplog.text
    with plan.applied(vae):
        assert vae.use_tiling and vae.tiling == plan.tiling
    assert not vae.use_tiling and vae.tiling == tiny_vae().tiling
    with pytest.raises(UserError, match="allow tiles"):
        auto_plan(vae, "decode", 160, 160, free=int(whole / .8) - 2, tiles=False)
    assert auto_plan(vae, "decode", 160, 160, free=2**40, frames=8).frames == 8
    with pytest.raises(UserError, match="nearest is 8"):
        auto_plan(vae, "decode", 160, 160, frames=7)


def status(key: str) -> int:
    """Return a size of this process, such as VmRSS, in bytes."""
    match = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def stream_constant(vae: AutoencoderKLODVAE, part: str, size: int, chunks: int) -> None:
    if part == "encode":
        video = (torch.full((1, 3, 4 if i else 1, size, size), .1) for i in range(chunks))
        stream = encode_stream(vae, video, frames=4)
    else:
        stream = decode_stream(vae, (torch.full((1, 4, 1, size // 8, size // 8), .1) for _ in range(chunks)), frames=1)
    for chunk in stream:
        del chunk


def measure_growth(part: str, size: int, results: Connection) -> None:
    """Send the estimate for a stream and by how much this process, a new one, grows at its peak."""
    stream_constant(AutoencoderKLODVAE(block_out_channels=(8,) * 4, norm_num_groups=4), part, 64, 3)  # starts threads
    vae = AutoencoderKLODVAE(block_out_channels=(16, 32, 64, 64), norm_num_groups=8)
    estimate = memory_estimate(vae, part, size, size, frames=4)
    with StreamPlan(4, None, trim_heap=True).applied(vae):
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = status("VmRSS")
        stream_constant(vae, part, size, 4)
        results.send((estimate, status("VmHWM") - before))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("part", "size"), [pytest.param("encode", 256, marks=pytest.mark.slow), ("decode", 160)])
def test_a_process_grows_by_the_estimate(part, size):
    preload_fork_server()
    ours, theirs = Pipe()
    process = get_context("forkserver").Process(target=measure_growth, args=(part, size, theirs))
    process.start()
    theirs.close()
    estimate, measured = ours.recv()
    process.join()
    assert estimate > 60 * 2**20
    assert estimate == pytest.approx(measured, rel=.15)


def test_a_state_can_be_used_again_unless_it_is_consumed():
    vae, x = tiny_vae(), random_video(9)
    with torch.no_grad():
        _, state = vae.encode_chunk(x[:, :, :1], ())
        first, _ = vae.encode_chunk(x[:, :, 1:], state)
        again, _ = vae.encode_chunk(x[:, :, 1:], state)
    assert first.equal(again)


@pytest.mark.parametrize("part", [pytest.param("encode", marks=pytest.mark.slow), "decode"])
def test_no_graph_breaks(part):
    vae = tiny_vae(block_out_channels=(8, 8), time_compression=2)
    vae.fuse()
    step = getattr(vae, f"{part}_chunk")
    x = random_video(5) if part == "encode" else torch.randn(1, 4, 3, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x)[0], step(x)[0], atol=2e-5, rtol=0)
