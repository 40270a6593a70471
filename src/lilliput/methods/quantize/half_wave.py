"""Half-wave Gaussian quantization: activations of a few levels for normal inputs, and binary weights.

Paper: Deep Learning with Low Precision by Half-wave Gaussian Quantization (Cai, He, Sun, Vasconcelos; CVPR
  2017;
arXiv 1702.00953)

What batch normalization without scale and shift hands on is nearly standard normal, so that one quantizer,
computed once, fits every layer (equations 9 and 10)::

    Q(x) = q_i  for  t_i < x <= t_(i+1),     0  for  x <= 0

The levels q_i minimize the expected squared error over the positive half of the normal distribution
(Lloyd), the borders lie in the middle between levels, the first at zero. ``uniform`` levels are multiples
of one step. Backward, the derivative of Q is replaced by that of a clipped ReLU (``clipped``), a ReLU, or
one with a tail of ``1 / (x - highest + 1)`` (``log``, equation 14).

A weight is ``alpha_f sign(w)`` with ``alpha_f`` the mean magnitude of its filter; the gradient at it moves w
unchanged.

Faithful: levels, borders, gates, scales, normalization without scale and shift (their present ones are set
to 1 and 0 and frozen). As in the paper the first and the last layer should stay real: leave them out with
``layers``.

The surprising rule: only activation *modules* can be replaced (``nn.ReLU``), not calls of ``torch.relu``
inside ``forward``.

Cost: some comparisons an activation. When not to use it: without batch normalization, where nothing keeps
the inputs near a standard normal distribution.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from scipy.optimize import minimize_scalar
from torch import nn

from ...core.method import LayerMethod
from ...core.registry import method
from ...core.run import Run
from ...core.types import Change, Layers
from ...errors import InputError
from ...mechanisms.activations import HalfWave as Quantizer
from ...mechanisms.activations import replace_activation
from ...mechanisms.encodings import Binary, Codebook, encode, encoding_of
from ._rectifiers import rectifiers

_NORMS = nn.modules.batchnorm._NormBase


def density(x: float) -> float:
    """The standard normal density."""
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def below(x: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def squared_error(levels: list[float]) -> float:
    """The expected squared error of the quantizer over the positive half of the normal distribution."""
    borders = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    total = 0.0
    for level, low, high in zip(levels, borders, borders[1:], strict=False):
        mass = below(high) - below(low)
        ends = (low * density(low)) - (0.0 if high == math.inf else high * density(high))
        first = density(low) - density(high)
        total += (mass + ends) - 2.0 * level * first + level * level * mass
    return total


@cache
def half_wave_levels(count: int, uniform: bool) -> tuple[float, ...]:
    """The best positive levels for a standard normal input.

    Args:
        count: how many, without the zero.
        uniform: whether they are multiples of one step.

    Example:
        >>> [round(level, 3) for level in half_wave_levels(2, uniform=False)]
        [0.453, 1.51]
    """
    multiples = range(1, count + 1)
    if uniform:
        found = minimize_scalar(
            lambda step: squared_error([step * n for n in multiples]), bounds=(1e-3, 3.0),
            method="bounded", options={"xatol": 1e-10},
        )  # fmt: skip
        return tuple(float(found.x) * n for n in multiples)
    levels = [2.0 * n / count for n in multiples]
    for _ in range(10_000):
        borders = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        pairs = list(pairwise(borders))
        new = [(density(a) - density(b)) / (below(b) - below(a)) for a, b in pairs]
        if max(abs(a - b) for a, b in zip(levels, new, strict=True)) < 1e-12:
            break
        levels = new
    return tuple(levels)


@method
class HalfWave(LayerMethod):
    """Train binary weights, a scale a filter, behind activations of a few levels.

    Attributes:
        bits: of an activation; ``2**bits - 1`` levels and the zero.
        uniform: levels at multiples of one step, or wherever they are best.
        gate: the gradient of an activation: ``clipped``, ``relu`` or ``log``.
        activations: pattern over the activation modules that are replaced (``nn.ReLU`` and the like).
        binary: whether weights become binary too.
        layers: pattern over module names; as in the paper, leave the first and the last layer out.

    Raises:
        NothingMatched: no module of that pattern can be replaced.
        InputError: a weight already is of shared values.

    Example:
        >>> HalfWave(bits=2, layers=["!conv1", "!fc"]).gate
        'clipped'
    """

    family: ClassVar[str] = "quantize"

    bits: Annotated[int, Field(ge=1, le=4)] = 2
    uniform: bool = True
    gate: Literal["clipped", "relu", "log"] = "clipped"
    activations: Layers = "*"
    binary: bool = True

    def check(self, model: nn.Module) -> None:
        """Both patterns must cover something."""
        super().check(model)
        rectifiers(model, self.activations, self.method_name())

    def attach(self, run: Run) -> None:
        """Replace activations, make normalizations plain, binarize."""
        chosen, memory = self.weights(run.model), self.memory(run)
        memory["before"] = {w.name: len(w.value.detach().unique()) for w in chosen}
        levels = list(half_wave_levels(2**self.bits - 1, self.uniform))
        memory["replaced"] = rectifiers(run.model, self.activations, self.method_name())
        for name in memory["replaced"]:
            replace_activation(run.model, name, Quantizer(levels, self.gate))
        memory["plain"] = _plain_norms(run.model)
        for weight in chosen if self.binary else ():
            if encoding_of(weight, Codebook) is not None:
                raise InputError(
                    f"half_wave: {weight.name} is of shared values already. Binarize before, or leave it "
                    f"out with '!{weight.layer}'."
                )
            encode(weight, Binary(torch.ones_like(weight.value), by_filter=True))

    def finish(self, run: Run) -> list[Change]:
        """Thaw the normalizations; report weights and activations."""
        memory, count = self.memory(run), 2**self.bits
        parameters = dict(run.model.named_parameters())
        for name in memory["plain"]:
            parameters[name].requires_grad_(True)
        found = [
            Change(w.name, "distinct values", memory["before"][w.name],
                   len(w.value.detach().unique()), self.method_name())
            for w in (self.weights(run.model) if self.binary else ())
        ]  # fmt: skip
        return found + [
            Change(name, "levels of the activation", "all", count, self.method_name())
            for name in memory["replaced"]
        ]


@torch.no_grad()
def _plain_norms(model: nn.Module) -> list[str]:
    """Set scale and shift of batch normalization to 1 and 0, and freeze them; which were frozen here."""
    frozen = []
    for name, module in model.named_modules():
        if isinstance(module, _NORMS) and module.affine:
            module.weight.fill_(1.0)
            module.bias.zero_()
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    frozen.append(f"{name}.{leaf}")
    return frozen
