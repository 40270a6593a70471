"""Targeted dropout: train a network so that losing its small weights later does it no harm.

Paper: Targeted Dropout (Gomez, Zhang, Swersky, Gal, Hinton; NeurIPS Workshop on Compact Deep Neural Networks
2018)
Paper: Learning Sparse Networks Using Targeted Dropout (Gomez, Zhang, Kamalakara, Madaan, Swersky, Gal,
Hinton; 2019; arXiv 1905.13678)

At every step the weights that pruning would take are *candidates*, and each is left out with probability
alpha (``rate``). Candidates are the fraction gamma (``sparsity``) of smallest magnitude

- of every output unit's weights (``by: weight``), or
- of the layer's whole output units, by their l2 norm (``by: unit``), which are left out whole.

Nothing is scaled up in return, and what is left out gets no gradient at that step only. So important weights
learn not to rely on the candidates, and small ones stay small. When the stage ends the candidates are
pruned for good, without retraining.

With ``ramp``, gamma grows on a straight line to 0.95 of its value over the first half of that part of the
stage and to its value over the second, while alpha grows over both.

Faithful: candidates, probability, no scaling, ramps. Differs: exactly ``round(gamma * n)`` of n are
candidates, where the authors' code takes what lies strictly below a threshold; a unit is left out whole,
as the paper says, where that code draws every weight of a candidate unit by itself. Biases are never
left out.

The surprising rule: the loss in training is that of a damaged network; validation sees the whole one, and the
stage's figures the pruned one.

Cost: a selection over the weights every step. When not to use it: to finish a network that has trained, with
few epochs; there prune and retrain.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change, Fraction, PerLayer, Sparsity
from ...mechanisms.encodings import LeftOut, encode, encoding_of, reapply, stored_masks, take_off
from ...mechanisms.ranking import count, keep_largest
from ._allocation import SparsityMethod
from ._dead import remove_dead_connections
from ._masking import changes, mask_of, nonzeros, put_masks


def candidate_weights(weight: Tensor, fraction: float) -> Tensor:
    """The smallest weights of every output unit, a bool tensor.

    Example:
        >>> candidate_weights(torch.tensor([[1.0, -3.0], [0.2, 0.1]]), 0.5)
        tensor([[ True, False],
                [False,  True]])
    """
    size = weight.abs().flatten(1)
    lowest = size.topk(count(size.shape[1], fraction), dim=1, largest=False).indices
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, lowest, True).view(weight.shape)


def candidate_units(weight: Tensor, fraction: float) -> Tensor:
    """The output units of smallest l2 norm, a bool vector.

    Example:
        >>> candidate_units(torch.tensor([[1.0, -3.0], [0.2, 0.1]]), 0.5)
        tensor([False,  True])
    """
    return ~keep_largest(weight.flatten(1).norm(dim=1), fraction)


def ramped(progress: float, ramp: float, sparsity: float, rate: float) -> tuple[float, float]:
    """Gamma and alpha at a point of the stage (0 to 1).

    Example:
        >>> ramped(0.25, ramp=1.0, sparsity=0.8, rate=0.6)
        (0.38, 0.15)
    """
    along = min(1.0, progress / ramp) if ramp else 1.0
    part = 1.9 * along if along < 0.5 else 0.95 + 0.1 * (along - 0.5)
    return part * sparsity, along * rate


@method
class TargetedDropout(SparsityMethod):
    """Leave small weights out at random while training, and prune them at the end.

    Attributes:
        sparsity: gamma, the fraction of candidates, all of which are pruned at the end; for every layer
            or by layer pattern. A layer that no pattern covers stays whole.
        allocation: how one sparsity is spread over the layers: uniform, by one ranking of all weights
            (magnitude), by shape (erk), by sensitivity, or by energy.
        rate: alpha, the probability that a candidate is left out at a step.
        by: weights within each output unit, or whole output units.
        ramp: part of the stage over which both grow from zero; 0 for none.
        layers: pattern over module names.
        remove_dead: cut the other connections of neurons that have lost all inputs or all outputs.

    Example:
        >>> TargetedDropout(sparsity=0.75, rate=0.5).by
        'weight'
    """

    family: ClassVar[str] = "prune"

    sparsity: PerLayer[Sparsity]
    rate: Fraction = 0.5
    by: Literal["weight", "unit"] = "weight"
    ramp: Fraction = 0.0
    remove_dead: bool = True

    @classmethod
    def example(cls) -> TargetedDropout:
        """Half of the weights go."""
        return cls(sparsity=0.5)

    def attach(self, run: Run) -> None:
        """Put on what leaves weights out."""
        chosen = self.weights(run.model)
        self.memory(run)["before"] = {w.name: nonzeros(w.value) for w in chosen}
        self.allocate(run, chosen)
        for weight in chosen:
            encode(weight, LeftOut(torch.zeros_like(weight.value, dtype=torch.bool)))

    def before_step(self, run: Run) -> None:
        """Draw anew."""
        for weight in self.weights(run.model):
            sparsity, rate = ramped(run.progress, self.ramp, self.final(run, weight), self.rate)
            candidates = self._candidates(weight, sparsity)
            generator = run.generator(f"targeted_dropout {weight.name}")
            drawn = torch.rand(candidates.shape, generator=generator).to(candidates.device) < rate
            _left_out(weight).copy_(_over_units(candidates & drawn, weight))

    def settled(self, run: Run) -> bool:
        """Whether the ramp is over."""
        return run.progress >= self.ramp

    def finish(self, run: Run) -> list[Change]:
        """Prune the candidates."""
        chosen = self.weights(run.model)
        for weight in chosen:
            candidates = self._candidates(weight, self.final(run, weight))
            take_off(weight, LeftOut)
            put_masks([weight])
            kept = ~_over_units(candidates, weight)
            mask_of(weight).update(mask_of(weight).mask & kept)
        reapply(stored_masks(run.model))
        if self.remove_dead:
            remove_dead_connections(run, chosen)
        return changes(self.method_name(), chosen, self.memory(run)["before"], lambda w: "")

    def _candidates(self, weight: Weight, sparsity: float) -> Tensor:
        """Of all weights, those that were left out at the last step included; output units first."""
        _left_out(weight).zero_()
        value = _turned(weight, weight.value.detach())
        if self.by == "unit":
            return candidate_units(value, sparsity)
        return candidate_weights(value, sparsity)


def _left_out(weight: Weight) -> Tensor:
    encoding = encoding_of(weight, LeftOut)
    assert encoding is not None
    return encoding.left_out


def _over_units(gone: Tensor, weight: Weight) -> Tensor:
    """A mark a unit, or one a weight already with units first, in the weight's shape."""
    like = _turned(weight, weight.value)
    every = gone.view(*gone.shape, *[1] * (like.ndim - gone.ndim)).expand_as(like)
    return _turned(weight, every)


def _turned(weight: Weight, tensor: Tensor) -> Tensor:
    """Output units first, which a transposed convolution has second, group by group; and the way back."""
    if not isinstance(weight.module, nn.modules.conv._ConvTransposeNd):
        return tensor
    turned: Tensor = tensor.unflatten(0, (weight.module.groups, -1)).transpose(1, 2)
    return turned.flatten(0, 1)
