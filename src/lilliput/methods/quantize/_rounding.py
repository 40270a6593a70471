"""To which of its neighboring integers a weight goes: the nearest, or the one that the layer's output likes.

All that is needed of the data is the mean of ``x x^T`` over a layer's inputs: the squared error of its output
after moving a filter by d is ``d^T H d``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ...mechanisms.columns import factor_of, settle_columns

Rounding: TypeAlias = Literal["nearest", "adaptive", "second_order"]

#: Columns that see one another's errors at once; a matter of speed only.
_BLOCK = 128
#: The rectified sigmoid of AdaRound reaches from -0.1 to 1.1, cut to 0 ... 1.
_LOW, _HIGH = -0.1, 1.1


def nearest(rows: Tensor, steps: Tensor, highest: int) -> Tensor:
    """The nearest integers times the steps.

    Args:
        rows: ``(filters, columns)``.
        steps: ``(filters,)``.
        highest: the largest integer; the range is symmetric.

    Example:
        >>> nearest(torch.tensor([[0.24, -0.9]]), torch.tensor([0.5]), 1)
        tensor([[ 0.0000, -0.5000]])
    """
    return (rows / steps[:, None]).round().clamp(-highest, highest) * steps[:, None]


def second_order(rows: Tensor, hessian: Tensor, steps: Tensor, highest: int) -> Tensor:
    """Frantar 2023 (GPTQ): columns are rounded one by one, those that follow make up for the error.

    Args:
        rows: ``(filters, columns)``; zeros stay zeros only by chance.
        hessian: ``(columns, columns)``, damped.
        steps: ``(filters,)``.
        highest: the largest integer.
    """
    settled, factor = rows.clone(), factor_of(hessian)
    for first in range(0, rows.shape[1], _BLOCK):
        columns = range(first, min(first + _BLOCK, rows.shape[1]))
        settle_columns(settled, factor, columns, partial(_to_grid, steps=steps, highest=highest))
    return settled


def _to_grid(column: int, values: Tensor, steps: Tensor, highest: int) -> Tensor:
    return nearest(values[:, None], steps, highest)[:, 0]


def adaptive(
    rows: Tensor,
    hessian: Tensor,
    steps: Tensor,
    highest: int,
    iterations: int = 1000,
    penalty: float = 10.0,
) -> Tensor:
    """Nagel 2020 (AdaRound): up or down is trained, for the squared error of the output.

    Equations 21 to 24: the weight is ``s clip(floor(w / s) + h(V), -n, n)`` with ``h(V) = clip(1.2
    sigmoid(V) - 0.1, 0, 1)``, and ``penalty * sum(1 - |2 h(V) - 1|^b)`` drives h to 0 and 1, b falling from
    20 to 2 after a fifth of the iterations. The error is in units of that of the nearest integers, a
    weight.

    Args:
        rows: ``(filters, columns)``.
        hessian: ``(columns, columns)``.
        steps: ``(filters,)``.
        highest: the largest integer.
        iterations: of Adam at a rate of 0.01.
        penalty: of values between two integers.

    Returns:
        The better of what was found and the nearest integers, for each filter.
    """
    scaled = (rows / steps[:, None]).detach()
    whole = scaled.floor()
    start = ((scaled - whole).clamp(0.01, 0.99) - _LOW) / (_HIGH - _LOW)
    variables = (start / (1.0 - start)).log().requires_grad_()
    plain = nearest(rows, steps, highest)
    unit = (_errors(plain - rows, hessian).sum() / rows.numel()).clamp_min(1e-30)
    optimizer = torch.optim.Adam([variables], lr=0.01)
    with torch.enable_grad():
        for turn in range(iterations):
            optimizer.zero_grad()
            up = _up(variables)
            found = (whole + up).clamp(-highest, highest) * steps[:, None]
            loss = _errors(found - rows, hessian).sum() / unit
            if (late := turn / iterations - 0.2) > 0.0:
                power = 2.0 + 9.0 * (1.0 + math.cos(math.pi * late / 0.8))
                loss = loss + penalty * (1.0 - (2.0 * up - 1.0).abs().pow(power)).sum()
            loss.backward()
            optimizer.step()
    hard = (whole + (_up(variables.detach()) >= 0.5)).clamp(-highest, highest) * steps[:, None]
    better = _errors(hard - rows, hessian) < _errors(plain - rows, hessian)
    return torch.where(better[:, None], hard, plain)


def _up(variables: Tensor) -> Tensor:
    return (variables.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def _errors(moved: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of the output of each filter, ``(filters,)``."""
    return (moved @ hessian * moved).sum(1)
