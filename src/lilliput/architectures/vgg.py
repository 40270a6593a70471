"""VGG-16: thirteen 3x3 convolutions between five poolings, for ImageNet and for CIFAR-10.

Paper: Very Deep Convolutional Networks for Large-Scale Image Recognition (Simonyan, Zisserman; ICLR 2015;
arXiv 1409.1556)

Paper: Pruning Filters for Efficient ConvNets (Li, Kadav, Durdanovic, Samet, Graf; ICLR 2017; arXiv
1608.08710)

Configuration D of the first paper's table 1. Of its 138 million parameters the first linear layer has 103
million. The second paper's table 2 describes the form that papers prune on CIFAR-10: the same
convolutions with batch normalization, and one hidden linear layer of 512 units.

Faithful: widths and layers. Differs: weights are He-normal. Names and shapes of the tensors of ``vgg16`` are
torchvision's, so its published weights load, with ``norm=True`` those of its ``vgg16_bn``.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.registry import architecture
from ._checks import check_counts, check_probabilities
from ._images import ImageNetwork
from ._initialize import he_normal

#: Configuration D: widths of the convolutions up to each pooling.
_GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


@architecture
def vgg16(
    classes: int = 1000,
    channels: int = 3,
    hidden: int = 4096,
    norm: bool = False,
    dropout: float = 0.5,
) -> nn.Module:
    """VGG-16 for 224x224 images, 138,357,544 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 15,470,264,320 multiply-adds for
    224x224 pixels. The maps are averaged to 7x7 pixels before the linear layers, which changes nothing for
    224x224 pixels; for small images :func:`vgg16_cifar` is meant.

    Args:
        classes: number of outputs.
        channels: of an image.
        hidden: units of each of the two hidden linear layers.
        norm: batch normalization after each convolution.
        dropout: probability before the last two linear layers.

    Raises:
        InputError: a count is below 1, or the dropout no probability below 1.

    Example:
        >>> sum(p.numel() for p in vgg16(hidden=1).features.parameters())
        14714688
    """
    check_counts("vgg16", classes=classes, channels=channels, hidden=hidden)
    check_probabilities("vgg16", dropout=dropout)
    classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, hidden), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )  # fmt: skip
    return _VGG(channels, norm, 7, classifier, "use vgg16_cifar, which is made for 32x32 pixels")


@architecture
def vgg16_cifar(
    classes: int = 10, channels: int = 3, hidden: int = 512, dropout: float = 0.5
) -> nn.Module:
    """VGG-16 with batch normalization for 32x32 images, 14,991,946 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 313,463,808 multiply-adds for
    32x32 pixels.

    Args:
        classes: number of outputs.
        channels: of an image.
        hidden: units of the hidden linear layer.
        dropout: probability before the last linear layer.

    Raises:
        InputError: a count is below 1, or the dropout no probability below 1.

    Example:
        >>> sum(p.numel() for p in vgg16_cifar().parameters())
        14991946
    """
    check_counts("vgg16_cifar", classes=classes, channels=channels, hidden=hidden)
    check_probabilities("vgg16_cifar", dropout=dropout)
    classifier = nn.Sequential(
        nn.Linear(512, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )  # fmt: skip
    return _VGG(channels, True, 1, classifier, "pad 28x28 pixels to 32x32")


class _VGG(ImageNetwork):
    """Configuration D up to the last pooling, and what classifies its maps of ``side`` x ``side`` pixels."""

    def __init__(
        self, channels: int, norm: bool, side: int, classifier: nn.Sequential, remedy: str
    ) -> None:
        super().__init__(channels, 32, remedy)
        self.features = nn.Sequential()
        before = channels
        for group in _GROUPS:
            for after in group:
                self.features.append(nn.Conv2d(before, after, 3, padding=1))
                if norm:
                    self.features.append(nn.BatchNorm2d(after))
                self.features.append(nn.ReLU())
                before = after
            self.features.append(nn.MaxPool2d(2))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
        self.classifier = classifier
        self.apply(he_normal)

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(images)))
        return logits
