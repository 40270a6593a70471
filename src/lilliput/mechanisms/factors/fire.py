"""A fire module in the place of a convolution: few channels, then 1 x 1 and K x K filters side by side.

Unlike a chain it is no linear map, for a rectifier stands between: it has no single weight, and no single
layer can stand for it. Else it is treated as chains are, and described beside them, as kind ``fire`` with two
ranks: how many filters squeeze, and how many of those that expand are K x K.

The surprising rule: the first outputs are the 1 x 1 filters', the last ones the K x K filters'. Choosing them
would mean to put the channels in order again at each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ...errors import InputError
from .chains import Ranks
from .modules import plain_kind, trains, why_not

FIRE = "fire"


class Fire(nn.Module):
    """Squeeze, rectify, expand twice, concatenate; what follows the convolution follows the module.

    Args:
        squeeze: 1 x 1.
        expand1x1: the stride is the layer's.
        expand3x3: with kernel, stride, padding and dilation of the layer.
        ranks: with which it was made; surgery may have thinned it since.
    """

    kind = FIRE

    def __init__(
        self, squeeze: nn.Module, expand1x1: nn.Module, expand3x3: nn.Module, ranks: Ranks
    ) -> None:
        super().__init__()
        self.squeeze, self.squeeze_relu = squeeze, nn.ReLU()
        self.expand1x1, self.expand3x3 = expand1x1, expand3x3
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, channels, ...)`` to ``(batch, 1 x 1 outputs and then K x K outputs, ...)``."""
        squeezed = self.squeeze_relu(self.squeeze(x))
        return torch.cat([self.expand1x1(squeezed), self.expand3x3(squeezed)], 1)

    def extra_repr(self) -> str:
        """The ranks."""
        return f"squeeze {self.ranks[0]}, expand3x3 {self.ranks[1]}"


def why_no_fire(layer: nn.Module) -> str:
    """Why no fire module can stand for a layer; empty where one can."""
    if reason := why_not(layer, "channel"):
        return reason
    own: Any = layer
    if own.groups > 1:
        return f"it has {own.groups} groups, and a fire module mixes all channels"
    if not all(k % 2 for k in own.kernel_size) or set(own.kernel_size) == {1}:
        return (
            f"its kernel is {_by(own.kernel_size)}, and must have odd sizes and more than a center"
        )
    middle = tuple(d * (k - 1) // 2 for d, k in zip(own.dilation, own.kernel_size, strict=True))
    if own.padding not in ("same", middle):
        return f"its padding is {own.padding}, and must be {middle} for 1 x 1 filters to fit beside"
    if own.out_channels < 2:
        return "it has one output, which cannot be shared by two kinds of filters"
    return ""


def fire_for(layer: nn.Module, ranks: Ranks) -> Fire:
    """A fire module for a convolution, all its numbers zero.

    Args:
        layer: of one group, an odd kernel and the padding that puts its center on the input.
        ranks: filters that squeeze, and filters of the layer's kernel among those that expand.

    Raises:
        InputError: the layer cannot become one, or the ranks do not fit its channels.

    Example:
        >>> fire_for(nn.Conv2d(16, 32, 3, padding=1), (4, 16))(torch.ones(1, 16, 5, 5)).shape
        torch.Size([1, 32, 5, 5])
    """
    if reason := why_no_fire(layer):
        raise InputError(f"{reason}. Leave it as it is.")
    own: Any = layer
    enters, leaves = own.in_channels, own.out_channels
    if len(ranks) != 2 or not (0 < ranks[0] <= enters and 0 < ranks[1] < leaves):
        raise InputError(
            f"{list(ranks)} does not fit a convolution of {enters} to {leaves} channels: 1 to {enters} "
            f"filters squeeze, 1 to {leaves - 1} of those that expand have the kernel."
        )
    squeeze, wide = ranks
    spread = {"padding": own.padding, "dilation": own.dilation, "padding_mode": own.padding_mode}
    return Fire(
        _convolution(own, enters, squeeze, 1),
        _convolution(own, squeeze, leaves - wide, 1, stride=own.stride),
        _convolution(own, squeeze, wide, own.kernel_size, stride=own.stride, **spread),
        ranks,
    ).train(layer.training)


def _convolution(layer: Any, enters: int, leaves: int, kernel: Any, **options: Any) -> nn.Module:
    """With a bias, on the layer's device, of its precision; nothing random is drawn for it."""
    options |= {"device": layer.weight.device, "dtype": layer.weight.dtype}
    made: nn.Module = skip_init(plain_kind(layer), enters, leaves, kernel, **options)
    for parameter in made.parameters():
        nn.init.zeros_(parameter).requires_grad_(trains(layer))
    return made


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
