"""One budget for the whole network, spent on the ranks of its layers.

The accuracy is taken to fall with the product over all layers of the part of their squared size that is kept
(Zhang 2016, rank selection), so layers are made thinner in the order in which that falls least for what is
saved.

The surprising rule: a latency is measured, not computed. Several targets in operations are tried on copies of
the network, and the largest is taken that is fast enough.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ...core.select import example_device
from ...errors import InputError
from ...measure import latency, macs, size
from ...mechanisms.budget import Budget
from ...mechanisms.factors import Ranks, factorize
from ._ranks import Option, Place, allocate

#: Targets that are tried for a latency.
_TRIES = 6


@dataclass(frozen=True)
class Offer:
    """What a layer may be: whole (no ranks, no error), or a chain of some ranks.

    Attributes:
        place: the layer.
        options: those that pay; the first is the whole layer.
    """

    place: Place
    options: list[Option]

    @classmethod
    def of(cls, place: Place, known: Sequence[Option]) -> Offer:
        """All options that pay."""
        paying = [option for option in known if place.pays(option.ranks)]
        return cls(place, [Option((), 0.0), *paying])

    def costs(self, quantity: str) -> np.ndarray:
        """Of each option: multiply-accumulates, weights, or their bytes."""
        place = self.place
        if quantity in ("macs", "latency"):
            found = [place.work(o.ranks) if o.ranks else place.macs for o in self.options]
        else:
            numbers = [
                place.weights(o.ranks) if o.ranks else place.shape.numbers for o in self.options
            ]
            item = place.weight.value.element_size() if quantity == "bytes" else 1
            found = [float(number * item) for number in numbers]
        return np.array(found, dtype=float)

    @property
    def losses(self) -> np.ndarray:
        """Of each option ``-log(1 - error)``, so that sums over layers are products of what is kept."""
        errors = np.array([option.error for option in self.options])
        return -np.log(np.maximum(1.0 - errors, 1e-12))


def spend(
    offers: Sequence[Offer], budget: Budget, model: nn.Module, dense: nn.Module, inputs: Any
) -> list[Ranks]:
    """The ranks of each layer, none for one that stays whole.

    Args:
        offers: of the layers that take part.
        budget: as a fraction of what the dense network costs.
        model: as it is now.
        dense: what the fraction is of.
        inputs: of one example; needed for operations and for time.

    Raises:
        InputError: even the smallest ranks cost more.
    """
    if budget.quantity == "latency":
        return _fast_enough(offers, budget.fraction, model, dense, inputs)
    if budget.quantity == "macs":
        now, before = macs(model, inputs).total, macs(dense, inputs).total
    elif budget.quantity == "bytes":
        now, before = size(model).dense_bytes, size(dense).dense_bytes
    else:
        now, before = size(model).parameters, size(dense).parameters
    costs = [offer.costs(budget.quantity) for offer in offers]
    others = now - sum(float(each[0]) for each in costs)
    return _chosen(offers, costs, others, budget.fraction * before)


def _chosen(
    offers: Sequence[Offer], costs: list[np.ndarray], others: float, target: float
) -> list[Ranks]:
    taken = allocate(costs, [offer.losses for offer in offers], target, others)
    return [offer.options[number].ranks for offer, number in zip(offers, taken, strict=True)]


def _fast_enough(
    offers: Sequence[Offer], fraction: float, model: nn.Module, dense: nn.Module, inputs: Any
) -> list[Ranks]:
    costs = [offer.costs("latency") for offer in offers]
    low, high = (sum(float(pick(each)) for each in costs) for pick in (np.min, np.max))
    best = _chosen(offers, costs, 0.0, low)
    if (least := _ratio(offers, best, model, dense, inputs)) > fraction:
        raise InputError(
            f"a latency of {fraction:.2f} of the dense network's cannot be reached: with the cheapest ranks "
            f"it is {least:.2f}. Ask for more, or let more layers take part."
        )
    for _ in range(_TRIES):
        middle = (low + high) / 2
        found = _chosen(offers, costs, 0.0, middle)
        if _ratio(offers, found, model, dense, inputs) <= fraction:
            low, best = middle, found
        else:
            high = middle
    return best


def _ratio(
    offers: Sequence[Offer],
    chosen: Sequence[Ranks],
    model: nn.Module,
    dense: nn.Module,
    inputs: Any,
) -> float:
    """The time of a forward pass with these ranks over the dense network's."""
    tried = copy.deepcopy(model)
    for offer, ranks in zip(offers, chosen, strict=True):
        if ranks and not offer.place.encoded:
            factorize(tried, offer.place.name, offer.place.kind, ranks)
    clock: Any = "cpu" if example_device(model).type == "cpu" else "wall"
    timed = latency({"dense": dense, "thin": tried}, inputs, seconds=0.5, clock=clock)
    return timed.models["thin"].ratio.median
