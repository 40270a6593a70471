"""Energy-aware pruning: the layers that cost most energy first, each by what its outputs lose.

Paper: Designing Energy-Efficient Convolutional Neural Networks using Energy-Aware Pruning (Yang, Chen, Sze;
CVPR 2017; arXiv 1611.05128)

Layers are ordered by their estimated energy, highest first, so that they are pruned while the network has
most to spare. A layer's filters are pruned one by one, each to its q weights:

1. remove: of the smallest magnitudes more than is due go, until ``(1 - restore) q`` are left;
2. restore: weights come back, some at a time, those without which the filter's outputs are farthest off, in
   the l1 norm over sampled inputs, ``min |Y - X A|_1``;
3. fit: the values of the q weights become the least squares solution on these inputs,
   ``A_S = argmin |Y - X_S A_S|_2``.

X are the inputs in the network as it is by then, Y the outputs of the network as it was at the beginning,
at the same places, so that a layer makes up for what the layers before it have lost. Then the next layer's
turn comes, and when all are done the whole network retrains under its masks. ``rounds`` repeats that with a
growing part of the sparsity.

Faithful: order, the three steps, retraining, the bound on the loss of accuracy (``bound``). Differs: the
    energy model
is a table (:class:`lilliput.measure.AccessTable`) and one fetch of every number, where the paper counts the
accesses of its dataflow and the bits of its activations; a layer that exceeds the bound is tried again with
three quarters, a half and a quarter of the sparsity, and stays dense if none will do.

The surprising rule: energy is an estimate, so is the order; absolute figures mean nothing.

Cost: a pass over the calibration data and, for each filter, a small linear system a layer. When not to use
    it:
on hardware that cannot skip zeros, where the energy it saves is not saved.
"""

from __future__ import annotations

import copy
import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.task import evaluate
from ...core.types import Batch, Change, Fraction, NonNegative, PerLayer, Sparsity
from ...errors import InputError
from ...measure import layer_energies
from ...mechanisms.curvature import as_rows, from_rows
from ...mechanisms.ranking import count
from ...mechanisms.solvers import least_squares, solvable, visit_rows
from ._allocation import one_sample
from ._in_rounds import SparseInRounds
from ._layerwise import write
from ._masking import mask_of

#: Parts of the sparsity that are tried where the whole of it costs too much accuracy.
PARTS = (1.0, 0.75, 0.5, 0.25)


def removed_and_restored(
    inputs: Tensor, weights: Tensor, target: Tensor, kept: int, restore: float, steps: int
) -> Tensor:
    """Steps 1 and 2 for one filter: which of its weights stay.

    Args:
        inputs: X, ``(samples, weights)``.
        weights: A, ``(weights,)``.
        target: Y, ``(samples,)``.
        kept: q.
        restore: part of q that comes back by the second step.
        steps: in how many rounds.

    Returns:
        Bool ``(weights,)``.
    """
    stays = torch.zeros_like(weights, dtype=torch.bool)
    back = min(round(restore * kept), kept)
    stays[weights.abs().topk(kept - back).indices] = True
    error = target - inputs[:, stays] @ weights[stays]
    products = inputs * weights
    while back:
        some = min(math.ceil(round(restore * kept) / steps), back)
        # What is left of the error if a weight came back alone.
        left = (error[:, None] - products).abs().sum(dim=0)
        left = left.masked_fill(stays | (weights == 0), torch.inf)
        chosen = left.topk(some, largest=False).indices
        stays[chosen] = True
        error = error - products[:, chosen].sum(dim=1)
        back -= some
    return stays


def fitted(gram: Tensor, cross: Tensor, weights: Tensor, stays: Tensor) -> Tensor:
    """Step 3: the best values of the weights that stay, zero elsewhere; never worse than what they were.

    Args:
        gram: ``X^T X``.
        cross: ``X^T Y``.
        weights: A.
        stays: bool, S.
    """
    if not stays.any():
        return torch.zeros_like(weights)
    values = least_squares(gram[stays][:, stays], cross[stays], toward=weights[stays])
    return torch.zeros_like(weights).masked_scatter(stays, values)


@method
class EnergyAware(SparseInRounds):
    """Prune the layers in the order of their energy, filter by filter, and fit what stays.

    Attributes:
        sparsity: fraction of zeros in every filter, exactly; for every layer or by layer pattern.
        allocation: how one sparsity is spread over the layers: uniform, by one ranking of all weights
            (magnitude), by shape (erk), by sensitivity, or by energy.
        restore: part of a filter's weights that is chosen by the error of its outputs; 0 leaves magnitude.
        steps: in how many rounds these come back.
        bound: largest loss of the validation score through one layer, in its units; None for any.
        samples: of the training data.
        positions: of a convolution's output that are looked at in each sample.
        rounds: how often all layers are pruned, each time retraining afterwards.
        until: part of the stage over which the rounds are spread.
        layers: pattern over module names.
        remove_dead: cut the other connections of neurons that have lost all inputs or all outputs.

    Raises:
        InputError: a layer that is neither linear nor a convolution, or is never called.

    Example:
        >>> EnergyAware(sparsity={"conv*": 0.5, "fc*": 0.9}).restore
        0.25
    """

    family: ClassVar[str] = "prune"

    sparsity: PerLayer[Sparsity]
    restore: Fraction = 0.25
    steps: Annotated[int, Field(ge=1)] = 4
    bound: NonNegative | None = None
    samples: Annotated[int, Field(ge=1)] = 256
    positions: Annotated[int, Field(ge=1)] = 8

    @classmethod
    def example(cls) -> EnergyAware:
        """Half of the weights go."""
        return cls(sparsity=0.5, samples=32)

    def check(self, model: nn.Module) -> None:
        """Every layer must be one whose inputs can be seen."""
        for weight in self.weights(model):
            if not solvable(weight.module) or weight.tensor != "weight":
                raise InputError(
                    f"energy_aware: {weight.name} is neither a linear layer's nor an ordinary "
                    f"convolution's. Leave it out with '!{weight.layer}'."
                )

    def finish(self, run: Run) -> list[Change]:
        """Cut dead neurons; report zeros and energies."""
        found = super().finish(run)
        before, after = self.memory(run)["energy"], self._energies(run)
        whole = sum(before.values())
        return found + [
            Change(
                w.layer, "share of the energy", round(before[w.layer] / whole, 4),
                round(after[w.layer] / whole, 4), self.method_name(), "an estimate",
            )
            for w in self.weights(run.model)
        ]  # fmt: skip

    def _remember(self, run: Run, chosen: list[Weight]) -> None:
        self.memory(run)["energy"] = self._energies(run)
        # A resumed stage attaches to the same network again, so that this need not be in the checkpoint.
        run.shared[self._key(run)] = copy.deepcopy(run.model)

    def _energies(self, run: Run) -> dict[str, float]:
        return layer_energies(run.model, one_sample(run))

    def _prune(self, run: Run, chosen: list[Weight], part: float) -> None:
        """All layers, by their energy as it is now."""
        energies = self._energies(run)
        for weight in sorted(chosen, key=lambda w: -energies[w.layer]):
            sparsity = part * self.final(run, weight)
            inputs, target = self._samples_of(run, weight)
            before = self._score(run)
            mask, value = mask_of(weight).mask.clone(), weight.value.detach().clone()
            for less in PARTS:
                self._prune_layer(run, weight, less * sparsity, inputs, target)
                if self.bound is None or self._score(run) >= before - self.bound:
                    break
                mask_of(weight).update(mask)
                write(run.model, weight.name, value)

    def _score(self, run: Run) -> float:
        """The validation score, where somebody asks for it."""
        if self.bound is None:
            return 0.0
        return evaluate(run.model, run.task.validation, run.task.score, run.device)

    def _prune_layer(
        self, run: Run, weight: Weight, sparsity: float, inputs: Tensor, target: Tensor
    ) -> None:
        rows = as_rows(weight.module).double()
        kept = rows.shape[2] - count(rows.shape[2], sparsity)
        new = torch.zeros_like(rows)
        for group, filters in enumerate(rows):
            x = inputs[group]
            gram, cross = x.T @ x, x.T @ target[:, group]
            for number, row in enumerate(filters):
                y = target[:, group, number]
                stays = removed_and_restored(x, row, y, kept, self.restore, self.steps)
                new[group, number] = fitted(gram, cross[:, number], row, stays & (row != 0))
        value = from_rows(weight.module, new).to(weight.value)
        mask_of(weight).update(value != 0)
        write(run.model, weight.name, value)

    def _samples_of(self, run: Run, weight: Weight) -> tuple[Tensor, Tensor]:
        """X of every group of channels as the network is now, and Y without the bias as it was at first."""
        first = run.shared[self._key(run)]
        layer = first.get_submodule(weight.layer)
        if layer.weight.shape != weight.value.shape:
            raise InputError(
                f"energy_aware: {weight.layer} has lost channels since the stage began, and what its "
                "outputs were is not comparable any more. Remove channels in a stage of their own."
            )
        batches = list(run.calibration(self.samples))
        now, then = (self._rows(run, model, weight, batches) for model in (run.model, first))
        return now, torch.einsum("gsc,gfc->sgf", then, as_rows(layer).double())

    def _rows(self, run: Run, model: nn.Module, weight: Weight, batches: list[Batch]) -> Tensor:
        """The layer's inputs, ``(groups, samples, weights of a filter)``, at the same places in any model."""
        groups = getattr(weight.module, "groups", 1)
        found: list[Tensor] = []

        def use(name: str, met: Tensor) -> None:
            x = met.double().unflatten(1, (groups, -1))  # samples, groups, channels, positions
            found.append(x.permute(1, 0, 3, 2).flatten(2))

        generator = run.generator(f"energy_aware {weight.name}")
        visit_rows(model, [weight.layer], batches, self.positions, generator, use, once=True)
        if not found:
            raise InputError(
                f"energy_aware: {weight.layer} was not called on the calibration samples, or its forward "
                f"is bypassed. Leave it out with '!{weight.layer}'."
            )
        return torch.cat(found, dim=1)

    def _key(self, run: Run) -> tuple[str, str]:
        return ("the network at the beginning", run.key_of(self))
