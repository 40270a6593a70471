"""AlexNet, in the form of the papers that compress it and in torchvision's.

Paper: ImageNet Classification with Deep Convolutional Neural Networks (Krizhevsky, Sutskever, Hinton;
NIPS 2012)

Paper: One weird trick for parallelizing convolutional neural networks (Krizhevsky; arXiv 2014; arXiv
1404.5997)

The first is Caffe's "AlexNet" of the tables of pruning and quantization papers, 61 million parameters or
240 MB, of which fc1 (``classifier.1``) has 38 million. Its second, fourth and fifth convolution see half
of the channels each, since the network once lay on two GPUs: ``groups=2``. The second paper's is not
divided and has other widths; its tensors have torchvision's names and shapes, so its published weights
load.

Faithful: widths, groups, overlapping pooling, response normalization before pooling, dropout. Differs:
weights are He-normal and biases zero, where the first paper draws weights with deviation 0.01 and sets
some biases to 1; the map is averaged to 6x6 pixels before the linear layers, which changes nothing for
227x227 pixels (the paper says 224, and means that) and lets images of other sizes in.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.registry import architecture
from ._checks import check_counts, check_probabilities
from ._images import SMALL, ImageNetwork
from ._initialize import he_normal


@architecture
def alexnet(
    classes: int = 1000,
    channels: int = 3,
    hidden: int = 4096,
    response_norm: bool = True,
    dropout: float = 0.5,
    small_images: bool = False,
) -> nn.Module:
    """AlexNet of 2012, on two towers, for 227x227 images, 60,965,224 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 724,406,816 multiply-adds for
    227x227 pixels. 60,954,656 of the parameters are weights.

    Args:
        classes: number of outputs.
        channels: of an image.
        hidden: units of each of the two hidden linear layers.
        response_norm: normalize across channels after the first two ReLUs, without parameters. It ties
            the channels of those layers, so that none of them can be cut out.
        dropout: probability before the first two linear layers.
        small_images: the first convolution is 3x3 with stride 1, and no pooling follows it, so that 32x32
            pixels become 7x7. The parameters then are 32,256 fewer.

    Raises:
        InputError: a count is below 1, or the dropout no probability below 1.

    Example:
        >>> net = alexnet(classes=10, hidden=64, small_images=True)
        >>> sum(p.numel() for p in net.features.parameters())
        2301824
    """
    check_counts("alexnet", classes=classes, channels=channels, hidden=hidden)
    check_probabilities("alexnet", dropout=dropout)
    first = (3, 1, 1) if small_images else (11, 4, 0)
    pool = [] if small_images else [nn.MaxPool2d(3, 2)]
    features = nn.Sequential(
        nn.Conv2d(channels, 96, *first), nn.ReLU(), *_norm(response_norm), *pool,
        nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), *_norm(response_norm), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    return _AlexNet(channels, features, 7 if small_images else 67, hidden, classes, dropout)


@architecture
def alexnet_owt(
    classes: int = 1000,
    channels: int = 3,
    hidden: int = 4096,
    dropout: float = 0.5,
    small_images: bool = False,
) -> nn.Module:
    """AlexNet of "one weird trick", torchvision's, for 224x224 images, 61,100,840 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 714,188,480 multiply-adds for
    224x224 pixels. Arguments and errors are those of :func:`alexnet`.

    Args:
        classes: number of outputs.
        channels: of an image.
        hidden: units of each of the two hidden linear layers.
        dropout: probability before the first two linear layers.
        small_images: see :func:`alexnet`; the parameters then are 21,504 fewer.
    """
    check_counts("alexnet_owt", classes=classes, channels=channels, hidden=hidden)
    check_probabilities("alexnet_owt", dropout=dropout)
    first = (3, 1, 1) if small_images else (11, 4, 2)
    pool = [] if small_images else [nn.MaxPool2d(3, 2)]
    features = nn.Sequential(
        nn.Conv2d(channels, 64, *first), nn.ReLU(), *pool,
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    return _AlexNet(channels, features, 7 if small_images else 63, hidden, classes, dropout)


class _AlexNet(ImageNetwork):
    """Convolutions that end with 256 maps, and three linear layers."""

    def __init__(
        self, channels: int, features: nn.Sequential, smallest: int,
        hidden: int, classes: int, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__(channels, smallest, SMALL if smallest > 7 else "")
        self.features = features
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(256 * 6 * 6, hidden), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, classes),
        )  # fmt: skip
        self.apply(he_normal)

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(images)))
        return logits


def _norm(wanted: bool) -> list[nn.Module]:
    """Section 3.3's normalization across five channels; its alpha is of the sum, torch's of the mean."""
    return [nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)] if wanted else []
