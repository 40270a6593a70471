"""Residual networks for 32x32 images, the CIFAR-10 form of the paper's section 4.2.

A network of depth 6n + 2 has three groups of n blocks with 16, 32 and 64 channels. Shortcuts are
the paper's option A, without parameters: where the shape changes they take every second pixel and
pad the missing channels with zeros, half of them before and half after. Weights are He-normal as in
the paper, the last layer's bias is zero. Batch normalization adds its scale and shift to the
parameter count.

Paper: Deep Residual Learning for Image Recognition (He, Zhang, Ren, Sun; CVPR 2016; arXiv
1512.03385)
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad, relu

from ..core.registry import architecture
from ._checks import check_counts
from ._initialize import he_normal


@architecture
def resnet8(classes: int = 10) -> nn.Module:
    """CIFAR ResNet with 1 block a group, 75,290 parameters.

    Input ``(N, 3, 32, 32)``, output logits ``(N, classes)``; 12.2 million multiply-adds a sample.
    All counts in this file are for 10 classes; fewer than 1 is an
    :class:`~lilliput.errors.InputError`.
    """
    return _ResNet(8, classes)


@architecture
def resnet14(classes: int = 10) -> nn.Module:
    """CIFAR ResNet with 2 blocks a group, 172,506 parameters.

    Input ``(N, 3, 32, 32)``, output logits ``(N, classes)``; 26.4 million multiply-adds a sample.
    """
    return _ResNet(14, classes)


@architecture
def resnet20(classes: int = 10) -> nn.Module:
    """CIFAR ResNet with 3 blocks a group, 269,722 parameters.

    Input ``(N, 3, 32, 32)``, output logits ``(N, classes)``; 40.6 million multiply-adds a sample.

    Args:
        classes: number of outputs.

    Example:
        >>> sum(p.numel() for p in resnet20().parameters())
        269722
    """
    return _ResNet(20, classes)


@architecture
def resnet32(classes: int = 10) -> nn.Module:
    """CIFAR ResNet with 5 blocks a group, 464,154 parameters.

    Input ``(N, 3, 32, 32)``, output logits ``(N, classes)``; 68.9 million multiply-adds a sample.
    """
    return _ResNet(32, classes)


@architecture
def resnet44(classes: int = 10) -> nn.Module:
    """CIFAR ResNet with 7 blocks a group, 658,586 parameters.

    Input ``(N, 3, 32, 32)``, output logits ``(N, classes)``; 97.2 million multiply-adds a sample.
    """
    return _ResNet(44, classes)


@architecture
def resnet56(classes: int = 10) -> nn.Module:
    """CIFAR ResNet with 9 blocks a group, 853,018 parameters.

    Input ``(N, 3, 32, 32)``, output logits ``(N, classes)``; 125.5 million multiply-adds a sample.
    """
    return _ResNet(56, classes)


@architecture
def resnet110(classes: int = 10) -> nn.Module:
    """CIFAR ResNet with 18 blocks a group, 1,727,962 parameters.

    Input ``(N, 3, 32, 32)``, output logits ``(N, classes)``; 252.9 million multiply-adds a sample.
    """
    return _ResNet(110, classes)


class _Shortcut(nn.Module):
    """Option A: every second pixel where the stride is 2, and zeros for the missing channels."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        missing = after - before
        self.padding = (0, 0, 0, 0, missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        return pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class _Block(nn.Module):
    """Two 3x3 convolutions with batch normalization, and the shortcut around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else _Shortcut(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return relu(out + self.shortcut(x))


class _ResNet(nn.Module):
    """The network of a given depth, 6n + 2; channels 16, 32, 64 on maps of 32, 16, 8 pixels."""

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        check_counts(f"resnet{depth}", classes=classes)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _group(blocks, 16, 16, stride=1)
        self.layer2 = _group(blocks, 16, 32, stride=2)
        self.layer3 = _group(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)
        self.apply(he_normal)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = adaptive_avg_pool2d(out, 1).flatten(1)
        logits: Tensor = self.linear(out)
        return logits


def _group(blocks: int, before: int, after: int, stride: int) -> nn.Sequential:
    first = _Block(before, after, stride)
    return nn.Sequential(first, *(_Block(after, after, 1) for _ in range(blocks - 1)))
