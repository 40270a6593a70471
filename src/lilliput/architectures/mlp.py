"""A fully connected network of any widths, by default the one that structured sparsity learning thins.

Weights are drawn as by Caffe's "xavier" filler, uniform in ±sqrt(3 / fan-in), biases are zero. With
``bottleneck`` the first layer is a product of two, as for the wide students of Ba and Caruana.

Paper: Learning Structured Sparsity in Deep Neural Networks (Wen, Wu, Wang, Chen, Li; NIPS 2016; arXiv
1608.03665)

Paper: Do Deep Nets Really Need to be Deep? (Ba, Caruana; NIPS 2014; arXiv 1312.6184)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ..core.registry import architecture
from ..errors import InputError, UnknownName
from ._checks import check_counts, check_probabilities
from ._initialize import caffe_xavier

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


@architecture
def mlp(
    hidden: Sequence[int] = (500, 300),
    inputs: int = 784,
    classes: int = 10,
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    activation: str = "relu",
    bottleneck: int | None = None,
    norm: bool = False,
) -> nn.Module:
    """Linear layers with ReLU between them, 784-500-300-10 by default, 545,810 parameters.

    Input ``(N, ...)`` with ``inputs`` numbers an example, output logits ``(N, classes)``.

    Args:
        hidden: units of each hidden layer; their layers are called fc1, fc2 and so on.
        inputs: numbers of an example, whatever their shape.
        classes: number of outputs.
        dropout: probability with which a hidden unit is dropped in training; 0 has no such layers.
        input_dropout: probability with which an input is dropped.
        activation: ``"relu"``, ``"tanh"`` or ``"sigmoid"``; its layers are called relu1, tanh1, sigmoid1.
        bottleneck: units k of a linear layer without bias before fc1. Its weight V ``(k, inputs)`` and that
            of fc1, U ``(hidden[0], k)``, stand for fc1's W = U V, which a wide layer learns faster and
            stores in ``k * (inputs + hidden[0])`` numbers instead of ``inputs * hidden[0]``.
        norm: batch normalization before every activation, norm1 and so on, as networks of few bits want it.

    Raises:
        InputError: a width is below 1, a probability not in [0, 1), or there is a bottleneck and no
            hidden layer.
        UnknownName: there is no such activation.

    Example:
        >>> sum(p.numel() for p in mlp([300, 100]).parameters())
        266610
        >>> mlp([1200], bottleneck=50)[1:3]
        Sequential(
          (bottleneck): Linear(in_features=784, out_features=50, bias=False)
          (fc1): Linear(in_features=50, out_features=1200, bias=True)
        )
    """
    widths = {f"hidden[{place}]": units for place, units in enumerate(hidden)}
    check_counts("mlp", inputs=inputs, classes=classes, **widths)
    check_probabilities("mlp", dropout=dropout, input_dropout=input_dropout)
    if activation not in _ACTIVATIONS:
        raise UnknownName("activation", activation, _ACTIVATIONS)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    if input_dropout:
        layers["dropout0"] = nn.Dropout(input_dropout)
    if bottleneck is not None:
        layers["bottleneck"] = _bottleneck(inputs, hidden, bottleneck)
        inputs = bottleneck
    for number, (before, after) in enumerate(pairwise([inputs, *hidden]), 1):
        layers[f"fc{number}"] = nn.Linear(before, after)
        if norm:
            layers[f"norm{number}"] = nn.BatchNorm1d(after)
        layers[f"{activation}{number}"] = _ACTIVATIONS[activation]()
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
    layers[f"fc{len(hidden) + 1}"] = nn.Linear([inputs, *hidden][-1], classes)
    return nn.Sequential(layers).apply(caffe_xavier)


def _bottleneck(inputs: int, hidden: Sequence[int], units: int) -> nn.Module:
    if not hidden or units < 1:
        raise InputError(
            f"mlp: bottleneck={units} with hidden={list(hidden)!r}: give at least 1 unit, and a hidden "
            "layer to put it before."
        )
    return nn.Linear(inputs, units, bias=False)
