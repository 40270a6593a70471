"""MobileNet, whose convolutions are depthwise separable.

Paper: MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications (Howard, Zhu, Chen,
Kalenichenko, Wang, Weyand, Andreetto, Adam; arXiv 2017; arXiv 1704.04861)

A 3x3 convolution of each channel by itself (depthwise), then a 1x1 convolution across channels
(pointwise), each followed by batch normalization and ReLU. That costs ``1 / N + 1 / 9`` of a 3x3
convolution with N filters. The two multipliers of sections 3.3 and 3.4: ``width`` thins every layer to
``floor(width * channels)``; the resolution multiplier is nothing but the size of the images (224, 192,
160 or 128 pixels a side), of which the network takes any.

Faithful: table 1. Differs: the table's last depthwise convolution has stride 2 and keeps 7x7 pixels, of
which only the second can be meant: its stride is 1 here as everywhere. Weights are He-normal. Names and
shapes of the tensors are those of timm's ``mobilenetv1_100``, whose weights load and want
``activation="relu6"``, which the authors' code has in place of the paper's ReLU.

Depthwise weights want little or no weight decay, says section 3.2.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from ..core.registry import architecture
from ..errors import InputError, UnknownName
from ._checks import check_counts, check_probabilities
from ._images import SMALL, ImageNetwork
from ._initialize import he_normal

#: Table 1 after the first convolution: filters of the pointwise convolution, stride of the depthwise one;
#: one row for each size of the map.
_STAGES: list[list[tuple[int, int]]] = [
    [(64, 1)],
    [(128, 2), (128, 1)],
    [(256, 2), (256, 1)],
    [(512, 2), *[(512, 1)] * 5],
    [(1024, 2), (1024, 1)],
]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}


@architecture
def mobilenet_v1(
    classes: int = 1000,
    width: float = 1.0,
    channels: int = 3,
    activation: str = "relu",
    dropout: float = 0.0,
    small_images: bool = False,
) -> nn.Module:
    """MobileNet for 224x224 images or smaller ones, 4,231,976 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 568,740,352 multiply-adds for
    224x224 pixels.

    ===== ========== ============ ============ ============ ============
    width parameters 224x224      192x192      160x160      128x128
    ===== ========== ============ ============ ============ ============
    1.0    4,231,976  568,740,352  418,121,728  290,675,200  186,400,768
    0.75   2,585,560  325,400,448
    0.5    1,331,592  149,497,088
    0.25     470,072   41,030,272
    ===== ========== ============ ============ ============ ============

    Args:
        classes: number of outputs.
        width: the width multiplier.
        channels: of an image.
        activation: ``"relu"``, or ``"relu6"`` as in the published networks.
        dropout: probability before the last layer.
        small_images: the first two strides are 1, so that 32x32 pixels become 4x4 and not 1x1. Tensors keep
            their shapes.

    Raises:
        InputError: the width leaves a layer without channels.
        UnknownName: there is no such activation.

    Example:
        >>> sum(p.numel() for p in mobilenet_v1().parameters())
        4231976
    """
    check_counts("mobilenet_v1", classes=classes, channels=channels)
    check_probabilities("mobilenet_v1", dropout=dropout)
    if not 1 <= 32 * width < math.inf:
        raise InputError(
            f"mobilenet_v1: width={width} leaves the first convolution, of 32 filters, without any. Give at "
            "least 1/32."
        )
    if activation not in _ACTIVATIONS:
        raise UnknownName("activation", activation, _ACTIVATIONS)
    return _MobileNet(width, channels, classes, _ACTIVATIONS[activation], dropout, small_images)


class _Separable(nn.Module):
    """Depthwise and pointwise, each with batch normalization and activation."""

    def __init__(self, before: int, after: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(
            before, before, 3, stride=stride, padding=1, groups=before, bias=False
        )
        self.bn1 = nn.BatchNorm2d(before)
        self.relu1 = activation()
        self.conv_pw = nn.Conv2d(before, after, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        depthwise = self.relu1(self.bn1(self.conv_dw(x)))
        pointwise: Tensor = self.relu2(self.bn2(self.conv_pw(depthwise)))
        return pointwise


class _MobileNet(ImageNetwork):
    """Table 1."""

    def __init__(
        self, width: float, channels: int, classes: int,
        activation: type[nn.Module], dropout: float, small_images: bool,
    ) -> None:  # fmt: skip
        super().__init__(channels, *((8, "") if small_images else (32, SMALL)))
        before = int(32 * width)
        stride = 1 if small_images else 2
        self.conv_stem = nn.Conv2d(channels, before, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.relu1 = activation()
        self.blocks = nn.Sequential()
        for number, stage in enumerate(_STAGES):
            strides = [1 if number == 1 and small_images else stride for _, stride in stage]
            widths = [before, *(int(filters * width) for filters, _ in stage)]
            self.blocks.append(_stage(widths, strides, activation))
            before = widths[-1]
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Linear(before, classes)
        self.apply(he_normal)

    def logits(self, images: Tensor) -> Tensor:
        maps = self.blocks(self.relu1(self.bn1(self.conv_stem(images))))
        logits: Tensor = self.classifier(self.drop(self.pool(maps)))
        return logits


def _stage(widths: list[int], strides: list[int], activation: type[nn.Module]) -> nn.Sequential:
    pairs = zip(pairwise(widths), strides, strict=True)
    return nn.Sequential(*(_Separable(*both, stride, activation) for both, stride in pairs))
