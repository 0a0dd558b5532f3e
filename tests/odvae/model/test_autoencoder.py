"""The VAE's defining properties: causal, equal when streamed, equal to its image VAE when tail-initialised."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from builders import WIDTHS, random_video, tiny_vae
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from odvae import AutoencoderKLODVAE, decode_stream, encode_stream
from odvae.convert.inflate import inflate, inflate_kernel
from odvae.inference.streaming import decode_groups, encode_groups
from odvae.model import conv, norm
from odvae.model.conv import CausalConv3d
from odvae.model.norm import FrameNorm
from odvae.model.outputs import DiagonalGaussianDistribution
from odvae.utils.errors import NonFiniteError, UserError


def image_vae(in_channels: int = 3, widths: tuple[int, ...] = WIDTHS) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=in_channels, out_channels=in_channels, block_out_channels=widths, layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths)).eval()


CUSTOM = {"encoder": ["2d", "half", "3d", "all"], "decoder": ["half", "2d", "all", "3d"]}
VARIANTS = [1, 2, 3, 4, CUSTOM]


def force_winograd(monkeypatch: pytest.MonkeyPatch, channels: int = 0) -> None:
    """Use the Winograd conv from `channels` channels on, however few pixels there are."""
    monkeypatch.setattr(conv, "WINOGRAD_CHANNELS", channels)
    monkeypatch.setattr(conv, "WINOGRAD_PIXELS", 0)


@pytest.mark.parametrize(("variant", "counts"), [(4, (239.19, 94.40, 144.79)), (1, (245.98, 100.01, 145.97))])
def test_paper_width_has_the_papers_parameter_counts(variant, counts):
    with torch.device("meta"):
        vae = AutoencoderKLODVAE(variant=variant)

    def millions(module: torch.nn.Module) -> float:
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)

    assert (millions(vae), millions(vae.encoder), millions(vae.decoder)) == counts


@torch.no_grad()
def test_geometry_and_images():
    vae = tiny_vae()
    for frames, latents in ((1, 1), (5, 2), (17, 5)):
        z = vae.encode(random_video(frames)).latent_dist.mean
        assert z.shape == (1, 4, latents, 2, 3)
        assert vae.decode(z).sample.shape == (1, 3, frames, 16, 24)
    assert (vae.temporal_compression_ratio, vae.spatial_compression_ratio, vae.latent_channels) == (4, 8, 4)
    assert (vae.scale_factor_temporal, vae.scale_factor_spatial, vae.z_dim) == (4, 8, 4)


@torch.no_grad()
@pytest.mark.parametrize("time_compression", [2, 4, 8])
@pytest.mark.parametrize("options", [{"norm": "clip"}, {"upsample": "trilinear"}, {"time_sampling": "residual"}])
def test_every_option_keeps_the_geometry(time_compression, options):
    vae, x = tiny_vae(time_compression=time_compression, latent_channels=8, **options), random_video(17)
    z = vae.encode(x).latent_dist.mean
    assert z.shape == (1, 8, 1 + 16 // time_compression, 2, 3)
    assert vae.decode(z).sample.shape == x.shape
    if vae.causal:
        torch.testing.assert_close(torch.cat(list(encode_stream(vae, x.split(8, 2), frames=8)), 2), z,
                                   atol=2e-5, rtol=0)
        torch.testing.assert_close(torch.cat(list(decode_stream(vae, [z])), 2), vae.decode(z).sample, atol=2e-5, rtol=0)
    else:
        with pytest.raises(UserError, match="cannot be streamed"):
            list(decode_stream(vae, [z]))


@pytest.mark.parametrize(("options", "message"), [
    ({"variant": 5}, r"unknown variant 5; choose one of \[0, 1, 2, 3, 4\]"),
    ({"variant": {"encoder": ["2d"] * 4}}, "keys encoder and decoder"),
    ({"variant": {"encoder": ["2d"] * 4, "decoder": ["4d"] * 4}}, "variant.decoder"),
    ({"norm": "batch"}, "norm 'batch'"), ({"time_compression": 16}, "power of two of at most 8"),
])
def test_an_unknown_option_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        tiny_vae(**options)


@pytest.mark.parametrize(("shape", "nearest"), [((1, 3, 6, 16, 16), "5 and 9"), ((1, 3, 5, 20, 16), "16x16")])
def test_a_video_of_the_wrong_shape_is_refused_with_the_nearest_shape(shape, nearest):
    with pytest.raises(UserError, match=nearest):
        tiny_vae().encode(torch.zeros(shape))


@torch.no_grad()
def test_causality_a_prefix_encodes_and_decodes_to_the_prefix():
    vae, x = tiny_vae(), random_video(17)
    z = vae.encode(x).latent_dist.mean
    y = vae.decode(z).sample
    for latents in (1, 2, 4):
        frames = 1 + 4 * (latents - 1)
        torch.testing.assert_close(vae.encode(x[:, :, :frames]).latent_dist.mean, z[:, :, :latents],
                                   atol=2e-5, rtol=0)
        torch.testing.assert_close(vae.decode(z[:, :, :latents]).sample, y[:, :, :frames], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_streamed_is_whole_for_every_split_of_33_frames(variant, fused, monkeypatch):
    vae, x = tiny_vae(variant=variant), random_video(33, batch=2, height=8, width=8)
    if fused:
        force_winograd(monkeypatch)
        vae.fuse()
    moments = vae.encode_chunk(x)[0]
    z = vae.encode(x).latent_dist.mean
    y = vae.decode(z).sample
    for latents in range(1, 9):  # the encoder takes whole latents; other splits are rechunked to these
        frames = 1 + 4 * (latents - 1)
        first, state = vae.encode_chunk(x[:, :, :frames], ())
        second, _ = vae.encode_chunk(x[:, :, frames:], state)
        torch.testing.assert_close(torch.cat([first, second], 2), moments, atol=2e-5, rtol=0)
        chunks = [z[:, :, :latents], z[:, :, latents:]]
        torch.testing.assert_close(torch.cat(list(decode_stream(vae, chunks)), 2), y, atol=2e-5, rtol=0)
    single = list(encode_stream(vae, x.split(1, 2), moments=True, frames=4))
    torch.testing.assert_close(torch.cat(single, 2), moments, atol=2e-5, rtol=0)
    odd = [p for chunk in x.split([3, 7, 1, 13, 9], 2) for p in (chunk, chunk[:, :, :0])]  # with empty chunks between
    torch.testing.assert_close(torch.cat(list(encode_stream(vae, odd)), 2), z, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streamed_is_whole_in_half_precision(dtype):
    """Both round, in different orders: streamed is as close to float32 as whole."""
    exact, x = tiny_vae(), random_video(17)
    z = exact.encode(x).latent_dist.mean
    y = exact.decode(z).sample
    half = nn.Module.to(tiny_vae(), dtype)
    pairs = (
        (half.encode(x.to(dtype)).latent_dist.mean, encode_stream(half, x.to(dtype).split(5, 2), frames=4), z),
        (half.decode(z.to(dtype)).sample, decode_stream(half, [z.to(dtype)], frames=1), y))
    for whole, chunks, expected in pairs:
        streamed = torch.cat(list(chunks), 2)
        assert streamed.dtype == dtype and streamed.shape == whole.shape
        assert (streamed - expected).abs().max() < 2 * (whole - expected).abs().max()


@pytest.mark.parametrize("options", [{}, {"variant": 1}, {"norm": "clip"}, {"upsample": "trilinear"},
                                     {"time_sampling": "residual"}], ids=str)
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize(("large_frame", "frame_by_frame"), [(0, 0), (2**30, 2**30), (2**30, 0)])
def test_inference_paths_equal_the_training_path(options, frames, large_frame, frame_by_frame, monkeypatch):
    """Summed taps for one frame, Winograd convs, sub-pixel convs, norm and SiLU in place, of small and large frames."""
    force_winograd(monkeypatch, large_frame)
    monkeypatch.setattr(norm, "LARGE_FRAME", large_frame)
    monkeypatch.setattr(norm, "FRAME_BY_FRAME", frame_by_frame)
    vae, x = tiny_vae(**options), random_video(frames, batch=2)
    (moments, _), before = vae.encode_chunk(x), x.clone()  # with gradients: nothing is done in place
    y = vae.decode(moments[:, :4]).sample
    assert y.requires_grad
    vae.fuse()
    with torch.no_grad():
        fast = vae.encode_chunk(x)[0]
        torch.testing.assert_close(fast, moments, atol=2e-5, rtol=0)
        z = moments[:, :4].clone()
        torch.testing.assert_close(vae.decode(z).sample, y, atol=2e-5, rtol=0)
    assert x.equal(before) and z.equal(moments[:, :4])
    assert not any("subpixel" in key for key in vae.state_dict())
    vae.unfuse()
    assert vae.decode(z).sample.equal(y)


@torch.no_grad()
def test_statistics_of_large_frames_are_exact():
    frames = FrameNorm(4, 16, eps=1e-6)
    frames.weight.copy_(torch.randn(16)), frames.bias.copy_(torch.randn(16))
    x = torch.randn(2, 16, 3, 24, 20) + 30 * torch.rand(2, 16, 3, 1, 1)  # a mean far above the deviation
    scale, shift = frames.scale_and_shift(x.contiguous(memory_format=torch.channels_last_3d))
    exact = frames.double()(x.double())
    torch.testing.assert_close((x.double() * scale + shift), exact, atol=3e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("frames", [2, 3, 4, 5, 7])
def test_the_winograd_conv_equals_the_conv(frames):
    layer = CausalConv3d(6, 5, 3, time_kernel=3).double()
    padded = torch.randn(2, 6, 2 + frames, 7, 9, dtype=torch.float64)
    winograd = conv.winograd_time_conv(padded, layer.weight, layer.bias, layer.padding[1:])
    torch.testing.assert_close(winograd, layer.convolve(padded), atol=1e-12, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
@torch.inference_mode()
def test_activations_stay_channels_last(batch, fused, monkeypatch):
    """By the rule of aten's kernels: a tensor in another layout is copied at every norm."""
    monkeypatch.setattr(norm, "LARGE_FRAME", 0)
    vae, lost = tiny_vae(), []
    if fused:
        force_winograd(monkeypatch)
        vae.fuse()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.convolution.default, torch.ops.aten.mkldnn_convolution.default,
                        torch.ops.aten.batch_norm_update_stats.default):
                lost.extend([(func, x.shape, x.stride())] if not channels_last(x := args[0]) else [])
            return func(*args, **(kwargs or {}))

    with Watch():
        z = vae.encode(random_video(9, batch, 32, 32)).latent_dist.mean
        vae.decode(z)
        list(decode_stream(vae, z.split(1, 2)))
    assert not lost


def channels_last(x: torch.Tensor) -> bool:
    """Does aten take x (B, C, ..., W) for channels last? Strides grow from C over W to B, sides of one pixel too."""
    order, least = [1, *range(x.ndim - 1, 1, -1), 0], 0
    for d in order:
        if x.stride(d) < least:
            return False
        least = x.stride(d) * max(1, x.shape[d])
    return True


@torch.no_grad()
def test_cudnn_tries_its_algorithms_for_later_chunks_on_cuda_alone():
    cpu, cuda = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda"))
    for x, state, tuned in ((cuda, ("kept",), True), (cuda, (), False), (cuda, None, False), (cpu, ("kept",), False)):
        with torch.no_grad(), conv.tuned_convs(x, state):
            assert torch.backends.cudnn.benchmark is tuned
        assert not torch.backends.cudnn.benchmark


def test_a_stream_of_the_wrong_length_fails_after_its_whole_latents():
    vae, x, out = tiny_vae(), random_video(15, height=8, width=8), []
    with pytest.raises(UserError, match="13 and 17"):
        for chunk in encode_stream(vae, [x]):
            out.append(chunk)
    torch.testing.assert_close(torch.cat(out, 2), vae.encode(x[:, :, :13]).latent_dist.mean, atol=2e-5, rtol=0)


@torch.no_grad()
def test_streams_are_independent_of_each_other():
    """State is a value: two streams through one model, in turn, do not see each other."""
    vae = tiny_vae()
    a, b = random_video(9), -random_video(9)
    turns = zip(encode_stream(vae, a.split(3, 2)), encode_stream(vae, b.split(3, 2)), strict=True)
    first, second = (torch.cat(chunks, 2) for chunks in zip(*turns, strict=True))
    torch.testing.assert_close(first, vae.encode(a).latent_dist.mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(second, vae.encode(b).latent_dist.mean, atol=2e-5, rtol=0)


@torch.no_grad()
def test_variant_0_is_the_image_vae_on_each_frame():
    image, x = image_vae(), random_video(3, batch=2)
    vae = inflate(image, 0).eval()
    assert vae.temporal_compression_ratio == 1 and vae.config.scaling_factor == image.config.scaling_factor
    z = vae.encode(x).latent_dist.mean
    for k in range(3):
        torch.testing.assert_close(z[:, :, k], image.encode(x[:, :, k]).latent_dist.mean, atol=2e-5, rtol=0)
        torch.testing.assert_close(vae.decode(z).sample[:, :, k], image.decode(z[:, :, k]).sample, atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_tail_initialised_equals_its_image_vae(variant):
    image, x = image_vae(), random_video(9, batch=2)
    vae = inflate(image, variant, "tail").eval()
    z = vae.encode(x).latent_dist.mean
    for k in range(3):
        torch.testing.assert_close(z[:, :, k], image.encode(x[:, :, 4 * k]).latent_dist.mean, atol=2e-5, rtol=0)
    y = vae.decode(z).sample
    for frame in range(9):
        torch.testing.assert_close(y[:, :, frame], image.decode(z[:, :, (frame + 3) // 4]).sample, atol=2e-5, rtol=0)


@torch.no_grad()
def test_an_image_vae_on_folded_pixels_inflates_too():
    image = image_vae(in_channels=12, widths=(8, 8, 16))
    vae = inflate(image).eval()
    assert (vae.config.patch_size, vae.spatial_compression_ratio) == (2, 8)
    x = random_video(5)
    folded = torch.nn.functional.pixel_unshuffle(x[:, :, 4], 2)
    torch.testing.assert_close(vae.encode(x).latent_dist.mean[:, :, 1], image.encode(folded).latent_dist.mean,
                               atol=2e-5, rtol=0)


def test_inflated_kernels():
    kernel = torch.randn(2, 3, 3, 3)
    tail, average, center = (inflate_kernel(kernel, 3, init) for init in ("tail", "average", "center"))
    assert tail[:, :, 2].equal(kernel) and not tail[:, :, :2].any()
    assert center[:, :, 1].equal(kernel) and not center[:, :, ::2].any()
    torch.testing.assert_close(average.sum(2), kernel)


def test_an_image_vae_of_another_layout_is_refused_by_name():
    odd = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False)
    with pytest.raises(UserError, match="mid_block_add_attention"):
        inflate(odd)


@torch.no_grad()
def test_save_load_and_normalise(tmp_path):
    vae, x = tiny_vae(latents_mean=[1.0, 2, 3, 4], latents_std=[0.5, 1, 2, 4]), random_video(5)
    vae.fuse()
    vae.save_pretrained(tmp_path)
    again = AutoencoderKLODVAE.from_pretrained(tmp_path).eval()
    z = vae.encode(x).latent_dist.mean
    assert again.encode(x).latent_dist.mean.equal(z)
    torch.testing.assert_close(again.denormalize(again.normalize(z)), z)
    torch.testing.assert_close(again.normalize(z)[:, 2], (z[:, 2] - 3) / 2)


def test_gradient_checkpointing_gives_the_same_gradients_and_every_parameter_gets_one():
    gradients = []
    for checkpointing in (False, True):
        vae = tiny_vae().train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        moments, _ = vae.encode_chunk(random_video(5))
        (vae.decode(moments[:, :4] + moments[:, 4:]).sample ** 2).mean().backward()
        gradients.append([p.grad for p in vae.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and plain.any()
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_encode_and_decode_stream_long_clips(monkeypatch):
    vae, x = tiny_vae(), random_video(33)
    whole, _ = vae.encode_chunk(x)
    frames, _ = vae.decode_chunk(whole[:, :4])
    seen = []
    for name in ("encode_chunk", "decode_chunk"):
        step = getattr(vae, name)
        monkeypatch.setattr(vae, name, lambda x, state=None, step=step: seen.append(x.shape[2]) or step(x, state))
    monkeypatch.setattr("odvae.model.shapes.CHUNK_PIXELS", 8 * 16 * 24)
    torch.testing.assert_close(vae.encode(x).latent_dist.parameters, whole, atol=2e-5, rtol=0)
    torch.testing.assert_close(vae.decode(whole[:, :4]).sample, frames, atol=2e-5, rtol=0)
    assert seen == [1, 8, 8, 8, 8] + [2, 2, 2, 2, 1]
    with torch.enable_grad():
        vae.encode(x)
    assert seen[-1] == 33  # with gradients the clip is not split
    vae.enable_slicing()
    both = vae.encode(torch.cat([x, -x])).latent_dist.parameters
    torch.testing.assert_close(both[:1], whole, atol=2e-5, rtol=0)


def change_in_place(vae, source):
    with torch.no_grad():
        for mine, theirs in zip(vae.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs)


def change_data(vae, source):  # as diffusers' EMAModel does; torch counts no version
    for mine, theirs in zip(vae.parameters(), source.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def learn(vae, source):
    del source
    optimizer = torch.optim.SGD(vae.parameters(), lr=0.5)
    vae(random_video(5)).sample.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [change_in_place, change_data, learn,
                                    lambda vae, source: vae.load_state_dict(source.state_dict())])
def test_a_fused_model_follows_its_weights(change):
    source = tiny_vae()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.2)
    fused, plain = tiny_vae(), tiny_vae()
    fused.fuse()
    change(fused, source), change(plain, source)
    z = torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        before = tiny_vae().decode(z).sample
        torch.testing.assert_close(fused.decode(z).sample, plain.decode(z).sample, atol=1e-4, rtol=0)
        assert not torch.allclose(plain.decode(z).sample, before, atol=1e-2)


def test_a_fused_model_has_the_gradients_of_a_plain_one():
    gradients = []
    for fuse in (False, True):
        vae = tiny_vae()
        if fuse:
            with torch.inference_mode():
                vae.fuse()
        vae(random_video(5)).sample.square().mean().backward()
        gradients.append([p.grad for p in vae.parameters()])
    for plain, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, plain)


def test_save_pretrained_works_as_in_diffusers(tmp_path):
    """Variants beside the file that is there, shards, and the names of the arguments that a pipeline looks for."""
    vae, name = tiny_vae(), "diffusion_pytorch_model"
    assert inspect.signature(vae.save_pretrained) == inspect.signature(AutoencoderKL.save_pretrained.__get__(vae))
    vae.fuse()
    vae.save_pretrained(tmp_path)
    whole = (tmp_path / f"{name}.safetensors").read_bytes()
    tiny_vae().half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / f"{name}.safetensors").read_bytes() == whole
    half = AutoencoderKLODVAE.from_pretrained(tmp_path, variant="fp16")
    assert all(p.dtype == torch.float16 for p in load_file(tmp_path / f"{name}.fp16.safetensors").values())
    assert half.state_dict().keys() == vae.state_dict().keys()
    vae.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob(f"{name}-*-of-*.safetensors"))) > 1
    again = AutoencoderKLODVAE.from_pretrained(tmp_path / "shards").state_dict()
    assert all(value.equal(again[key]) for key, value in vae.state_dict().items())
    vae.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / f"{name}.bin").is_file()


@pytest.mark.parametrize("shape", [(0, 3, 5, 16, 16), (1, 3, 0, 16, 16), (1, 3, 5, 0, 16), (1, 3, 5, 16, 0)], ids=str)
def test_an_empty_video_is_refused(shape):
    vae, (b, _, t, h, w) = tiny_vae(), shape
    for call in (lambda: vae.encode(torch.zeros(shape)), lambda: vae(torch.zeros(shape)),
                 lambda: vae.decode(torch.zeros(b, 4, t and 2, h // 8, w // 8))):
        with pytest.raises(UserError):
            call()
    if t:  # a stream's chunk may have no frames
        for stream, x in ((encode_stream, torch.zeros(shape)), (decode_stream, torch.zeros(b, 4, 2, h // 8, w // 8))):
            with pytest.raises(UserError):
                list(stream(vae, [x]))


def test_outputs_of_streams_can_be_trained_on():
    vae, head = tiny_vae(), torch.nn.Conv3d(4, 4, 1)
    latents = torch.cat(list(encode_stream(vae, [random_video(5)])), dim=2)
    frames = torch.cat(list(decode_stream(vae, [latents])), dim=2)
    groups = encode_groups(vae, random_video(5), group=5), decode_groups(vae, latents, group=5)
    for output in (latents, frames, *groups):
        assert not output.is_inference() and not output.requires_grad
    head(latents).square().mean().backward()
    assert head.weight.grad is not None and head.weight.grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_stream_of_non_finite_values_fails(value):
    vae, latents = tiny_vae(), torch.randn(1, 4, 2, 2, 2)
    with pytest.raises(NonFiniteError, match="latents to decode contain NaN"):
        list(decode_stream(vae, [latents * value]))
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = value
    with pytest.raises(NonFiniteError, match=r"the VAE's decoder gave NaN.*decoder\.conv_out\.bias is not finite"):
        list(decode_stream(vae, [latents]))


def test_the_posterior_equals_that_of_diffusers_and_of_torch():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Theirs
    from torch.distributions import Normal, kl_divergence

    images, others = torch.randn(2, 8, 3, 4), torch.randn(2, 8, 3, 4)
    for deterministic in (False, True):
        ours, theirs = DiagonalGaussianDistribution(images, deterministic), Theirs(images, deterministic)
        for name in ("mean", "logvar", "std", "var"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(*(one.sample(torch.Generator().manual_seed(1)) for one in (ours, theirs)))
        value = others[:, :4]
        for one, other in ((ours.kl(), theirs.kl()), (ours.nll(value), theirs.nll(value)),
                           (ours.kl(DiagonalGaussianDistribution(others)), theirs.kl(Theirs(others)))):
            torch.testing.assert_close(one, other.expand_as(one))
    posterior = tiny_vae().encode(random_video(5, batch=2)).latent_dist
    normal = Normal(posterior.mean, posterior.std)
    torch.testing.assert_close(posterior.kl(), kl_divergence(normal, Normal(0.0, 1.0)).flatten(1).sum(1))
    torch.testing.assert_close(posterior.nll(posterior.mode()),
                               -normal.log_prob(posterior.mode()).flatten(1).sum(1))


@torch.no_grad()
def test_scaling_factor_as_in_diffusers():
    z = torch.randn(1, 4, 1, 2, 2)
    vae = tiny_vae(scaling_factor=0.2)
    torch.testing.assert_close(vae.normalize(z), 0.2 * z)
    both = tiny_vae(scaling_factor=0.2, latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    torch.testing.assert_close(both.normalize(z), 0.2 * (z - 1) / 2)
    torch.testing.assert_close(both.denormalize(both.normalize(z)), z)
    assert tiny_vae().config.scaling_factor == 1 and tiny_vae().normalize(z).equal(z)
    assert vae.decode(z, generator=torch.Generator()).sample.equal(vae.decode(z).sample)
