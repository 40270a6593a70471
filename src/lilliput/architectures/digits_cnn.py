"""A small convolutional network for scikit-learn's 8x8 handwritten digits.

No paper: it is made to train in seconds on one core and still to have enough weights that
compression shows. Weights are He-normal, biases zero.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ..core.registry import architecture
from ._initialize import he_normal


@architecture
def digits_cnn(classes: int = 10) -> nn.Module:
    """Three convolutions and two linear layers for 8x8 images, 48,938 parameters.

    Input ``(N, 1, 8, 8)``, output logits ``(N, classes)``; 624,576 multiply-adds a sample. Both
    counts are for 10 classes.

    Args:
        classes: number of outputs.

    Example:
        >>> sum(p.numel() for p in digits_cnn().parameters())
        48938
    """
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, kernel_size=3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, kernel_size=3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, kernel_size=3, padding=1),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * 2 * 2, 96),
            relu4=nn.ReLU(),
            fc2=nn.Linear(96, classes),
        )
    )
    return network.apply(he_normal)
