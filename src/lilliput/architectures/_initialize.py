"""Weight initializations that several networks share.

Functions for ``module.apply``: they initialize one convolution or linear layer and leave other
modules alone. Biases become zero.
"""

from __future__ import annotations

from torch import nn


def caffe_xavier(module: nn.Module) -> None:
    """Caffe's "xavier" filler: uniform in ±sqrt(3 / fan-in), that is variance 1 / fan-in."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
        _zero_bias(module)


def he_normal(module: nn.Module) -> None:
    """Normal with variance 2 / fan-in (He et al., ICCV 2015, for layers followed by ReLU)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        _zero_bias(module)


def _zero_bias(module: nn.Conv2d | nn.Linear) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)
