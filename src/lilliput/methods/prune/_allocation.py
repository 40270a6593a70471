"""How a sparsity is spread over the layers, for the papers that leave that free.

- ``uniform``: the same in every layer.
- ``magnitude``: one ranking of all weights, taken once; layers of small weights lose more.
- ``erk``: the density of a layer is proportional to the sum of its sizes over their product (Erdős-Rényi
  kernel: Mocanu et al. 2018, Evci et al. 2020); large layers lose more.
- ``sensitivity``: every layer loses so much that by itself it would cost the same validation score.
- ``energy``: one ranking in which a weight counts by what it saves: magnitude in units of its layer's root
  mean square, over the estimated energy of one of the layer's weights.

The surprising rule: whatever the allocation, the weights that are zero in the end are the same fraction of
all weights that the method covers, up to the rounding of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from ...core.method import LayerMethod
from ...core.run import Run
from ...core.select import Weight
from ...core.task import move
from ...core.types import Batch, PerLayer, Sparsity, resolve
from ...measure import layer_energies
from ...measure.sensitivity import sensitivity
from ...mechanisms.ranking import keep_largest_together

Allocation: TypeAlias = Literal["uniform", "magnitude", "erk", "sensitivity", "energy"]

#: On so many validation batches the sensitivity of a layer is measured.
BATCHES = 4


class SparsityMethod(LayerMethod):
    """Base of the methods that set a fraction of each layer's weights to zero.

    Attributes:
        sparsity: fraction of zeros, for every layer or by layer pattern; with an allocation, of all layers
            together.
        allocation: how it is spread over the layers.
    """

    sparsity: PerLayer[Sparsity] | None = None
    allocation: Allocation = "uniform"

    @model_validator(mode="after")
    def _one_sparsity(self) -> Any:
        if self.allocation != "uniform" and not isinstance(self.sparsity, float):
            raise ValueError(
                f"allocation: {self.allocation} spreads one sparsity over the layers: give one number"
            )
        return self

    def amounts(self) -> Any:
        """The setting that decides which layers take part."""
        return self.sparsity

    def allocate(self, run: Run, chosen: list[Weight]) -> None:
        """Decide once how sparse each layer becomes; call it in ``attach``, before anything is pruned."""
        amounts = [resolve(self.sparsity, w.layer) or 0.0 for w in chosen]
        if self.allocation != "uniform":
            assert isinstance(self.sparsity, float)
            amounts = _SPREAD[self.allocation](run, chosen, self.sparsity)
        self.memory(run)["sparsities"] = {
            w.name: float(amount) for w, amount in zip(chosen, amounts, strict=True)
        }

    def final(self, run: Run, weight: Weight) -> float:
        """How sparse one layer becomes."""
        return float(self.memory(run)["sparsities"][weight.name])


def erdos_renyi(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """Sparsities whose densities are proportional to ``sum(shape) / prod(shape)``, none above 1.

    Layers that would be denser than dense stay whole, and the others make up for it.

    Example:
        >>> [round(s, 3) for s in erdos_renyi([(100, 100), (10, 100)], 0.5)]
        [0.55, 0.0]
    """
    sizes = np.array([np.prod(shape) for shape in shapes], dtype=float)
    raw = np.array([sum(shape) for shape in shapes]) / sizes
    whole = np.zeros(len(sizes), dtype=bool)
    density = np.ones(len(sizes))
    while not whole.all():
        left = (1.0 - sparsity) * sizes.sum() - sizes[whole].sum()
        density[~whole] = raw[~whole] * left / (raw * sizes)[~whole].sum()
        if not (density > 1.0).any():
            break
        whole |= density > 1.0
        density[whole] = 1.0
    return [float(s) for s in 1.0 - density]


def equal_loss(
    sizes: Sequence[int], grid: Sequence[float], losses: Sequence[Sequence[float]], sparsity: float
) -> list[float]:
    """Sparsities at which every layer, by itself, loses the same score.

    Args:
        sizes: of the layers.
        grid: ascending sparsities that were tried on each layer.
        losses: of score, for each layer and each of those; made to rise with the sparsity.
        sparsity: of all layers together.

    Returns:
        For each layer the sparsity that it reaches at the loss for which the total is right; beyond the
        grid all go on by the same share of what they have left.

    Example:
        >>> found = equal_loss([100, 100], [0.5, 1.0], [[0.0, 1.0], [1.0, 4.0]], 0.5)
        >>> [round(s, 3) for s in found]
        [0.75, 0.25]
    """
    weights = np.asarray(sizes) / np.sum(sizes)
    known = np.array([0.0, *grid])
    curves = [np.maximum.accumulate([0.0, *own]) for own in losses]

    def at(loss: float) -> np.ndarray:
        return np.array([_reached(known, curve, loss) for curve in curves])

    low, high = 0.0, max(curve[-1] for curve in curves)
    if weights @ at(low) > sparsity:  # more is free than is asked for
        return [float(s) for s in at(low) * sparsity / (weights @ at(low))]
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if weights @ at(middle) < sparsity else (low, middle)
    found = at(high)
    rest = sparsity - weights @ found
    return [
        float(s) for s in found + (1.0 - found) * max(rest, 0.0) / (1.0 - weights @ found + 1e-12)
    ]


def _reached(known: np.ndarray, curve: np.ndarray, loss: float) -> float:
    """The largest sparsity of which a piecewise linear curve says no more than the loss."""
    last = int(np.flatnonzero(curve <= loss).max())
    if last == len(known) - 1:
        return float(known[-1])
    part = (loss - curve[last]) / (curve[last + 1] - curve[last])
    return float(known[last] + part * (known[last + 1] - known[last]))


def one_sample(run: Run) -> Any:
    """A batch of one on the run's device: what a network costs is told for one sample."""
    example = run.task.example_inputs()
    return move(Batch(example, None), run.device).inputs


def _shares(scores: list[Tensor], sparsity: float) -> list[float]:
    """How much of each layer a ranking of all of them takes."""
    masks = keep_largest_together(scores, sparsity)
    return [1.0 - int(mask.sum()) / mask.numel() for mask in masks]


def _by_magnitude(run: Run, chosen: list[Weight], sparsity: float) -> list[float]:
    return _shares([w.value.detach().abs() for w in chosen], sparsity)


def _by_shape(run: Run, chosen: list[Weight], sparsity: float) -> list[float]:
    return erdos_renyi([tuple(w.value.shape) for w in chosen], sparsity)


def _by_energy(run: Run, chosen: list[Weight], sparsity: float) -> list[float]:
    energies = layer_energies(run.model, one_sample(run))
    tiny = torch.finfo(torch.float32).tiny
    values = [w.value.detach() for w in chosen]
    scores = [
        v.abs()
        / v.square().mean().sqrt().clamp_min(tiny)
        * v.numel()
        / max(energies[w.layer], tiny)
        for w, v in zip(chosen, values, strict=True)
    ]
    return _shares(scores, sparsity)


def _by_sensitivity(run: Run, chosen: list[Weight], sparsity: float) -> list[float]:
    layers = [w.layer for w in chosen]
    found = sensitivity(run.model, run.task, bits=(), layers=layers, limit=BATCHES)
    grid = sorted({row.amount for row in found.rows})
    scores = {(row.layer, row.amount): row.score for row in found.rows}
    losses = [[found.baseline - scores[w.name, amount] for amount in grid] for w in chosen]
    return equal_loss([w.value.numel() for w in chosen], grid, losses, sparsity)


_SPREAD: dict[str, Callable[[Run, list[Weight], float], list[float]]] = {
    "magnitude": _by_magnitude,
    "erk": _by_shape,
    "sensitivity": _by_sensitivity,
    "energy": _by_energy,
}
