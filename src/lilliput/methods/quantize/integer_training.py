"""Integer training: weights, activations, gradients and errors of few bits, from the first step to the last.

Paper: Training and Inference with Integers in Deep Neural Networks (Wu, Li, Chen, Shi; ICLR 2018; arXiv
1802.04680)

With the step ``s(k) = 2^(1 - k)``, ``Q(x, k)`` rounds to a multiple of it, ``C(x, k)`` clips to ``-1 + s
... 1 - s``, and ``Shift(x) = 2^round(log2 x)``. The four quantizers, by default of 2, 8, 8 and 8 bits
(equations 6 to 12)::

    weights       Q(C(W, k_W), k_W) / alpha         alpha = max(Shift(beta s(k_W) / limit), 1)
    activations   Q(C(a, k_A), k_A)                 after the ReLU; the gradient stops where it is clipped
    errors        Q(C(e / Shift(max |e|), k_E), k_E)
    updates       s(k_G) sgn(g') (floor(|g'|) + Bernoulli(|g'| - floor(|g'|))),    g' = lr g / Shift(max |g|)

Weights begin uniform within ``max(limit, beta s(k_W))`` with ``limit = sqrt(6 / fan-in)`` and beta 1.5;
alpha, a power of two, makes up for layers that would begin at a larger scale than they should. What trains,
W, stays on the grid of ``k_G`` bits: the update is an integer, and W is clipped. The loss is half the sum
of squared differences to the one-hot label.

Faithful: the four quantizers, the beginning, alpha, integer updates without momentum or decay, the loss.
The authors' code differs from the paper and is followed where ``limit_factor`` is 3 (limit sqrt(3 /
fan-in)). Biases,
which the paper's networks do not have, become zero and are frozen; normalizations are frozen as they are.

The surprising rule: the learning rate counts grid steps. With 8 the largest gradient moves a weight by
about eight of 128; the stage's optimizer does not touch these weights, its learning rate and schedule are
read only. A task's weight decay does nothing to them.

Cost: a maximum and a rounding of every tensor. When not to use it: to make a trained network small; it
begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.method import LayerMethod
from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change, Layers, Positive
from ...errors import InputError
from ...mechanisms.activations import (
    IntegerActivation,
    power_of_two,
    replace_activation,
    with_integer_error,
)
from ...mechanisms.encodings import Binary, Codebook, IntegerGrid, encode, original_of
from ._rectifiers import rectifiers

Bits = Annotated[int, Field(ge=2, le=16)]


def beginning(fan_in: int, bits: int, factor: float, beta: float) -> tuple[float, float]:
    """How far the first weights lie from zero, and alpha.

    Args:
        fan_in: weights of a filter.
        bits: of a weight.
        factor: 6 in the paper, 3 in the authors' code.
        beta: how many steps the first weights reach at least.

    Example:
        >>> beginning(1152, 2, 3.0, 1.5)
        (0.75, 16.0)
    """
    limit, least = math.sqrt(factor / fan_in), beta * 2.0 ** (1 - bits)
    return max(limit, least), max(2.0 ** round(math.log2(least / limit)), 1.0)


def integer_update(gradient: Tensor, rate: float, bits: int, drawn: Tensor) -> Tensor:
    """What a weight is lowered by: multiples of ``2^(1 - bits)``, right in the mean.

    Args:
        gradient: g.
        rate: in steps of the grid.
        bits: of the grid.
        drawn: uniform numbers in the gradient's shape; where one is below the fraction that is left, the
            magnitude is rounded up.
    """
    largest = gradient.abs().max()
    if not bool(largest > 0):
        return torch.zeros_like(gradient)
    scaled = rate * gradient / power_of_two(largest)
    whole = scaled.abs().floor()
    up = (drawn < scaled.abs() - whole).to(gradient)
    return scaled.sign() * (whole + up) * 2.0 ** (1 - bits)


@method
class IntegerTraining(LayerMethod):
    """Train with integers only: weights, activations, gradients and errors.

    Attributes:
        weight_bits: k_W, of a weight that multiplies.
        activation_bits: k_A.
        gradient_bits: k_G, of the grid on which weights are kept and updated.
        error_bits: k_E.
        beta: how many steps the first weights reach at least.
        limit_factor: 6 as in the paper, 3 as in the authors' code.
        objective: ``squares`` to the one-hot label, or ``task`` for the task's own loss.
        activations: pattern over the activation modules that are replaced (``nn.ReLU`` and the like).
        layers: pattern over module names.

    Raises:
        NothingMatched: no activation module can be replaced.
        InputError: a weight is of shared values already; the targets of ``squares`` are no classes; an own
            loop has not given its optimizer.

    Example:
        >>> IntegerTraining().weight_bits
        2
    """

    family: ClassVar[str] = "quantize"
    initializes: ClassVar[bool] = True

    weight_bits: Bits = 2
    activation_bits: Bits = 8
    gradient_bits: Bits = 8
    error_bits: Bits = 8
    beta: Positive = 1.5
    limit_factor: Positive = 6.0
    objective: Literal["squares", "task"] = "squares"
    activations: Layers = "*"

    def check(self, model: nn.Module) -> None:
        """Both patterns must cover something."""
        super().check(model)
        rectifiers(model, self.activations, self.method_name())

    def attach(self, run: Run) -> None:
        """Draw the first weights, and put everything on its grid."""
        chosen, memory = self.weights(run.model), self.memory(run)
        memory["before"] = {w.name: len(w.value.detach().unique()) for w in chosen}
        for weight in chosen:
            self._begin(run, weight)
        memory["frozen"] = _without_biases(run.model, chosen)
        memory["replaced"] = rectifiers(run.model, self.activations, self.method_name())
        for name in memory["replaced"]:
            made = IntegerActivation(self.activation_bits, self.error_bits)
            replace_activation(run.model, name, made)

    def before_step(self, run: Run) -> None:
        """Find out whether the learning rate is known, before anything is computed."""
        self._rate(run)

    def task_weight(self, run: Run) -> float:
        """The task's own loss counts only where it is asked for."""
        return float(self.objective == "task")

    def loss(self, run: Run) -> Mapping[str, Tensor]:
        """Half the sum of squares to the one-hot label, a sample."""
        if self.objective == "task":
            return {}
        output, target = run.output, run.batch.target
        if not (isinstance(target, Tensor) and target.dtype == torch.int64 and target.ndim == 1):
            raise InputError(
                "integer_training: objective: squares wants class numbers as targets. Set objective: task "
                "for another task."
            )
        wanted = F.one_hot(target, output.shape[-1]).to(output)
        rounded = with_integer_error(output, self.error_bits)
        return {"squares": 0.5 * (rounded - wanted).square().sum(-1).mean()}

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        """Move the weights by integers; the optimizer finds no gradient of theirs."""
        rate = self._rate(run)
        step = 2.0 ** (1 - self.gradient_bits)
        for weight in self.weights(run.model):
            stored = original_of(weight)
            if stored.grad is None:
                continue
            generator = run.generator(f"integer_training {weight.name}")
            drawn = torch.rand(stored.shape, generator=generator).to(stored.device)
            moved = stored - integer_update(stored.grad, rate, self.gradient_bits, drawn)
            stored.copy_(moved.clamp(step - 1.0, 1.0 - step))
            stored.grad = None

    def finish(self, run: Run) -> list[Change]:
        """Report weights and activations."""
        memory, parameters = self.memory(run), dict(run.model.named_parameters())
        for name in memory["frozen"]:
            parameters[name].requires_grad_(True)
        found = [
            Change(w.name, "distinct values", memory["before"][w.name],
                   len(w.value.detach().unique()), self.method_name())
            for w in self.weights(run.model)
        ]  # fmt: skip
        return found + [
            Change(name, "bits of the activation", 32, self.activation_bits, self.method_name())
            for name in memory["replaced"]
        ]

    def _rate(self, run: Run) -> float:
        return run.learning_rate(
            "integer_training must know the learning rate for its integer steps:"
        )

    @torch.no_grad()
    def _begin(self, run: Run, weight: Weight) -> None:
        if any(isinstance(e, Codebook | Binary) for e in weight.encodings()):
            raise InputError(
                f"integer_training: {weight.name} is of shared values already, and integer training "
                "begins with weights of its own. List it before the methods that share values."
            )
        reach, alpha = beginning(
            weight.value[0].numel(), self.weight_bits, self.limit_factor, self.beta
        )
        generator = run.generator(f"integer_training begin {weight.name}")
        drawn = torch.rand(weight.value.shape, generator=generator).to(weight.value)
        step = 2.0 ** (1 - self.gradient_bits)
        first = ((2.0 * drawn - 1.0) * reach / step).round() * step
        encode(weight, IntegerGrid(self.weight_bits, alpha))
        original_of(weight).copy_(first.clamp(step - 1.0, 1.0 - step))


@torch.no_grad()
def _without_biases(model: nn.Module, chosen: list[Weight]) -> list[str]:
    """Set the layers' biases to zero and freeze them, with all that is one number a channel."""
    for weight in chosen:
        bias = getattr(weight.module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.zero_()
    found = [n for n, p in model.named_parameters() if p.ndim == 1 and p.requires_grad]
    for name in found:
        model.get_parameter(name).requires_grad_(False)
    return found
