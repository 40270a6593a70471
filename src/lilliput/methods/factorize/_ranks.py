"""Which ranks: what each costs in error and in operations, and which to take for all layers together.

The surprising rule: errors are relative, so that layers can be compared: the squared error of a weight (or of
a layer's outputs) over its squared size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...core.select import Weight
from ...core.task import call, evaluation
from ...errors import InputError
from ...measure.macs import macs, unfused
from ...mechanisms.factors import Ranks, Shape, chain, full_ranks, numbers, thin
from ._decompositions import (
    CLOSED,
    MATRICES,
    cp,
    leading,
    matrix_of,
    relative_error,
    squares_of,
    unfolded,
)
from ._variational import evbmf

#: Of CP, whose error has to be found for each rank anew: how many ranks are tried, with how many updates.
_STEPS, _SWEEPS = 12, 50


class Option(NamedTuple):
    """Ranks that a layer may get, and its relative squared error then."""

    ranks: Ranks
    error: float


@dataclass
class Place:
    """A layer, or the matrix of a recurrent one, that may become a product.

    Attributes:
        weight: its weight.
        name: of the layer; of the tensor, where the matrix is one of several.
        kind: of the chain.
        shape: what it multiplies.
        encoded: whether the product is an encoding, because no layers can stand for it.
        calls: shapes of the inputs of each call in one example.
        macs: multiply-accumulates of the layer in one example.
        positions: by which the weights of each thin layer are multiplied to get its multiply-accumulates.
    """

    weight: Weight
    name: str
    kind: str
    shape: Shape
    encoded: bool = False
    calls: list[torch.Size] = field(default_factory=list)
    macs: float = 0.0
    positions: list[float] = field(default_factory=list)

    @property
    def blocks(self) -> Tensor:
        """The weight, ``(groups, out, in, *kernel)`` in double precision."""
        weight: Tensor = self.weight.value.detach().double()
        found: Tensor = weight.unflatten(0, (self.shape.groups, -1))
        return found

    @property
    def full(self) -> Ranks:
        """The ranks at which nothing is lost."""
        return full_ranks(self.shape, self.kind)

    def weights(self, ranks: Ranks) -> int:
        """Numbers in the thin layers, biases not counted."""
        return numbers(self.shape, self.kind, ranks)

    def work(self, ranks: Ranks) -> float:
        """Multiply-accumulates of the thin layers; 0 where nothing was measured."""
        if self.encoded:  # the product is formed, and then multiplies as before
            return self.macs
        links = chain(self.shape, self.kind, ranks)
        each = (link.numbers * self.shape.groups for link in links)
        return sum(n * p for n, p in zip(each, self.positions or [0.0] * len(links), strict=True))

    def pays(self, ranks: Ranks) -> bool:
        """Whether there are fewer weights than before, and not more operations."""
        return self.weights(ranks) < self.shape.numbers and self.work(ranks) <= self.macs


# -- what is there ------------------------------------------------------------------------------------


@torch.no_grad()
def measure_work(model: nn.Module, places: Sequence[Place], inputs: Any) -> None:
    """Find out of each place how many operations it makes in one example, whole and as a chain."""
    layers = {place.weight.layer: place for place in places if not place.encoded}

    def note(place: Place) -> Callable[..., None]:
        def look(layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            place.calls.append((args[0] if args else keywords["input"]).shape)

        return look

    with evaluation(model), unfused():
        handles = [
            model.get_submodule(name).register_forward_pre_hook(note(place), with_kwargs=True)
            for name, place in layers.items()
        ]
        try:
            call(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    for place in layers.values():
        _measure_one(place)


def _measure_one(place: Place) -> None:
    layer: Any = place.weight.module
    like = place.weight.value
    ones = (1,) * len(place.full)
    slim = thin(layer, place.kind, ones)
    links = chain(place.shape, place.kind, ones)
    place.positions = [0.0] * len(links)
    for size in place.calls:
        example = torch.zeros(size, dtype=like.dtype, device=like.device)
        place.macs += macs(layer, example).total
        by_module = macs(slim, example).by_module
        for number, link in enumerate(links):
            weights = link.numbers * place.shape.groups
            place.positions[number] += by_module.get(str(number), 0) / weights


def options(place: Place, covariance: Tensor | None = None) -> list[Option]:
    """What ranks a place may get, ascending, the full ones last.

    Args:
        place: a layer.
        covariance: second moments of its outputs, ``(groups, out, out)``, where errors are of outputs.
    """
    if place.kind == "tucker":
        return _tucker_options(place.blocks)
    if place.kind == "cp":
        return _cp_options(place)
    if covariance is not None and place.kind in CLOSED:
        squares = torch.linalg.eigvalsh(covariance).flip(-1).clamp_min(0.0)
    else:
        squares = squares_of(matrix_of(place.blocks, place.kind))
    kept = squares.sum(0).cumsum(0)[: place.full[0]]
    return [Option((r,), error) for r, error in enumerate(_left(kept, squares.sum()), 1)]


def _left(kept: Tensor, total: Tensor) -> list[float]:
    """Of a total, the parts that are not among what is kept."""
    if not bool(total > 0):
        return [0.0] * len(kept)
    parts: list[float] = (1.0 - kept / total).clamp_min(0.0).tolist()
    return parts


def _tucker_options(blocks: Tensor) -> list[Option]:
    """Pairs of ranks along which both unfoldings keep the same part of their size; errors are HOSVD's."""
    by_out, by_in = unfolded(blocks)
    most = [min(matrix.shape[1:]) for matrix in (by_out, by_in)]
    left, right = leading(by_out @ by_out.mT, most[0]), leading(by_in @ by_in.mT, most[1])
    core = torch.einsum("goi...,goq,gip->gqp...", blocks, left, right).square()
    table = core.sum(0).flatten(2).sum(2)  # what each pair of basis vectors keeps: (out, in)
    total, kept = table.sum(), table.cumsum(0).cumsum(1)
    if not bool(total > 0):
        return [Option((1, 1), 0.0)]
    parts = [table.sum(1 - dim).cumsum(0) / total for dim in (0, 1)]
    pairs = sorted({
        tuple(min(int((part < level).sum()) + 1, len(part)) for part in parts)
        for level in torch.cat(parts).tolist()
    })  # fmt: skip
    return [
        Option((enters, out), max(0.0, float(1.0 - kept[out - 1, enters - 1] / total)))
        for out, enters in pairs
    ]


def _cp_options(place: Place) -> list[Option]:
    """A dozen ranks up to the largest that pays, evenly spaced in proportion."""
    each = place.weights((1,))
    most = max(1, min(place.full[0], (place.shape.numbers - 1) // each))
    ranks = sorted({round(r) for r in np.geomspace(1, most, _STEPS)})
    found = [
        Option((r,), relative_error(place.blocks, cp(place.blocks, r, _SWEEPS))) for r in ranks
    ]
    return found if most == place.full[0] else [*found, Option(place.full, 0.0)]


def variational_ranks(place: Place) -> Ranks:
    """The ranks that empirical variational Bayes finds beneath the noise, the largest of all groups; or 0."""
    matrices = [matrix_of(place.blocks, place.kind)] if place.kind in MATRICES else []
    if place.kind == "tucker":
        matrices = list(unfolded(place.blocks))[::-1]
    found = []
    for matrix in matrices:
        values = squares_of(matrix).sqrt().cpu().numpy()
        found.append(max(evbmf(v, *matrix.shape[1:])[0] for v in values))
    return tuple(found)


# -- what to take -------------------------------------------------------------------------------------


def by_energy(known: Iterable[Option], energy: float) -> Ranks:
    """The smallest ranks that keep a part of the squared size.

    Example:
        >>> by_energy([Option((1,), 0.3), Option((2,), 0.1), Option((3,), 0.0)], 0.9)
        (2,)
    """
    *some, full = known
    return next((o.ranks for o in some if 1.0 - o.error >= energy - 1e-12), full.ranks)


def allocate(
    costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], target: float, others: float = 0.0
) -> list[int]:
    """One option for each layer, so that all together cost no more than the target.

    All begin with the option of the least error. Each time the layer is made cheaper, and by so much, that
    the error grows least for what is saved. What the last step saved too much is given back.

    Args:
        costs: of the options of each layer.
        errors: of the options of each layer; those of different layers are comparable.
        target: of the sum of costs.
        others: what the rest of the network costs.

    Raises:
        InputError: the cheapest options cost more.

    Example:
        >>> price = np.array([9.0, 6.0, 3.0])
        >>> allocate([price, price], [np.array([0, 0.1, 0.5]), np.array([0, 0.3, 0.4])], 13.0)
        [1, 1]
    """
    least = others + sum(float(c.min()) for c in costs)
    if least > target:
        raise InputError(
            f"the budget of {target:,.6g} cannot be reached: with every layer at rank 1 there still are "
            f"{least:,.6g}. Ask for more, or let more layers take part."
        )
    now = [int(e.argmin()) for e in errors]
    moves = [_best_move(c, e, n) for c, e, n in zip(costs, errors, now, strict=True)]

    def spare() -> float:
        return target - others - float(sum(c[n] for c, n in zip(costs, now, strict=True)))

    while spare() < -1e-9 * abs(target):
        layer = min(range(len(now)), key=lambda place: moves[place][0])
        now[layer] = moves[layer][1]
        moves[layer] = _best_move(costs[layer], errors[layer], now[layer])
    for layer in sorted(range(len(now)), key=lambda place: -errors[place][now[place]]):
        fits = costs[layer] <= costs[layer][now[layer]] + max(0.0, spare())
        now[layer] = int(np.where(fits, errors[layer], np.inf).argmin())
    return now


def _best_move(costs: np.ndarray, errors: np.ndarray, now: int) -> tuple[float, int]:
    """The growth of the error for what is saved, and the option with which that is least."""
    saved = costs[now] - costs
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(saved > 0, (errors - errors[now]) / saved, np.inf)
    best = int(slope.argmin())
    return float(slope[best]), best
