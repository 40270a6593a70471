"""Filters of small magnitude: whole filters go, and the next layer's kernels with them.

Paper: Pruning Filters for Efficient ConvNets (Li, Kadav, Durdanovic, Samet, Graf; ICLR 2017; arXiv
1608.08710)

A filter's importance is the sum of the magnitudes of its weights, ``s_j = sum |F_j|``. The filters of
smallest s_j are removed, with their feature maps, their batch normalization and the kernels of the next
layer that read them.

*Independent* selection ranks each layer by its whole filters. *Greedy* selection goes from the input to
the output and leaves out of s_j the kernels that read channels already removed.

Where a shortcut is added, the sum's channels are one choice: they are ranked by the projection shortcut, the
layer that leads around the block. Without one (identity shortcuts), the paper prunes only inside of the
blocks; here the filters of all layers that make the sum are counted together. ``layers`` or ``keep`` with
patterns such as ``"layer*.conv1"`` prune inside of the blocks only.

Rates per layer come from a scan of each layer's sensitivity: ``max_drop`` removes from every layer the
largest tenth that by itself costs at most so much of the validation score. The network is pruned once and
retrained, or in ``rounds``.

Faithful: criterion, both selections, the shortcut rule, rates by sensitivity, one-shot and iterative pruning.
Differs: the paper gives all layers of a stage one rate, chosen by eye; the scan here chooses each.

Cost: one pass over the weights; with ``max_drop`` up to nine evaluations for each group of channels. When not
to use it: at high rates, where magnitude says little; and compare with the same thin network trained
from scratch, which later work found to do as well.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from ...core.registry import method
from ...core.run import Run
from ...core.select import example_device
from ...core.task import Task, evaluate
from ...core.types import NonNegative
from ...measure.sensitivity import Row, Sensitivity
from ...mechanisms.budget import lowest
from ...mechanisms.encodings import bake
from ...mechanisms.groups import Group, Groups, Member
from ...mechanisms.groups.classes import Removal
from ._channels import ChannelMethod
from ._norms import effective, rows

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def magnitudes(
    model: nn.Module,
    groups: Groups,
    number: int,
    makers: Sequence[Member],
    removed: Removal | None = None,
) -> np.ndarray:
    """``s_j`` of each channel: the sum of the magnitudes of its filters.

    Args:
        model: the network.
        groups: of it.
        number: of the group whose channels are meant.
        makers: whose filters count.
        removed: channels of other groups; kernels that read them are left out (greedy selection).

    Returns:
        float64 ``(channels,)``.
    """
    total = np.zeros(groups.groups[number].channels)
    for maker in makers:
        weight = effective(model, maker.tensor).abs()
        for other, gone in (removed or {}).items():
            weight = _without(weight, maker, groups.groups[other], gone)
        total += rows(weight, maker).sum(1).cpu().double().numpy()
    return total


def shortcut_makers(groups: Groups, number: int) -> list[Member]:
    """The filters that rank a group: those of its projection shortcuts, or all where there is none.

    A projection shortcut reads channels from which a second way, through the block, leads to the group.
    """
    makers = groups.groups[number].with_role("makes")
    layers = {m.layer for m in makers}
    projections = {
        layer
        for place, source in enumerate(groups.groups)
        if place != number and len(layers) > 1
        for layer in layers & _users(source)
        if _leads_to(groups, _users(source) - layers, number, avoid=place)
    }
    return [m for m in makers if m.layer in projections] or list(makers)


def filter_sensitivity(
    model: nn.Module,
    task: Task,
    groups: Groups,
    *,
    fractions: Sequence[float] = FRACTIONS,
    numbers: Iterable[int] | None = None,
    max_drop: float = np.inf,
    limit: int | None = None,
) -> Sensitivity:
    """The score with the smallest filters of one group silenced, all else whole, nothing retrained.

    Args:
        model: left as it is.
        task: its validation batches and its score.
        groups: of the model.
        fractions: of the filters, ascending.
        numbers: the groups that are scanned; by default all.
        max_drop: a group is scanned until it costs more than this.
        limit: evaluate on so many validation batches; None for all.

    Returns:
        A row for each group (by the first layer that makes it) and fraction; see :func:`rates`.
    """
    probe = bake(copy.deepcopy(model))
    batches = list(itertools.islice(iter(task.validation), limit))
    device = example_device(model)
    baseline = evaluate(probe, batches, task.score, device)
    found: list[Row] = []
    for number in range(len(groups.groups)) if numbers is None else numbers:
        group = groups.groups[number]
        order = magnitudes(probe, groups, number, shortcut_makers(groups, number)).argsort()
        for fraction in fractions:
            with _silenced(probe, group, order[: round(fraction * group.channels)]):
                score = evaluate(probe, batches, task.score, device)
            found.append(Row(group.name, "sparsity", fraction, score))
            if baseline - score > max_drop:
                break
    return Sensitivity(baseline, task.score_name, found)


def rates(scan: Sensitivity, max_drop: float) -> dict[str, float]:
    """How much each layer may keep, so that thinning it alone costs at most ``max_drop`` of the score.

    Args:
        scan: of filters (:func:`filter_sensitivity`) or of single weights
            (:func:`lilliput.measure.sensitivity.sensitivity`).
        max_drop: in the unit of the score.

    Returns:
        layer -> keep, for ``FilterL1(keep=...)``. The first amount that costs more ends a layer's search.

    Example:
        >>> points = [("conv", 0.1, 90.0), ("conv", 0.2, 89.0), ("conv", 0.3, 90.0)]
        >>> rows = [Row(layer, "sparsity", amount, score) for layer, amount, score in points]
        >>> rates(Sensitivity(90.0, "accuracy", rows), max_drop=0.5)
        {'conv': 0.9}
    """
    found: dict[str, float] = {}
    ended: set[str] = set()
    for row in sorted(scan.rows, key=lambda row: row.amount):
        layer = row.layer.removesuffix(".weight")
        found.setdefault(layer, 1.0)
        if row.kind != "sparsity" or layer in ended:
            continue
        if scan.baseline - row.score > max_drop:
            ended.add(layer)
        else:
            found[layer] = 1.0 - row.amount
    return found


@method
class FilterL1(ChannelMethod):
    """Remove the filters whose weights have the smallest sum of magnitudes.

    Attributes:
        selection: rank whole filters, or from input to output without the kernels of removed channels.
        shortcut: where a block's output is added to a shortcut, rank by the projection on it if there
            is one, or by all layers that make the sum.
        max_drop: instead of keep or budget: how much of the validation score each layer may cost by
            itself, as a scan finds out.

    Example:
        >>> FilterL1(keep={"layer1*conv1": 0.9, "layer2*conv1": 0.7}, selection="greedy").rounds
        1
    """

    data_free: ClassVar[bool] = True

    selection: Literal["independent", "greedy"] = "independent"
    shortcut: Literal["projection", "all"] = "projection"
    max_drop: NonNegative | None = None

    @model_validator(mode="after")
    def _layer_by_layer(self) -> FilterL1:
        if self.scope == "global" and (self.selection == "greedy" or self.max_drop is not None):
            raise ValueError("scope: global knows neither greedy selection nor max_drop")
        return self

    def _check_amount(self) -> None:
        if sum(amount is not None for amount in (self.keep, self.budget, self.max_drop)) != 1:
            raise ValueError("give one of keep, budget and max_drop, and no more")

    def attach(self, run: Run) -> None:
        """Scan the layers, if they decide by their sensitivity."""
        if self.max_drop is not None:
            groups = self.groups(run)
            taking = [n for n, mine in enumerate(self.takes_part(groups)) if mine]
            scan = filter_sensitivity(
                run.model, run.task, groups, numbers=taking, max_drop=self.max_drop
            )
            self.memory(run)["rates"] = rates(scan, self.max_drop)
        super().attach(run)

    def ratios(self, run: Run, groups: Groups) -> list[float | None]:
        """What each group keeps: as set, or as the scan found."""
        if self.max_drop is None:
            return super().ratios(run, groups)
        found = self.memory(run)["rates"]
        return [found.get(group.name) for group in groups.groups]

    def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
        """The sum of magnitudes of each channel's filters."""
        return [
            magnitudes(run.model, groups, number, self._makers(groups, number))
            for number in range(len(groups.groups))
        ]

    def removal(self, run: Run, groups: Groups) -> Removal:
        """The channels of smallest importance, chosen independently or one layer after the other."""
        if self.selection == "independent":
            return super().removal(run, groups)
        removed: dict[int, np.ndarray] = {}
        for number, stay in enumerate(self.counts(run, groups)):
            makers = self._makers(groups, number)
            scores = magnitudes(run.model, groups, number, makers, removed)
            for gone in lowest([scores], np.array([stay])).values():
                removed[number] = gone
        return removed

    def _makers(self, groups: Groups, number: int) -> Sequence[Member]:
        if self.shortcut == "projection":
            return shortcut_makers(groups, number)
        return groups.groups[number].with_role("makes")


def _users(group: Group) -> set[str]:
    return {member.layer for member in group.with_role("uses")}


def _leads_to(groups: Groups, layers: set[str], goal: int, avoid: int) -> bool:
    """Whether channels of one group can be reached from some layers without those of another."""
    seen, ahead = {avoid}, set(layers)
    while ahead:
        reached = {
            n for n, g in enumerate(groups.groups) if n not in seen and ahead & set(g.layers)
        }
        if goal in reached:
            return True
        seen |= reached
        ahead = {layer for n in reached for layer in _users(groups.groups[n])}
    return False


def _without(weight: Tensor, maker: Member, group: Group, gone: np.ndarray) -> Tensor:
    """The magnitudes with zeros for what reads removed channels."""
    for member in group.with_role("uses"):
        if member.tensor == maker.tensor and member.dim != maker.dim:
            columns = torch.from_numpy(member.index[gone].ravel()).to(weight.device)
            weight = weight.index_fill(member.dim, columns, 0.0)
    return weight


@contextmanager
def _silenced(model: nn.Module, group: Group, gone: np.ndarray) -> Iterator[None]:
    """Let nothing read some channels; the weights are put back, bit for bit."""
    before = {m.tensor: effective(model, m.tensor).clone() for m in group.with_role("uses")}
    try:
        for member in group.with_role("uses"):
            weight = effective(model, member.tensor)
            columns = torch.from_numpy(member.index[gone].ravel()).to(weight.device)
            weight.index_fill_(member.dim, columns, 0.0)
        yield
    finally:
        for name, weight in before.items():
            effective(model, name).copy_(weight)
