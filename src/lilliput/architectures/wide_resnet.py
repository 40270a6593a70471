"""Wide residual networks for 32x32 images: few layers, many channels, activation before convolution.

Paper: Wide Residual Networks (Zagoruyko, Komodakis; BMVC 2016; arXiv 1605.07146)

WRN-d-k has three groups of n = (d - 4) / 6 blocks with 16k, 32k and 64k channels (table 1). A block is
twice batch normalization, ReLU and a 3x3 convolution, with dropout between the convolutions. Where the
shape changes the shortcut is a 1x1 convolution of the input after its first normalization and ReLU, which
both paths then share.

Faithful: table 1, no biases but the last layer's, no activation after the addition. The networks that
distillation papers compare are WRN-16-1, -16-2, -40-1, -40-2. For the ImageNet network of the same
authors see ``width`` of :func:`~lilliput.architectures.resnet_imagenet.resnet50`.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.registry import architecture
from ..errors import InputError
from ._checks import check_counts, check_probabilities
from ._images import ImageNetwork
from ._initialize import he_normal


@architecture
def wide_resnet(
    depth: int = 28, width: int = 10, classes: int = 10, channels: int = 3, dropout: float = 0.0
) -> nn.Module:
    """WRN-28-10, or of another depth and width, for 32x32 images, 36,479,194 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 5,243,328,768 multiply-adds for
    32x32 pixels. Parameters of others, for 10 classes: WRN-16-1 175,066, WRN-16-2 691,674, WRN-40-1 563,930,
    WRN-40-2 2,243,546, WRN-16-8 10,961,370, WRN-40-4 8,949,210.

    Args:
        depth: of the paper's count, 6n + 4.
        width: times 16, 32 and 64 channels.
        classes: number of outputs.
        channels: of an image.
        dropout: probability between the convolutions of a block; 0.3 for CIFAR in the paper, where used.

    Raises:
        InputError: no such depth, or a count below 1.

    Example:
        >>> sum(p.numel() for p in wide_resnet(16, 1).parameters())
        175066
    """
    check_counts("wide_resnet", width=width, classes=classes, channels=channels)
    check_probabilities("wide_resnet", dropout=dropout)
    if depth < 10 or depth % 6 != 4:
        near = 6 * max(1, round((depth - 4) / 6)) + 4
        raise InputError(f"wide_resnet: depth={depth} is not 6n + 4 with n > 0; {near} is.")
    return _WideResNet((depth - 4) // 6, width, classes, channels, dropout)


class _Block(nn.Module):
    """Normalization, ReLU, convolution; twice."""

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(before), nn.ReLU()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(after), nn.ReLU()
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride > 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out: Tensor = self.conv2(self.drop(self.relu2(self.bn2(self.conv1(active)))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class _WideResNet(ImageNetwork):
    """Table 1, with ``blocks`` a group."""

    def __init__(
        self, blocks: int, width: int, classes: int, channels: int, dropout: float
    ) -> None:
        super().__init__(channels, smallest=4)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.layer1 = _group(blocks, 16, 16 * width, 1, dropout)
        self.layer2 = _group(blocks, 16 * width, 32 * width, 2, dropout)
        self.layer3 = _group(blocks, 32 * width, 64 * width, 2, dropout)
        self.bn, self.relu = nn.BatchNorm2d(64 * width), nn.ReLU()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(64 * width, classes)
        self.apply(he_normal)

    def logits(self, images: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: Tensor = self.fc(self.pool(self.relu(self.bn(out))))
        return logits


def _group(blocks: int, before: int, after: int, stride: int, dropout: float) -> nn.Sequential:
    first = _Block(before, after, stride, dropout)
    return nn.Sequential(first, *(_Block(after, after, 1, dropout) for _ in range(blocks - 1)))
