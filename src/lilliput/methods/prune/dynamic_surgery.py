"""Dynamic network surgery: connections are cut while training, and spliced back where that was wrong.

Paper: Dynamic Network Surgery for Efficient DNNs (Guo, Yao, Chen; NIPS 2016; arXiv 1608.04493)

A layer computes with W * T, where T is 0 for connections that are cut. The gradient at W * T moves *all* of
W, those that are cut too, so that a weight whose loss was a mistake grows again. At a step the mask of
a layer becomes (equation 3)::

    T = 0  where |W| < a,      T as it was  where a <= |W| < b,      T = 1  where b <= |W|

Between the thresholds a < b nothing changes, lest connections flicker. As in the authors' code they are
``a = 0.9 t`` and ``b = 1.1 t`` with ``t = max(mean + c * deviation, 0)``, the mean and the standard deviation
of |W| over the weights of the layer that are not zero, taken once, when the stage begins; c is
``deviations``. A step changes a layer's mask with the probability ``(1 + gamma * step) ** -power``, and from
``stop`` on the mask is final and the network only trains.

Faithful: mask, gradient of everything, thresholds, probability. Differs: ``stop`` is a part of the stage,
where the code counts iterations; biases are neither cut nor counted, where the code does both; convolutions
and linear layers may be cut in one stage, where the paper has one run for each (for that, two stages with
``layers``). Weights that are shared values (``codebook``) do not come back.

The surprising rule: how sparse the layers become is not set but found; c moves it. What is cut keeps its
value until the stage ends, and is zero in every file and for every later stage.

Cost: a comparison over the weights in the steps that change a mask. When not to use it: where an exact
sparsity is wanted (``gradual``).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...core.method import LayerMethod
from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change, Fraction, NonNegative, PerLayer, resolve
from ...errors import InputError
from ...mechanisms.encodings import original_of, reapply, stored_masks
from ._dead import remove_dead_connections
from ._masking import changes, mask_of, nonzeros, put_masks

Finite = Annotated[float, Field(allow_inf_nan=False)]


def threshold(weight: Tensor, deviations: float) -> float:
    """``t = max(mean + c * deviation, 0)`` of the magnitudes that are not zero.

    Example:
        >>> threshold(torch.tensor([0.0, 1.0, -1.0, 3.0, -3.0]), deviations=0.5)
        2.5
    """
    known = weight.abs()[weight != 0].double()
    if not known.numel():  # weights that begin at zero, such as the last ones of a residual block
        return 0.0
    return max(float(known.mean() + deviations * known.std(correction=0)), 0.0)


def spliced(mask: Tensor, weight: Tensor, lower: float, upper: float) -> Tensor:
    """Equation 3: the new mask.

    Args:
        mask: bool, True for connections that live.
        weight: W, the values of cut connections included.
        lower: a.
        upper: b.

    Example:
        >>> spliced(torch.tensor([True, True, False]), torch.tensor([0.1, 1.0, 1.0]), 0.9, 1.1)
        tensor([False,  True, False])
    """
    size = weight.abs()
    return (size >= upper) | (mask & (size >= lower))


@method
class DynamicSurgery(LayerMethod):
    """Cut connections below a threshold while training, and splice those back that grow beyond it.

    Attributes:
        deviations: c, for every layer or by layer pattern; a layer that no pattern covers stays whole.
        layers: pattern over module names.
        margin: how far a and b lie from their middle, as a part of it.
        gamma: how fast changes of the masks become rare.
        power: the same.
        stop: part of the stage after which no mask changes.
        remove_dead: cut the other connections of neurons that have lost all inputs or all outputs.

    Raises:
        InputError: when the stage begins, c would cut every connection of a layer.

    Example:
        >>> DynamicSurgery(deviations={"conv*": 0.5, "fc*": 1.5}).stop
        0.5
    """

    family: ClassVar[str] = "prune"

    deviations: PerLayer[Finite]
    margin: Fraction = 0.1
    gamma: NonNegative = 1e-3
    power: NonNegative = 1.0
    stop: Fraction = 0.5
    remove_dead: bool = True

    @classmethod
    def example(cls) -> DynamicSurgery:
        """About half of the weights go."""
        return cls(deviations=0.0)

    def amounts(self) -> Any:
        """The setting that decides which layers take part."""
        return self.deviations

    def attach(self, run: Run) -> None:
        """Take the thresholds, and put masks on that let cut connections train."""
        chosen = self.weights(run.model)
        memory = self.memory(run)
        memory["before"] = {w.name: nonzeros(w.value) for w in chosen}
        memory["threshold"] = {w.name: self._threshold(w) for w in chosen}
        put_masks(chosen)
        for weight in chosen:
            mask_of(weight).policy = "straight_through"
        if not run.total_steps:
            self._operate(run, chosen)

    def before_step(self, run: Run) -> None:
        """Change the masks of some layers."""
        if run.progress < self.stop:
            likely = (1.0 + self.gamma * run.step) ** -self.power
            chosen = self.weights(run.model)
            self._operate(run, [w for w in chosen if _drawn(run, w) < likely])

    def settled(self, run: Run) -> bool:
        """Whether the masks are final."""
        return run.progress >= self.stop

    def finish(self, run: Run) -> list[Change]:
        """What is cut becomes zero for good."""
        chosen = self.weights(run.model)
        for weight in chosen:
            mask_of(weight).policy = "hard"
        reapply(stored_masks(run.model))
        if self.remove_dead:
            remove_dead_connections(run, chosen)
        return changes(self.method_name(), chosen, self.memory(run)["before"], lambda w: "")

    def _threshold(self, weight: Weight) -> float:
        value = weight.value.detach()
        found = threshold(value, resolve(self.deviations, weight.layer) or 0.0)
        largest = float(value.abs().max())
        if largest < (1.0 - self.margin) * found:
            raise InputError(
                f"dynamic_surgery: all of {weight.name} would be cut: its largest magnitude is {largest:.3g} "
                f"and the threshold {found:.3g}. Lower deviations for {weight.layer}."
            )
        return found

    def _operate(self, run: Run, chosen: list[Weight]) -> None:
        middles = self.memory(run)["threshold"]
        for weight in chosen:
            mask, middle = mask_of(weight), middles[weight.name]
            lower, upper = (1.0 - self.margin) * middle, (1.0 + self.margin) * middle
            mask.update(spliced(mask.mask, _uncut(weight), lower, upper))


def _uncut(weight: Weight) -> Tensor:
    """W, the values of cut connections included; of shared values only what is not cut is known."""
    stored = original_of(weight).detach()
    return stored if stored.shape == weight.value.shape else weight.value.detach()


def _drawn(run: Run, weight: Weight) -> float:
    return float(torch.rand((), generator=run.generator(f"surgery {weight.name}")))
