"""Weights of few values that lie on a grid: signs, powers of two, integers times a step.

The surprising rule: ``x + (q - x).detach()`` is q only up to rounding. Where a value is passed on exactly
and its gradient is another's, the term that is added is exactly zero: ``q + (x - x.detach())``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Encoding


class Binary(Encoding):
    """One of two values, minus and plus a scale, chosen by the sign of a number that trains.

    The scale is ``sum(d |w|) / sum(d)`` with the curvature d of every entry: equal curvatures give the mean
    magnitude. The gradient passes to the number unchanged. Zero counts as plus.

    Args:
        curvature: in the weight's shape, positive.
        fixed: the scale, where it is not computed.
        by_filter: a scale for each filter, instead of one for the layer.
    """

    kind = "binary"
    curvature: Tensor

    def __init__(
        self, curvature: Tensor, fixed: float | None = None, by_filter: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("curvature", curvature.detach().clone())
        self.fixed, self.by_filter = fixed, by_filter

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> Binary:
        """One for a weight of this shape, to be filled."""
        return cls(torch.ones_like(like), **settings)

    def settings(self) -> dict[str, Any]:
        """How the scale is found."""
        return {"fixed": self.fixed, "by_filter": self.by_filter}

    def scale(self, value: Tensor) -> Tensor:
        """alpha: a scalar, or ``(filters, 1, ...)``."""
        if self.fixed is not None:
            return value.new_tensor(self.fixed)
        over = tuple(range(int(self.by_filter), value.ndim))
        total = (self.curvature * value.abs()).sum(over, keepdim=self.by_filter)
        return total / self.curvature.sum(over, keepdim=self.by_filter)

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        known = value.detach()
        binary = torch.where(known >= 0, 1.0, -1.0).to(known) * self.scale(known)
        return binary + (value - known)  # in this order what is added is exactly zero


class IntegerGrid(Encoding):
    """Multiples of a power of two between minus and plus one, divided by a layer's scale.

    ``round(clip(w) / s) s / divisor`` with ``s = 2^(1 - bits)`` and w clipped to ``-1 + s ... 1 - s``. The
    gradient passes to w unchanged.

    Args:
        bits: of a weight, sign included.
        divisor: a power of two.
    """

    kind = "integer_grid"

    def __init__(self, bits: int, divisor: float) -> None:
        super().__init__()
        self.bits, self.divisor = bits, divisor

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> IntegerGrid:
        """One for a weight of this shape, to be filled."""
        return cls(**settings)

    def settings(self) -> dict[str, Any]:
        """Bits and divisor."""
        return {"bits": self.bits, "divisor": self.divisor}

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        known = value.detach()
        return on_grid(known, self.bits) / self.divisor + (value - known) / self.divisor


def on_grid(value: Tensor, bits: int) -> Tensor:
    """The nearest multiple of ``2^(1 - bits)`` that lies between minus and plus one.

    Example:
        >>> on_grid(torch.tensor([-3.0, 0.2, 0.3]), 2)
        tensor([-0.5000,  0.0000,  0.5000])
    """
    step = 2.0 ** (1 - bits)
    return (value.clamp(step - 1.0, 1.0 - step) / step).round() * step


class StepGrid(Encoding):
    """Multiples of a step, one for each filter: signed integers of a few bits times a scale.

    ``clip(round(w / s), -h, h) s`` with ``h = 2^(bits - 1) - 1``. The gradient passes to w where it was not
    clipped. To a step that trains goes ``round(w / s) - w / s`` times the gradient, or plus or minus h
    where it was clipped (Esser et al. 2020, equation 3), all over ``sqrt(h * weights of the filter)``.

    Args:
        bits: of a weight, sign included.
        step: positive, ``(filters, 1, ...)``.
        learned: whether the steps train.
    """

    kind = "step_grid"
    step: Tensor

    def __init__(self, bits: int, step: Tensor, learned: bool = False) -> None:
        super().__init__()
        self.bits, self.learned = bits, learned
        step = step.detach().clone()
        if learned:
            self.step = nn.Parameter(step)
        else:
            self.register_buffer("step", step)

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> StepGrid:
        """One for a weight of this shape, to be filled."""
        return cls(step=like.new_ones(len(like), *[1] * (like.ndim - 1)), **settings)

    @property
    def highest(self) -> int:
        """h, the largest integer."""
        return _highest(self.bits)

    def settle(self) -> None:
        """Let the steps stay as they are from now on."""
        settle_step(self)

    def settings(self) -> dict[str, Any]:
        """Bits, and whether steps train."""
        return {"bits": self.bits, "learned": self.learned}

    def integers(self, value: Tensor) -> Tensor:
        """The weights as integers, in the weight's shape and type."""
        found: Tensor = (value / self.step).round().clamp(-self.highest, self.highest)
        return found

    def forward(self, value: Tensor) -> Tensor:
        """The effective weight."""
        step, high = self.step, self.highest
        if self.learned:
            step = slowed(step, high * value[0].numel())
        weight: Tensor = rounded((value / step).clamp(-high, high)) * step
        return weight


def _highest(bits: int) -> int:
    return int(2 ** (bits - 1)) - 1


def settle_step(module: Any) -> None:
    """Make the step of a module a buffer, so that no optimizer of a later stage moves it."""
    if module.learned:
        step = module._parameters.pop("step").detach()
        module.learned = False
        others = dict(module._buffers)
        module._buffers.clear()  # lest the order of tensors depends on what the module once was
        module.register_buffer("step", step)
        module._buffers.update(others)


def rounded(value: Tensor) -> Tensor:
    """To the nearest integer, to the even one of two; the gradient passes unchanged.

    Example:
        >>> rounded(torch.tensor([0.5, 1.5, -0.7]))
        tensor([0., 2., -1.])
    """
    whole: Tensor = value.detach().round()
    return whole + (value - value.detach())  # what is added is exactly zero


def slowed(step: Tensor, values: int) -> Tensor:
    """The step itself, but its gradient is divided by the root of a number."""
    slow: Tensor = step * float(values) ** -0.5
    return step.detach() + (slow - slow.detach())
