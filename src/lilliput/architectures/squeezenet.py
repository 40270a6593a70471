"""SqueezeNet: the accuracy of AlexNet with a fiftieth of its parameters.

Paper: SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size (Iandola, Han,
Moskewicz, Ashraf, Dally, Keutzer; arXiv 2016; arXiv 1602.07360)

A fire module squeezes its input to few channels with 1x1 convolutions, and expands them with 1x1 and 3x3
convolutions side by side, whose outputs are concatenated. Section 5.1 describes the widths by
metaparameters: fire module i = 0 ... 7 has ``e = base_e + incr_e * floor(i / freq)`` expanding filters, of
which ``pct_3x3 * e`` are 3x3, and ``squeeze_ratio * e`` squeezing ones. The defaults are the paper's network.

====== =========================== ===========================
part   1.0                         1.1
====== =========================== ===========================
conv1  7x7 / 2, 96                 3x3 / 2, 64
pool   before fire 2, 5 and 9      before fire 2, 4 and 6
fire   2 to 9                      2 to 9
conv10 1x1, classes                1x1, classes
====== =========================== ===========================

Section 6's bypasses: ``"simple"`` adds the input of fire 3, 5, 7 and 9, which have as many channels before as
after, to their output; ``"complex"`` does so around the others too, through a 1x1 convolution.

Faithful: layers, biases everywhere, no batch normalization, the ReLU after conv10. Differs: weights are
He-normal, as torchvision's, where the authors used Caffe's xavier filler; conv10's are normal with
deviation 0.01 in both. Names and shapes of the tensors are torchvision's, so its published weights load.
The paper's table says that conv1 leaves 111x111 pixels of 224x224, which holds for images of 227x227. It
gives 7.7 MB for the complex bypass, and its own description makes 1,589,672 parameters, 6.4 MB.

Train it as the authors did with SGD (momentum 0.9, weight decay 2e-4), a rate of 0.04 for batches of
512 that falls linearly to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.registry import architecture
from ..errors import InputError, UnknownName
from ._checks import check_counts, check_probabilities
from ._images import SMALL, ImageNetwork
from ._initialize import he_normal

_BYPASSES = ("none", "simple", "complex")


@architecture
def squeezenet_1_0(
    classes: int = 1000,
    channels: int = 3,
    bypass: str = "none",
    squeeze_ratio: float = 0.125,
    base_e: int = 128,
    incr_e: int = 128,
    freq: int = 2,
    pct_3x3: float = 0.5,
    dropout: float = 0.5,
    small_images: bool = False,
) -> nn.Module:
    """SqueezeNet as the paper has it, for 224x224 images, 1,248,424 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 818,924,576 multiply-adds for
    224x224 pixels, 832,667,936 for the authors' 227x227. With 10 classes 740,554 parameters.

    Args:
        classes: number of outputs.
        channels: of an image.
        bypass: ``"none"``, ``"simple"`` or ``"complex"``, which has 341,248 parameters more.
        squeeze_ratio: squeezing filters of a fire module for each expanding one.
        base_e: expanding filters of the first fire module.
        incr_e: by how many that number grows
            after every ``freq`` fire modules.
        freq: see there.
        pct_3x3: which part of the expanding filters is 3x3.
        dropout: probability before the last convolution.
        small_images: the first convolution is 3x3 with stride 1 and padding, and no pooling follows it, so
            that 32x32 pixels become 8x8 and not 1x1. The published weights then do not fit.

    Raises:
        InputError: a metaparameter leaves a convolution without filters.
        UnknownName: there is no such bypass.

    Example:
        >>> sum(p.numel() for p in squeezenet_1_0().parameters())
        1248424
        >>> squeezenet_1_0(classes=10, small_images=True)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    fires = _fires("squeezenet_1_0", squeeze_ratio, base_e, incr_e, freq, pct_3x3)
    stem = _Stem(96, kernel=7, pools=(2, 5, 9), smallest=21)
    return _SqueezeNet(stem, fires, bypass, classes, channels, dropout, small_images)


@architecture
def squeezenet_1_1(
    classes: int = 1000,
    channels: int = 3,
    bypass: str = "none",
    squeeze_ratio: float = 0.125,
    base_e: int = 128,
    incr_e: int = 128,
    freq: int = 2,
    pct_3x3: float = 0.5,
    dropout: float = 0.5,
    small_images: bool = False,
) -> nn.Module:
    """The authors' later SqueezeNet, as accurate with 2.4 times less work, 1,235,496 parameters.

    Input ``(N, channels, height, width)``, output logits ``(N, classes)``; 349,151,936 multiply-adds for
    224x224 pixels, 387,747,520 for 227x227. With 10 classes 727,626 parameters. The arguments and errors are
    those of :func:`squeezenet_1_0`; ``small_images`` makes 8x8 of 32x32 pixels here too.

    Args:
        classes: number of outputs.
        channels: of an image.
        bypass: ``"none"``, ``"simple"`` or ``"complex"``.
        squeeze_ratio: squeezing filters of a fire module for each expanding one.
        base_e: expanding filters of the first fire module.
        incr_e: by how many that number grows
            after every ``freq`` fire modules.
        freq: see there.
        pct_3x3: which part of the expanding filters is 3x3.
        dropout: probability before the last convolution.
        small_images: no stride and no pooling before the first fire module.

    Example:
        >>> sum(p.numel() for p in squeezenet_1_1().parameters())
        1235496
    """
    fires = _fires("squeezenet_1_1", squeeze_ratio, base_e, incr_e, freq, pct_3x3)
    stem = _Stem(64, kernel=3, pools=(2, 4, 6), smallest=17)
    return _SqueezeNet(stem, fires, bypass, classes, channels, dropout, small_images)


class _Stem(NamedTuple):
    """In what the two versions differ.

    Attributes:
        filters: of conv1.
        kernel: its height and width.
        pools: before which fire modules, counted as in the paper from 2, the map is pooled.
        smallest: pixels a side of which every pooling leaves one.
    """

    filters: int
    kernel: int
    pools: tuple[int, ...]
    smallest: int


class _Widths(NamedTuple):
    """Filters of a fire module."""

    squeeze: int
    expand1x1: int
    expand3x3: int


class _Fire(nn.Module):
    """Squeeze, expand twice, concatenate; and add what the bypass makes of the input."""

    def __init__(self, before: int, widths: _Widths, bypass: str) -> None:
        super().__init__()
        squeeze, expand1x1, expand3x3 = widths
        after = expand1x1 + expand3x3
        self.squeeze = nn.Conv2d(before, squeeze, 1)
        self.squeeze_relu = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeeze, expand1x1, 1)
        self.expand1x1_relu = nn.ReLU()
        self.expand3x3 = nn.Conv2d(squeeze, expand3x3, 3, padding=1)
        self.expand3x3_relu = nn.ReLU()
        self.bypass: nn.Module | None = None
        if bypass != "none" and before == after:
            self.bypass = nn.Identity()
        elif bypass == "complex":
            self.bypass = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.squeeze_relu(self.squeeze(x))
        ones = self.expand1x1_relu(self.expand1x1(squeezed))
        threes = self.expand3x3_relu(self.expand3x3(squeezed))
        expanded = torch.cat([ones, threes], 1)
        return expanded if self.bypass is None else expanded + self.bypass(x)


class _SqueezeNet(ImageNetwork):
    """conv1, eight fire modules with pooling between, conv10, and the mean of its maps."""

    def __init__(
        self, stem: _Stem, fires: list[_Widths], bypass: str,
        classes: int, channels: int, dropout: float, small_images: bool,
    ) -> None:  # fmt: skip
        if bypass not in _BYPASSES:
            raise UnknownName("bypass of SqueezeNet", bypass, _BYPASSES)
        check_counts("squeezenet", classes=classes, channels=channels)
        check_probabilities("squeezenet", dropout=dropout)
        super().__init__(channels, *((4, "") if small_images else (stem.smallest, SMALL)))
        self.features = nn.Sequential(
            *_first(stem, channels, small_images), *_body(stem, fires, bypass, small_images)
        )
        conv10 = nn.Conv2d(sum(fires[-1][1:]), classes, 1)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), conv10, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.apply(he_normal)
        nn.init.normal_(conv10.weight, std=0.01)

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _fires(
    network: str, squeeze_ratio: float, base_e: int, incr_e: int, freq: int, pct_3x3: float
) -> list[_Widths]:
    """The widths of fire 2 to fire 9, by section 5.1."""
    check_counts(network, freq=freq)
    fires = []
    for i in range(8):
        e = base_e + incr_e * (i // freq)
        threes = round(pct_3x3 * e)
        fires.append(_Widths(round(squeeze_ratio * e), e - threes, threes))
    if min(min(fire) for fire in fires) < 1:
        raise InputError(
            f"{network}: squeeze_ratio={squeeze_ratio}, base_e={base_e}, incr_e={incr_e}, freq={freq}, "
            f"pct_3x3={pct_3x3} leave a fire module without filters: {[tuple(f) for f in fires]} are its "
            "squeezing, 1x1 and 3x3 ones. Give a larger base_e or squeeze_ratio, and 0 < pct_3x3 < 1."
        )
    return fires


def _first(stem: _Stem, channels: int, small_images: bool) -> list[nn.Module]:
    if small_images:
        return [nn.Conv2d(channels, stem.filters, 3, padding=1), nn.ReLU()]
    return [nn.Conv2d(channels, stem.filters, stem.kernel, stride=2), nn.ReLU()]


def _body(stem: _Stem, fires: list[_Widths], bypass: str, small_images: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    before = stem.filters
    for number, widths in enumerate(fires, 2):
        if number in (stem.pools[1:] if small_images else stem.pools):
            layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
        layers.append(_Fire(before, widths, bypass))
        before = widths.expand1x1 + widths.expand3x3
    return layers
