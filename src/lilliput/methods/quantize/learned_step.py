"""Learned step size quantization: training with integer weights and activations, whose steps train too.

Paper: Learned Step Size Quantization (Esser, McKinstry, Bablani, Appuswamy, Modha; ICLR 2020; arXiv
1902.08153)

Forward, a weight or an activation v is (equations 1 and 2)::

    v' = round(clip(v / s, -n, p)) s

Backward, the rounding counts as the identity (equations 3 and 5)::

    dv'/ds = round(v / s) - v / s   inside the range,   -n or p   at its ends
    dv'/dv = 1                      inside the range,   0         beyond

and the gradient of s is multiplied by ``1 / sqrt(N p)``, N being the number of weights, or of features of one
sample, that s scales (section 2.2).

Faithful: forward, gradients, their scale. Different: a weight has a step for each filter (the paper: for
each layer), an activation an offset, so that negative ones can be had; steps begin at the measured ranges
that :class:`PostTraining` takes, not at ``2 mean|v| / sqrt(p)``. The paper keeps the first and the last
layer at 8 bits: ``bits: {conv1: 8, fc: 8, "*": 4}``.

An optimizer that moves every number by its rate, as Adam does, or a large rate, would make some steps of a
hundredth vanish within a dozen moves; so a step moves by one percent of itself at most (not in the paper).

The surprising rule: the zero of activations does not train, only the step does.

Cost: a few comparisons a weight and an activation in each step. When not to use it: at 8 bits
``post_training`` usually is as good, in seconds.
"""

from __future__ import annotations

import torch

from ...core.registry import method
from ...core.run import Run
from ...core.types import Change
from ...mechanisms.activations import Quantizer, settle_activations
from ...mechanisms.encodings import StepGrid, put_grid
from ._integers import IntegerMethod

#: By which part of itself a step moves at most, each time the optimizer does.
_FARTHEST = 0.01


@method
class LearnedStep(IntegerMethod):
    """Train integer weights and activations together with their steps.

    Attributes:
        learned: whether steps train; else they stay as they are measured.

    Raises:
        NothingMatched: no layer of that pattern can become integers.
        InputError: a weight is quantized already; activations are not finite, or always the same.

    Example:
        >>> LearnedStep(bits=4, activation_bits=4).learned
        True
    """

    learned: bool = True

    @classmethod
    def example(cls) -> LearnedStep:
        """Four bits."""
        return cls(bits=4, samples=32)

    def attach(self, run: Run) -> None:
        """Measure ranges and steps; from now on they train."""
        chosen = self.layers_of(run.model)
        _, batches = self.calibrated(run, self.learned)
        bits = self.bits_of(run, chosen, batches)
        for weight in chosen:
            put_grid(
                weight, bits[weight.name], self.step_of(weight, bits[weight.name]), self.learned
            )

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Remember the steps."""
        self.memory(run)["steps"] = [step.clone() for step in self._steps(run)]

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Let no step move far at once."""
        for step, before in zip(self._steps(run), self.memory(run)["steps"], strict=True):
            step.copy_(step.clamp(before * (1.0 - _FARTHEST), before * (1.0 + _FARTHEST)))

    def finish(self, run: Run) -> list[Change]:
        """Let the steps stay as they are; a line for each layer."""
        settle_activations(run.model)
        for grid in [m for m in run.model.modules() if isinstance(m, StepGrid)]:
            grid.settle()
        return self.told(run, self.weights(run.model))

    def _steps(self, run: Run) -> list[torch.Tensor]:
        return [m.step for m in run.model.modules() if isinstance(m, StepGrid | Quantizer)]
