"""Spatial tiles blend, stream and have the right size; temporal groups share one frame."""

from __future__ import annotations

import pytest
import torch
from builders import random_video, tiny_vae

from odvae import decode_stream, encode_stream
from odvae.inference.streaming import decode_groups, encode_groups, temporal_groups
from odvae.model.tiling import Tiling, tile_spans
from odvae.utils.errors import UserError


@pytest.mark.parametrize(("tiling", "nearest"), [
    ((100, 64, 16), (96, 64, 16)), ((64, 64, 64), (64, 64, 32)), ((64, 64, 13), (64, 64, 16)), ((3, 64, 0), (8, 64, 0)),
    ((64, 24, 24), (64, 24, 8)),
])
def test_tiles_that_do_not_fit_are_refused_with_the_nearest_that_do(tiling, nearest):
    with pytest.raises(UserError, match="nearest is {}x{} with an overlap of {}$".format(*nearest)):
        tiny_vae().enable_tiling(*tiling[:2], overlap=tiling[2])
    Tiling(*nearest).check(8)


def test_tiles_by_diffusers_names():
    vae = tiny_vae()
    vae.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=32, tile_sample_stride_height=48,
                      tile_sample_stride_width=24)
    assert vae.use_tiling and vae.tiling == Tiling(64, 32, 16)  # the larger overlap, on both axes
    vae.enable_tiling(64, tile_sample_stride_height=56)
    assert vae.tiling == Tiling(64, 64, 8)
    with pytest.raises(UserError, match="not both"):
        vae.enable_tiling(64, 64, 48, overlap=16)
    with pytest.raises(UserError, match="nearest is 64x64 with an overlap of 32"):
        vae.enable_tiling(64, 64, 8)


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0, 8, 16])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 72), (56, 32), (64, 48)])
def test_tiled_sizes_come_out_right_and_tiles_stream_exactly(overlap, height, width):
    vae, x = tiny_vae(), random_video(9, height=height, width=width)
    vae.enable_tiling(32, 32, overlap=overlap)
    z = vae.encode(x).latent_dist.mean
    y = vae.decode(z).sample
    assert z.shape == (1, 4, 3, height // 8, width // 8) and y.shape == x.shape
    streamed = torch.cat(list(encode_stream(vae, x.split(5, 2), frames=4)), 2)
    torch.testing.assert_close(streamed, z, atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.cat(list(decode_stream(vae, [z], frames=1)), 2), y, atol=2e-5, rtol=0)
    # Outside overlaps the result is that of a single tile.
    vae.disable_tiling()
    corner = vae.encode(x[:, :, :, :32, :32]).latent_dist.mean
    spans = [tile_spans(side, 32, overlap) for side in (height, width)]
    side = min(span[1][0] if len(span) > 1 else span[0][1] for span in spans) // 8
    torch.testing.assert_close(z[:, :, :, :side, :side], corner[:, :, :, :side, :side], atol=2e-5, rtol=0)


def test_temporal_groups_share_one_frame_and_line_up():
    assert temporal_groups(9, 5) == [(0, 5), (4, 9)] and temporal_groups(1, 5) == [(0, 1)]
    for k in range(1, 30):
        frames, latents = temporal_groups(1 + 4 * k, 17), temporal_groups(1 + k, 5)
        assert [(4 * a, 4 * (b - 1) + 1) for a, b in latents] == frames
    with pytest.raises(UserError, match="the least is 2"):
        temporal_groups(9, 1)


@torch.no_grad()
def test_temporal_tiling_is_exact_in_its_first_group_and_only_there():
    vae, x = tiny_vae(norm="clip", upsample="trilinear"), random_video(25)
    z, y = encode_groups(vae, x, group=9), None
    assert z.shape == (1, 4, 7, 2, 3)
    torch.testing.assert_close(z[:, :, :3], vae.encode(x[:, :, :9]).latent_dist.mean, atol=2e-5, rtol=0)
    assert (z - vae.encode(x).latent_dist.mean).abs().max() > 1e-3  # the loss that the paper measures
    y = decode_groups(vae, z, group=9)
    assert y.shape == x.shape
    torch.testing.assert_close(y[:, :, :9], vae.decode(z[:, :, :3]).sample, atol=2e-5, rtol=0)
    with pytest.raises(UserError, match="5 and 9"):
        encode_groups(vae, x, group=8)
