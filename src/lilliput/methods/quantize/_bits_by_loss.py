"""How many bits each layer gets, when their mean is given: layers that bear it get few.

The surprising rule: a layer's price is what *it alone* costs the loss, every other layer being real; that
prices add up is assumed, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...core.run import Run
from ...core.select import Weight
from ...core.task import answer, evaluation
from ...core.types import Batch
from ...mechanisms.encodings import original_of
from ...mechanisms.ranges import steps_of
from ._rounding import nearest


@torch.no_grad()
def losses(
    run: Run, chosen: list[Weight], choices: Sequence[int], batches: Sequence[Batch]
) -> list[list[float]]:
    """The task's loss on some batches with one layer at each number of bits, for each layer."""

    def loss() -> float:
        with evaluation(run.model):
            found = [run.task.loss(answer(run.model, b.inputs), b.target) for b in batches]
        return float(torch.stack([value.float() for value in found]).mean())

    rows = []
    for weight in chosen:
        original = original_of(weight)
        before = original.detach().clone()
        flat, row = before.flatten(1), []
        for bits in choices:
            steps, highest = steps_of(flat, bits, "mse"), 2 ** (bits - 1) - 1
            original.copy_(nearest(flat, steps, highest).view_as(before))
            row.append(loss())
        original.copy_(before)
        rows.append(row)
    return rows


def spread_bits(
    sizes: Sequence[int],
    choices: Sequence[int],
    costs: Sequence[Sequence[float]],
    mean_bits: float,
) -> list[int]:
    """Lower layers from the most bits, each time where a bit less costs the least, until the mean is reached.

    Args:
        sizes: weights of each layer.
        choices: ascending numbers of bits.
        costs: of each layer at each of them.
        mean_bits: over all weights, at most.

    Returns:
        Bits of each layer.

    Example:
        >>> spread_bits([100, 100], [4, 8], [[0.5, 0.1], [0.2, 0.1]], 6.0)
        [8, 4]
    """
    places = [len(choices) - 1] * len(sizes)
    limit = mean_bits * sum(sizes)

    def price(layer: int) -> float:
        place = places[layer]
        saved = sizes[layer] * (choices[place] - choices[place - 1])
        return (costs[layer][place - 1] - costs[layer][place]) / saved

    while sum(n * choices[p] for n, p in zip(sizes, places, strict=True)) > limit:
        lowered = min((n for n, place in enumerate(places) if place), key=price)
        places[lowered] -= 1
    return [choices[place] for place in places]
