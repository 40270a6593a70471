"""A small convolutional network for scikit-learn's 8x8 handwritten digits.

No paper: it is made to train in seconds on one core and still to have enough weights that
compression shows. Weights are He-normal, biases zero.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ..core.registry import architecture
from ._checks import check_counts
from ._initialize import he_normal


@architecture
def digits_cnn(classes: int = 10, width: int = 16, depth: int = 1) -> nn.Module:
    """Three convolutions and two linear layers for 8x8 images, 48,938 parameters.

    Input ``(N, 1, 8, 8)``, output logits ``(N, classes)``; 624,576 multiply-adds a sample. Both
    counts are for the defaults.

    Args:
        classes: number of outputs.
        width: channels of the first convolution; the others have 2 and 4 times as many, the hidden
            linear layer has 6 times as many units.
        depth: how often each convolution stands, with its ReLU. The repeated ones, ``conv2_2`` and so on,
            keep the number of channels, so that a deeper network can grow out of a shallower one.

    Raises:
        InputError: a count is below 1.

    Example:
        >>> sum(p.numel() for p in digits_cnn().parameters())
        48938
    """
    check_counts("digits_cnn", classes=classes, width=width, depth=depth)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate(
        [(1, width), (width, 2 * width), (2 * width, 4 * width)], 1
    ):
        _repeat(layers, number, before, after, depth)
        if number > 1:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(4 * width * 2 * 2, 6 * width)
    layers["relu4"] = nn.ReLU()
    layers["fc2"] = nn.Linear(6 * width, classes)
    return nn.Sequential(layers).apply(he_normal)


def _repeat(
    layers: OrderedDict[str, nn.Module], number: int, before: int, after: int, depth: int
) -> None:
    """Add a convolution and its ReLU, and ``depth - 1`` more that keep the number of channels."""
    for place in range(1, depth + 1):
        name = str(number) if place == 1 else f"{number}_{place}"
        channels = before if place == 1 else after
        layers[f"conv{name}"] = nn.Conv2d(channels, after, kernel_size=3, padding=1)
        layers[f"relu{name}"] = nn.ReLU()
