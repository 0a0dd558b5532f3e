"""I3D on RGB (Carreira & Zisserman 2017, arXiv 1705.07750), whose Kinetics-400 logits are the features of published FVD
(Unterthiner et al. 2018, arXiv 1812.01717). Its weights are not shipped, the user provides them in a file.

Parameter names are those of the PyTorch ports (`rgb_imagenet.pt` of pytorch-i3d, `i3d_pretrained_400.pt` of VideoGPT),
so that their files load as they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..utils.errors import UserError
from .weights import load_exactly, read_weights

NAME = "rFVD"
MIN_FRAMES = 9  # time is halved three times, rounding up, and the last pooling needs two frames
SIDE = 224  # pixels, as in training
CLASSES = 400

Size = tuple[int, int, int]  # time, height, width
Widths = tuple[int, int, int, int, int, int]  # 1x1; 1x1 -> 3x3; 1x1 -> 3x3; pool -> 1x1

STEM: dict[str, tuple[int, int, int, int]] = {  # in_channels, out_channels, kernel, stride
    "Conv3d_1a_7x7": (3, 64, 7, 2), "Conv3d_2b_1x1": (64, 64, 1, 1), "Conv3d_2c_3x3": (64, 192, 3, 1)}
MIXED: dict[str, Widths] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32), "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64), "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64), "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128), "Mixed_5c": (384, 192, 384, 48, 128, 128)}
POOLED: dict[str, tuple[Size, Size]] = {  # max pooling (kernel, stride) before these
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)), "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}


def pad_same(x: Tensor, kernel: Size, stride: Size) -> Tensor:
    """Pad (..., T, H, W) with zeros as TensorFlow's "SAME" does: ceil(n / stride) outputs, the odd zero at the end.

    Zeros also suit the max poolings, whose inputs are never negative.
    """
    pad: list[int] = []
    for n, k, s in reversed(list(zip(x.shape[-3:], kernel, stride, strict=True))):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pad += [total // 2, total - total // 2]
    return F.pad(x, pad)


def max_pool(x: Tensor, kernel: Size, stride: Size) -> Tensor:
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU; with `plain` (for the logits) only a convolution with a bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, *,
                 plain: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=plain)
        self.bn = None if plain else nn.BatchNorm3d(out_channels, eps=1e-3)  # TensorFlow's, which is not in the files

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        x = self.conv3d(pad_same(x, kernel, stride))  # type: ignore[arg-type]
        return x if self.bn is None else F.relu(self.bn(x))


class Mixed(nn.Module):
    """An Inception block: four parallel branches."""

    def __init__(self, in_channels: int, widths: Widths) -> None:
        super().__init__()
        self.b0 = Unit(in_channels, widths[0])
        self.b1a, self.b1b = Unit(in_channels, widths[1]), Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = Unit(in_channels, widths[3]), Unit(widths[3], widths[4], 3)
        self.b3b = Unit(in_channels, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3D(nn.Module):
    """Videos (B, 3, T, H, W) in [-1, 1], T from 9 -> logits (B, 400), the mean over time; frozen, always in eval mode.

    Frames of another size are resized to 224x224 by bilinear interpolation, aspect not kept, as in published FVD (by
    TensorFlow 1, whose grid differs a little from PyTorch's). Ports differ in details that are not in the files:
    VideoGPT feeds [-0.5, 0.5] and has 1e-5 as batch norm's eps; DeepMind's network has [-1, 1] and 1e-3, as here.
    """

    dim = CLASSES

    def __init__(self) -> None:
        super().__init__()
        for name, (in_channels, out_channels, kernel, stride) in STEM.items():
            self.add_module(name, Unit(in_channels, out_channels, kernel, stride))
        width = out_channels
        for name, widths in MIXED.items():
            self.add_module(name, Mixed(width, widths))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = Unit(width, CLASSES, plain=True)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> I3D:
        return super().train(False)  # batch statistics would make features depend on the rest of the batch

    def forward(self, video: Tensor) -> Tensor:
        """Raises UserError below 9 frames."""
        if video.shape[2] < MIN_FRAMES:
            raise UserError(f"{NAME} needs clips of at least {MIN_FRAMES} frames (published values use 16), and this "
                            f"one has {video.shape[2]}; give --frames {MIN_FRAMES} or more, or leave --rfvd out")
        if video.shape[3:] != (SIDE, SIDE):
            frames = F.interpolate(rearrange(video, "b c t h w -> (b t) c h w"), (SIDE, SIDE), mode="bilinear")
            video = rearrange(frames, "(b t) c h w -> b c t h w", b=len(video))
        x = video
        for name in (*STEM, *MIXED):
            if name in POOLED:
                x = max_pool(x, *POOLED[name])
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), 1)
        logits: Tensor = self.logits(x)
        return logits.mean((2, 3, 4))


def load_i3d(weights: Path | str) -> I3D:
    """Load the network with the weights of a .pt, .pth or .safetensors file; every key must match.

    The counters of batch norm (`num_batches_tracked`), which older files lack, are ignored.

    Raises:
        UserError: no such file, one that cannot be read without unpickling, or keys or shapes that do not match, naming
            them.
    """
    model = I3D()
    load_exactly(model, read_weights(Path(weights)), f"{weights} does not hold I3D with {CLASSES} classes")
    return model
