"""A compiled VAE computes the same in few graphs, with its streaming state."""

from __future__ import annotations

import pytest
import torch
from builders import random_video, tiny_vae
from torch._dynamo.testing import CompileCounter

from odvae.cache.encoder import LatentEncoder
from odvae.cli import main
from odvae.data.synthetic import write_rendered
from odvae.inference.streaming import decode_stream, encode_stream
from odvae.model.compilation import compile_vae
from odvae.utils.errors import UserError

ONE_LEVEL = {"block_out_channels": (4,), "time_compression": 1}  # whose blocks are all alike


@pytest.fixture
def graphs():
    torch.compiler.reset()
    yield CompileCounter()
    torch.compiler.reset()


def test_a_stream_has_three_kinds_of_chunks_however_long(graphs):
    """The start, full ones, and single frames in place of shorter ones; each in the layouts of a conv and of attention,
    which the blocks of encoder and decoder share."""
    vae, video = tiny_vae(**ONE_LEVEL), random_video(12, height=8, width=8)

    def streamed(frames):
        latents = torch.cat(list(encode_stream(vae, video[:, :, :frames].split(5, dim=2), frames=3)), 2)
        parts = [latents[:, :, :1], latents[:, :, 1:6], latents[:, :, 6:]]
        return latents, torch.cat(list(decode_stream(vae, parts, frames=3)), 2)

    plain = streamed(12)
    compile_vae(vae, backend=graphs, fullgraph=True)
    for actual, expected in zip(streamed(12), plain, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    count = graphs.frame_count
    assert count <= 3 * 2
    streamed(11)
    assert graphs.frame_count == count


def test_a_compiled_cache_encoder_takes_two_sizes_of_batches():
    vae, clips = tiny_vae(), random_video(5, batch=5)
    expected, sizes = LatentEncoder(vae).encode(clips), []
    vae.encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    with torch.compiler.set_stance("force_eager"):
        encoder = LatentEncoder(vae, compiled_batch=3)
        actual = torch.cat([encoder.encode(batch) for batch in clips.split(3)])
    assert vae.compiled and sizes == [3, 1, 1]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_what_cannot_be_compiled_is_named(monkeypatch):
    with pytest.raises(UserError, match="only an OD-VAE"):
        compile_vae(torch.nn.Linear(1, 1))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="install g"):
        compile_vae(tiny_vae(**ONE_LEVEL))


def test_every_command_takes_compile(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    clip, = write_rendered(tmp_path / "clips", 1, frames=5, size=16)
    vae = ["--vae", str(tmp_path / "vae"), "--compile"]
    with torch.compiler.set_stance("force_eager"):
        assert main(["encode", str(clip), str(tmp_path / "a.safetensors"), *vae]) == 0
        assert main(["decode", str(tmp_path / "a.safetensors"), str(tmp_path / "a.mp4"), *vae]) == 0
        assert main(["reconstruct", str(clip), "--out", str(tmp_path / "out"), *vae]) == 0
        assert main(["cache", "build", str(tmp_path / "clips"), str(tmp_path / "cache"), "--frames", "5",
                     "--size", "16", "16", "--workers", "1", *vae]) == 0
