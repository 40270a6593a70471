"""Residual networks for ImageNet, table 1 of the paper.

Paper: Deep Residual Learning for Image Recognition (He, Zhang, Ren, Sun; CVPR 2016; arXiv
1512.03385)

A 7x7 convolution and pooling make 56x56 of 224x224 pixels; four groups of blocks follow, each but the
first halving the map. A block is two 3x3 convolutions, or in the deeper networks a bottleneck of 1x1, 3x3
and 1x1 with four times as many channels at its ends. Shortcuts are the paper's option B: a 1x1
convolution where the shape changes. For the paper's networks for CIFAR-10, which are others, see
:mod:`lilliput.architectures.resnet_cifar`.

Faithful: table 1. Differs: a bottleneck halves the map in its 3x3 convolution, not in the first 1x1,
which is how torchvision and nearly all published weights have it, and which costs 6 % more work. Weights
are He-normal. Names and shapes of the tensors are torchvision's, so its published weights load; those of
its ``wide_resnet50_2`` load into ``resnet50(width=2)``.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.registry import architecture
from ._checks import check_counts
from ._images import SMALL, ImageNetwork
from ._initialize import he_normal


@architecture
def resnet18(classes: int = 1000, channels: int = 3, small_images: bool = False) -> nn.Module:
    """ResNet of 18 layers for 224x224 images, 11,689,512 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 1,814,073,344 multiply-adds for
    224x224 pixels.

    Args:
        classes: number of outputs.
        channels: of an image.
        small_images: the first convolution is 3x3 with stride 1, and no pooling follows it, so that 32x32
            pixels become 4x4 and not 1x1. The published weights then do not fit.

    Example:
        >>> sum(p.numel() for p in resnet18().parameters())
        11689512
    """
    return _ResNet(_Basic, [2, 2, 2, 2], 1, classes, channels, small_images)


@architecture
def resnet34(classes: int = 1000, channels: int = 3, small_images: bool = False) -> nn.Module:
    """ResNet of 34 layers for 224x224 images, 21,797,672 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 3,663,761,408 multiply-adds for
    224x224 pixels. The arguments are those of :func:`resnet18`.
    """
    return _ResNet(_Basic, [3, 4, 6, 3], 1, classes, channels, small_images)


@architecture
def resnet50(
    classes: int = 1000, channels: int = 3, width: int = 1, small_images: bool = False
) -> nn.Module:
    """ResNet of 50 layers for 224x224 images, 25,557,032 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 4,089,184,256 multiply-adds for
    224x224 pixels.

    Args:
        classes: number of outputs.
        channels: of an image.
        width: how many times as wide the 3x3 convolutions are; 2 is the Wide-ResNet-50-2 of
            Zagoruyko and Komodakis (2016), with 68,883,240 parameters.
        small_images: see :func:`resnet18`.

    Raises:
        InputError: a count is below 1.
    """
    return _ResNet(_Bottleneck, [3, 4, 6, 3], width, classes, channels, small_images)


class _Basic(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, before: int, inner: int, stride: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 3, stride, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(inner), nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(inner), nn.ReLU()
        self.downsample = _shortcut(before, inner, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        added: Tensor = self.relu2(out + self.downsample(x))
        return added


class _Bottleneck(nn.Module):
    """1x1 to few channels, 3x3, 1x1 back to four times as many."""

    expansion = 4

    def __init__(self, before: int, inner: int, stride: int, width: int) -> None:
        super().__init__()
        after, wide = self.expansion * inner, width * inner
        self.conv1 = nn.Conv2d(before, wide, 1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(wide), nn.ReLU()
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(wide), nn.ReLU()
        self.conv3 = nn.Conv2d(wide, after, 1, bias=False)
        self.bn3, self.relu3 = nn.BatchNorm2d(after), nn.ReLU()
        self.downsample = _shortcut(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        added: Tensor = self.relu3(out + self.downsample(x))
        return added


class _ResNet(ImageNetwork):
    """Table 1; ``blocks`` in each of the four groups."""

    def __init__(
        self, block: type[_Basic | _Bottleneck], blocks: list[int], width: int,
        classes: int, channels: int, small_images: bool,
    ) -> None:  # fmt: skip
        check_counts("resnet", classes=classes, channels=channels, width=width)
        super().__init__(channels, *((8, "") if small_images else (32, SMALL)))
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(64), nn.ReLU()
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, padding=1)
        x = block.expansion
        self.layer1 = _group(block, blocks[0], 64, 64, 1, width)
        self.layer2 = _group(block, blocks[1], 64 * x, 128, 2, width)
        self.layer3 = _group(block, blocks[2], 128 * x, 256, 2, width)
        self.layer4 = _group(block, blocks[3], 256 * x, 512, 2, width)
        self.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(512 * x, classes)
        self.apply(he_normal)

    def logits(self, images: Tensor) -> Tensor:
        out = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(self.avgpool(out))
        return logits


def _group(
    block: type[_Basic | _Bottleneck], blocks: int, before: int, inner: int, stride: int, width: int
) -> nn.Sequential:
    first = block(before, inner, stride, width)
    after = block.expansion * inner
    return nn.Sequential(first, *(block(after, inner, 1, width) for _ in range(blocks - 1)))


def _shortcut(before: int, after: int, stride: int) -> nn.Module:
    """Option B: nothing, or a projection where the shape changes."""
    if stride == 1 and before == after:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(before, after, 1, stride, bias=False),
        nn.BatchNorm2d(after),
    )
