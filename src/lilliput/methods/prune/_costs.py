"""What a network costs as a function of the channels that its groups keep.

Parameters and bytes follow from shapes: the numbers in a tensor are the product of its dims, and a dim
loses what the groups in it lose. The multiply-accumulates of a convolution or linear layer are
proportional to the numbers in its weight. So one measurement of the dense network prices all thinner
ones, exactly.

The surprising rule: where operators multiply activations with each other (attention), or one module
multiplies with several weights, that proportion is a guess. So what fits a budget in MACs is really cut, on
a copy, and measured, and a wrong guess is corrected; see :meth:`Costs.correct`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from torch import nn

from ...core.select import example_device
from ...measure import Macs, Size, TensorSize, latency, macs, size
from ...mechanisms import budget
from ...mechanisms.groups.classes import Group, Groups
from ...mechanisms.surgery import cut

# A latency is measured on a really cut copy: seconds a try, and finer steps than this are noise.
_LATENCY_STEP = 1 / 64
# Tries to meet a target where prices are guesses, and what counts as met.
_TRIES = 6
_NEAR = 0.995


class Costs:
    """Parameters, bytes and MACs as functions of kept counts, int64 ``(groups,)``.

    Args:
        groups: all groups of the network.
        size: of the network with all channels.
        macs: of the same.

    Example:
        >>> import torch
        >>> from lilliput.measure import macs, size
        >>> from lilliput.mechanisms.groups import Member
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        >>> members = Member("0.weight", 0, "makes", np.arange(6)[:, None]), Member(
        ...     "1.weight", 1, "uses", np.arange(6)[:, None]
        ... )
        >>> costs = Costs([Group(6, members)], size(net), macs(net, torch.zeros(1, 4)))
        >>> costs.macs(np.array([3]))
        18.0
    """

    def __init__(self, groups: Sequence[Group], size: Size, macs: Macs) -> None:
        self.channels = np.array([g.channels for g in groups], dtype=np.int64)
        self._widths(groups, size.tensors)
        full = self.elements(self.channels)
        self.untouched = size.parameters - full[self.trained].sum()
        self.untouched_bytes = size.dense_bytes - (full * self.item).sum()
        self._work(size.tensors, macs, full)

    def elements(self, kept: np.ndarray) -> np.ndarray:
        """How many numbers each tensor holds that a group reaches into, float64 ``(tensors,)``."""
        widths = self.sizes - self.repeats @ (self.channels - kept)
        numbers = self.rest.copy()
        np.multiply.at(numbers, self.tensor, widths)
        return numbers

    def parameters(self, kept: np.ndarray) -> float:
        """Numbers in the parameters."""
        return float(self.untouched + self.elements(kept)[self.trained].sum())

    def bytes(self, kept: np.ndarray) -> float:
        """Bytes of parameters and persistent buffers, each at its own type."""
        return float(self.untouched_bytes + (self.elements(kept) * self.item).sum())

    def macs(self, kept: np.ndarray) -> float:
        """Multiply-accumulates of the forward pass that was measured."""
        return float(self._by_module(kept).sum())

    def correct(self, kept: np.ndarray, measured: Macs, damping: float = 1.0) -> None:
        """Scale each module's price so that it is right at one point, measured on a real cut.

        Args:
            kept: the point.
            measured: what the network costs there.
            damping: exponent of the correction; below 1 it goes only a part of the way.
        """
        priced = self._by_module(kept)
        real = np.array([measured.by_module.get(name, 0) for name in self.modules], dtype=float)
        self.factor[priced > 0] *= (real[priced > 0] / priced[priced > 0]) ** damping

    def _by_module(self, kept: np.ndarray) -> np.ndarray:
        numbers = self.elements(kept)[self.priced] * self.price
        sums = np.bincount(self.module, numbers, minlength=len(self.modules))
        return (self.fixed + sums) * self.factor

    def _widths(self, groups: Sequence[Group], tensors: Mapping[str, TensorSize]) -> None:
        """A row for each dim that loses something, and how much it loses with each group."""
        dims: dict[tuple[str, int], int] = {}
        entries: list[tuple[int, int, int]] = []
        for number, group in enumerate(groups):
            for member in group.members:
                if member.tensor in tensors:  # a buffer that is not saved costs nothing
                    row = dims.setdefault((member.tensor, member.dim), len(dims))
                    entries.append((row, number, member.index.shape[1]))
        self.names = list(dict.fromkeys(name for name, _ in dims))
        place = {name: n for n, name in enumerate(self.names)}
        rows, columns, repeats = np.array(entries, dtype=np.int64).reshape(-1, 3).T
        self.repeats = sparse.csr_array(
            (repeats, (rows, columns)), shape=(len(dims), len(self.channels))
        )
        self.tensor = np.array([place[name] for name, _ in dims], dtype=np.int64)
        self.sizes = np.array([tensors[name].shape[dim] for name, dim in dims], dtype=np.int64)
        known = [tensors[name] for name in self.names]
        self.rest = np.array([t.elements for t in known], dtype=float)
        np.divide.at(self.rest, self.tensor, self.sizes)
        self.trained = np.array([t.is_parameter for t in known], dtype=bool)
        self.item = np.array([t.dense_bytes / max(t.elements, 1) for t in known])

    def _work(self, tensors: Mapping[str, TensorSize], macs: Macs, full: np.ndarray) -> None:
        """MACs of each module: a price for each number in its cut weights, and what is fixed."""
        self.modules = list(macs.by_module)
        place = {name: n for n, name in enumerate(self.modules)}
        weights: dict[str, list[str]] = {}
        for name, tensor in tensors.items():
            if tensor.is_parameter and len(tensor.shape) > 1:
                weights.setdefault(name.rpartition(".")[0], []).append(name)
        total = {m: sum(tensors[w].elements for w in weights.get(m, ())) for m in self.modules}
        cut = [
            (n, place[m], macs.by_module[m] / total[m])
            for n, name in enumerate(self.names)
            if (m := name.rpartition(".")[0]) in place and name in weights.get(m, ())
        ]
        self.priced = np.array([n for n, _, _ in cut], dtype=np.int64)
        self.module = np.array([m for _, m, _ in cut], dtype=np.int64)
        self.price = np.array([p for _, _, p in cut])
        paid = np.bincount(self.module, full[self.priced] * self.price, minlength=len(place))
        self.fixed = np.array([float(macs.by_module[m]) for m in self.modules]) - paid
        self.factor = np.ones(len(place))


@dataclass(frozen=True)
class Offer:
    """Ways to thin a network, from which the one that fits a budget is taken.

    Attributes:
        model: as it is now.
        dense: what fractions are of.
        groups: of the model.
        inputs: an example.
        wish: fraction of the channels -> wished count of each group.
        allowed: counts that each group may keep.
        rank: which groups get channels back first; see :func:`lilliput.mechanisms.budget.count`.
    """

    model: nn.Module
    dense: nn.Module
    groups: Groups
    inputs: Any
    wish: Callable[[float], np.ndarray]
    allowed: Sequence[np.ndarray]
    rank: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def within(self, quantity: budget.Quantity, fraction: float) -> np.ndarray:
        """The counts that use up a fraction of what the dense network costs.

        Raises:
            InputError: even the smallest counts cost more.
        """
        if quantity == "latency":
            return self._count(self._latency(), fraction, _LATENCY_STEP, raises=False)
        costs = Costs(self.groups.groups, size(self.model), macs(self.model, self.inputs))
        if quantity == "macs":
            return self._within_macs(costs, fraction * macs(self.dense, self.inputs).total)
        dense = size(self.dense)
        total = dense.parameters if quantity == "parameters" else dense.dense_bytes
        return self._count(getattr(costs, quantity), fraction * total)

    def thinned(self, kept: np.ndarray) -> nn.Module:
        """A copy that keeps so many channels, whichever: for a cost it makes no difference."""
        removal = {
            number: np.arange(stay, group.channels)
            for number, (group, stay) in enumerate(zip(self.groups.groups, kept, strict=True))
            if stay < group.channels
        }
        model = copy.deepcopy(self.model)
        if removal:
            cut(model, self.groups, removal, tolerance=None)
        return model

    def _within_macs(self, costs: Costs, target: float) -> np.ndarray:
        """Price, choose, look what the choice really costs, and where prices were wrong, again.

        Of all choices that were looked at the one that uses up most of the target is taken.
        """
        smallest = np.array([steps[0] for steps in self.allowed])
        kept = self._count(costs.macs, target)
        best, most = smallest, 0
        for number in range(_TRIES):
            real = macs(self.thinned(kept), self.inputs)
            if most < real.total <= target:
                best, most = kept, real.total
            if most >= _NEAR * target or round(costs.macs(kept)) == real.total <= target:
                break
            # A price that was right for few channels is too low for many: do not swing to and fro.
            costs.correct(kept, real, damping=0.5 if number else 1.0)
            aim = target if most else target * target / real.total
            kept = self._count(costs.macs, max(aim, min(target, costs.macs(smallest))))
        return best

    def _latency(self) -> budget.Cost:
        """The time of a forward pass over the dense network's; each try is cut and timed once."""
        known: dict[tuple[int, ...], float] = {}
        clock: Any = "cpu" if example_device(self.model).type == "cpu" else "wall"

        def ratio(kept: np.ndarray) -> float:
            key = tuple(kept.tolist())
            if key not in known:
                both = {"dense": self.dense, "thin": self.thinned(kept)}
                timed = latency(both, self.inputs, seconds=0.5, clock=clock)
                known[key] = timed.models["thin"].ratio.median
            return known[key]

        return ratio

    def _count(
        self, cost: budget.Cost, target: float, precision: float = 1e-6, raises: bool = True
    ) -> np.ndarray:
        rank = self.rank if raises else None
        return budget.count(
            self.wish, self.allowed, cost=cost, target=target, rank=rank, precision=precision
        )
