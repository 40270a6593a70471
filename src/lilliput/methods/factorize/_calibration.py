"""Chains that are fitted to what layers put out on training samples, instead of to their weights.

The surprising rule: nothing of the size of a layer's inputs squared is ever formed. Second moments of outputs
are enough for the chains that are solved, and those of the few channels in between for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ...core.types import Batch
from ...mechanisms.factors import compose
from ...mechanisms.solvers import least_squares, visit_rows
from ._decompositions import leading_map
from ._ranks import Place

#: Hands rows of some layers' inputs on to a function; see :func:`lilliput.mechanisms.solvers.visit_rows`.
Visit = Callable[[Iterable[str], Callable[[str, Tensor], None]], None]


def visiting(
    model: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    per_sample: int,
    seed: Callable[[], torch.Generator],
) -> Visit:
    """A function that shows the same rows each time it is called."""

    def visit(layers: Iterable[str], use: Callable[[str, Tensor], None]) -> None:
        visit_rows(model, layers, batches(), per_sample, seed(), use, once=True)

    return visit


def output_moments(places: Iterable[Place], visit: Visit) -> dict[str, Tensor]:
    """For each layer the sum of ``y y^T`` over its outputs without bias, ``(groups, out, out)``."""
    maps = {place.name: place.blocks.flatten(2) for place in places}
    sums: dict[str, Tensor] = {}

    def use(name: str, rows: Tensor) -> None:
        y = _mapped(rows, maps[name])
        sums[name] = sums.get(name, 0) + torch.einsum("rgo,rgp->gop", y, y)

    visit(maps, use)
    return sums


def refitted(
    places: Mapping[str, Place], chains: Mapping[str, list[Tensor]], visit: Visit
) -> dict[str, list[Tensor]]:
    """The chains with their last layers solved for the least squared error of the outputs.

    The error is at most that of the chains that are given.
    """
    whole = {name: place.blocks.flatten(2) for name, place in places.items()}
    slim = {name: leading_map(chains[name], place.blocks) for name, place in places.items()}
    gram: dict[str, Tensor] = {}
    cross: dict[str, Tensor] = {}

    def use(name: str, rows: Tensor) -> None:
        y, z = _mapped(rows, whole[name]), _mapped(rows, slim[name])
        gram[name] = gram.get(name, 0) + torch.einsum("rgf,rgh->gfh", z, z)
        cross[name] = cross.get(name, 0) + torch.einsum("rgf,rgo->gfo", z, y)

    visit(places, use)
    found = dict(chains)
    for name in gram:
        *others, last = chains[name]
        toward = last.reshape(len(gram[name]), -1, last[0].numel()).mT
        solved = [
            least_squares(*each) for each in zip(gram[name], cross[name], toward, strict=True)
        ]
        found[name] = [*others, torch.stack(solved).mT.reshape(last.shape)]
    return found


def output_errors(
    places: Mapping[str, Place], chains: Mapping[str, list[Tensor]], visit: Visit
) -> dict[str, float]:
    """Of each layer the squared error of its outputs over their squared size, on the rows of the visit."""
    whole = {name: place.blocks.flatten(2) for name, place in places.items()}
    slim = {
        name: compose(chains[name], len(maps), places[name].shape.enters).view(maps.shape)
        for name, maps in whole.items()
    }
    sums = {name: [0.0, 0.0] for name in places}

    def use(name: str, rows: Tensor) -> None:
        y = _mapped(rows, whole[name])
        sums[name][0] += float((_mapped(rows, slim[name]) - y).square().sum())
        sums[name][1] += float(y.square().sum())

    visit(places, use)
    return {name: error / total if total else 0.0 for name, (error, total) in sums.items()}


def _mapped(rows: Tensor, maps: Tensor) -> Tensor:
    """Linear maps of what a layer multiplies: ``(rows, groups, features)``."""
    by_group = rows.double().unflatten(1, (len(maps), -1)).flatten(2)
    return torch.einsum("rgc,gfc->rgf", by_group, maps)
