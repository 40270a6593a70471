"""Network in network: 1x1 convolutions, and the mean of a map for each class in place of linear layers.

Paper: Network In Network (Lin, Chen, Yan; ICLR 2014; arXiv 1312.4400)

Three mlpconv layers: a convolution that sees neighbours, then two 1x1 convolutions, ReLU after each.
Between them overlapping pooling and dropout. The last 1x1 convolution has a filter for each class, and
its maps' means are the logits.

Faithful: widths, kernels and pooling of the authors' network for CIFAR-10 (the paper prints no table; their
published definition has 192, 160, 96 filters, three times 192, then 192, 192 and the classes; a maximum is
pooled first, then a mean). Weights are He-normal.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.registry import architecture
from ._checks import check_counts, check_probabilities
from ._images import ImageNetwork
from ._initialize import he_normal


@architecture
def nin(classes: int = 10, channels: int = 3, dropout: float = 0.5) -> nn.Module:
    """Network in network for 32x32 images, 966,986 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 222,486,528 multiply-adds for
    32x32 pixels.

    Args:
        classes: number of outputs.
        channels: of an image.
        dropout: probability after each pooling.

    Raises:
        InputError: a count is below 1, or the dropout no probability below 1.

    Example:
        >>> sum(p.numel() for p in nin().parameters())
        966986
    """
    check_counts("nin", classes=classes, channels=channels)
    check_probabilities("nin", dropout=dropout)
    return _NIN(classes, channels, dropout)


class _NIN(ImageNetwork):
    """Three mlpconv layers."""

    def __init__(self, classes: int, channels: int, dropout: float) -> None:
        super().__init__(channels, smallest=4)
        self.mlpconv1 = _mlpconv(channels, 5, (192, 160, 96))
        self.pool1 = nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout))
        self.mlpconv2 = _mlpconv(96, 5, (192, 192, 192))
        self.pool2 = nn.Sequential(nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout))
        self.mlpconv3 = _mlpconv(192, 3, (192, 192, classes))
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.apply(he_normal)

    def logits(self, images: Tensor) -> Tensor:
        out = self.pool1(self.mlpconv1(images))
        out = self.pool2(self.mlpconv2(out))
        logits: Tensor = self.mean(self.mlpconv3(out))
        return logits


def _mlpconv(before: int, kernel: int, widths: tuple[int, int, int]) -> nn.Sequential:
    """A convolution and two 1x1 convolutions, ReLU after each."""
    first, second, third = widths
    return nn.Sequential(
        nn.Conv2d(before, first, kernel, padding=kernel // 2), nn.ReLU(),
        nn.Conv2d(first, second, 1), nn.ReLU(),
        nn.Conv2d(second, third, 1), nn.ReLU(),
    )  # fmt: skip
