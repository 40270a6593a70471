"""MobileNetV2, whose residual blocks are thin where they are added, and end without an activation.

Paper: MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler, Howard, Zhu, Zhmoginov, Chen; CVPR
2018; arXiv 1801.04381)

A block expands its input t times with a 1x1 convolution, filters each channel by itself (3x3, depthwise),
and projects onto few channels with another 1x1 convolution. Batch normalization follows each of the
three, ReLU6 the first two only: a bottleneck is linear, since ReLU would lose what few channels hold.
Input and output are added where they have the same shape.

Faithful: table 2, with t = 1 meaning that there is no expansion. Differs: weights are He-normal. Names
and shapes of the tensors are torchvision's, so its published weights load. With ``width`` the channels
become multiples of 8 that lose at most a tenth, as in the authors' code; the last convolution is never
thinner than 1280. The paper prints 3.4 million parameters, which leaves normalization out, and 6.9
million for width 1.4, which nobody else counts.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..core.registry import architecture
from ..errors import InputError
from ._checks import check_counts, check_probabilities
from ._images import SMALL, ImageNetwork
from ._initialize import he_normal

#: Table 2: expansion t, channels c, blocks n, stride s of the first.
_TABLE = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@architecture
def mobilenet_v2(
    classes: int = 1000,
    width: float = 1.0,
    channels: int = 3,
    dropout: float = 0.2,
    small_images: bool = False,
) -> nn.Module:
    """MobileNetV2 for 224x224 images or smaller ones, 3,504,872 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 300,774,272 multiply-adds for
    224x224 pixels.

    ===== ========== ============ ============ ============ ============ ===========
    width parameters 224x224      192x192      160x160      128x128      96x96
    ===== ========== ============ ============ ============ ============ ===========
    1.4    6,108,776  582,195,824
    1.3    5,386,792  509,374,560
    1.0    3,504,872  300,774,272  221,316,608  154,083,200   99,074,048  56,289,152
    0.75   2,636,424  209,069,792
    0.5    1,968,680   97,131,840
    0.35   1,677,128   59,285,808
    ===== ========== ============ ============ ============ ============ ===========

    Args:
        classes: number of outputs.
        width: the width multiplier.
        channels: of an image.
        dropout: probability before the last layer.
        small_images: the first two strides are 1, so that 32x32 pixels become 4x4 and not 1x1. Tensors keep
            their shapes.

    Raises:
        InputError: the width is no positive number.

    Example:
        >>> sum(p.numel() for p in mobilenet_v2().parameters())
        3504872
    """
    check_counts("mobilenet_v2", classes=classes, channels=channels)
    check_probabilities("mobilenet_v2", dropout=dropout)
    if not 0 < width < math.inf:
        raise InputError(f"mobilenet_v2: width={width} leaves no channels: give a positive number.")
    return _MobileNetV2(width, channels, classes, dropout, small_images)


def divisible(channels: float, by: int = 8) -> int:
    """The multiple nearest to a width, and the next one where that lost more than a tenth.

    Example:
        >>> divisible(24 * 0.35), divisible(16 * 1.4), divisible(1)
        (8, 24, 8)
    """
    nearest = max(by, by * math.floor(channels / by + 0.5))
    return nearest + by if nearest < 0.9 * channels else nearest


class _Block(nn.Module):
    """An inverted residual with a linear bottleneck."""

    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * before
        layers = [_normed(before, inner, 1)] if expansion > 1 else []
        layers.append(_normed(inner, inner, 3, stride, groups=inner))
        projection = nn.Conv2d(inner, after, 1, bias=False)
        self.conv = nn.Sequential(*layers, projection, nn.BatchNorm2d(after))
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class _MobileNetV2(ImageNetwork):
    """Table 2."""

    def __init__(
        self, width: float, channels: int, classes: int, dropout: float, small_images: bool
    ) -> None:
        super().__init__(channels, *((8, "") if small_images else (32, SMALL)))
        before, last = divisible(32 * width), divisible(1280 * max(1.0, width))
        layers: list[nn.Module] = [_normed(channels, before, 3, 1 if small_images else 2)]
        for t, c, n, s in _TABLE:
            after = divisible(c * width)
            first = 1 if small_images and c == 24 else s
            for stride in (first, *[1] * (n - 1)):
                layers.append(_Block(before, after, stride, t))
                before = after
        self.features = nn.Sequential(*layers, _normed(before, last, 1))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, classes))
        self.apply(he_normal)

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(images)))
        return logits


def _normed(
    before: int, after: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution, batch normalization, ReLU6."""
    padding = kernel // 2
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU6(),
    )
