"""A small convolutional classifier of spectrograms, for single spoken words.

Paper: Convolutional Neural Networks for Small-footprint Keyword Spotting (Sainath, Parada;
Interspeech 2015)
"""

from __future__ import annotations

from torch import nn

from ..core.registry import architecture
from ._checks import check_counts
from ._initialize import he_normal


@architecture
def speech_cnn(width: int = 32, classes: int = 10) -> nn.Module:
    """Three convolutions over time and frequency and a linear classifier, 94,186 parameters.

    Input ``(batch, frames, bands)``, at least 8 of each; output logits ``(batch, classes)``. The paper's idea
    (convolutions over both axes of a spectrogram) with today's small kernels and normalization.

    Args:
        width: channels of the first convolution; the next ones have twice and four times as many.
        classes: number of outputs.

    Raises:
        InputError: a count is below 1.

    Example:
        >>> import torch
        >>> speech_cnn(width=8)(torch.zeros(2, 63, 40)).shape
        torch.Size([2, 10])
    """
    check_counts("speech_cnn", width=width, classes=classes)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, -1))]
    before = 1
    for factor in (1, 2, 4):
        after = factor * width
        layers += [
            nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        before = after
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)]
    return nn.Sequential(*layers).apply(he_normal)
