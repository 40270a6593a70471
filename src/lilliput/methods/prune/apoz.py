"""Average percentage of zeros: units that are silent on nearly all inputs can go.

Paper: Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures (Hu,
Peng, Tai, Tang; arXiv 2016; arXiv 1607.03250)

``APoZ_c = sum over k, j of [O_cj(k) = 0] / (N * M)``: of the N examples and M positions of channel c after
its ReLU, the share at which it is zero. 1 is a dead unit, 0 one that always fires. The paper removes what
lies more than one standard deviation above the mean of its layer, ``APoZ_c > mean + std``, begins with the
layers of highest mean, retrains from the kept weights, and iterates. That rule acts when neither ``keep``
nor ``budget`` is given; with one of them the channels of highest APoZ go, as many as it says.

Faithful: the statistic, in eval mode; the rule and its order of layers; kept weights retrain as they are.
Differs: the paper counts on the validation set, here on training batches, because validation data judge
the result. The standard deviation is the population's (the paper does not say which). With the rule,
widths are rounded up, so that nothing goes that the rule would keep: ``round_to: 1`` is the paper's. Where
the channels pass several ReLUs (a residual stream), their shares are averaged.

The surprising rule: a ReLU is found by what it does. Activations count that never are negative and sometimes
zero on the calibration data: those that a module made so, else those that a layer reads. What pooling,
flattening or dropout makes of one is not counted again. Channels without such an activation (GELU, sigmoid,
no nonlinearity at all) cannot be judged and stay whole; if a setting names them, or there are no others,
that is an error.
``unrectified: not_positive``, an extension of ours, judges them by the share of values that are not
positive where the next layers read them.

Cost: forward passes over ``samples`` examples a round. When not to use it: with activations that have no
exact zeros; where normalization follows each layer, most channels fire equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from ...core.registry import method
from ...core.run import Run
from ...core.task import answer
from ...core.types import Positive
from ...errors import NothingChanged, NothingMatched
from ...mechanisms.budget import lowest
from ...mechanisms.groups import Group, Groups, Site
from ...mechanisms.groups.classes import Removal
from ._activations import by_channel, calibrating, named, uses
from ._channels import ChannelMethod


def outliers(shares: np.ndarray, deviations: float = 1.0) -> np.ndarray:
    """Which channels of a layer the paper's rule removes: above the mean plus one standard deviation.

    Args:
        shares: APoZ of the layer's channels.
        deviations: how many standard deviations above the mean.

    Returns:
        bool ``(channels,)``; never all of them.
    """
    above: np.ndarray = shares > shares.mean() + deviations * shares.std()
    return above


def after_relu(
    sites: Sequence[Site], rectified: Sequence[bool], same: Sequence[set[int]]
) -> list[int]:
    """Which of a group's sites are the output of a ReLU, each ReLU once.

    Args:
        sites: of one group, in the order of the forward pass.
        rectified: whether what was seen there never is negative and sometimes zero.
        same: for each site, the earlier ones that saw the very same numbers.

    Returns:
        Numbers of sites, ascending.
    """
    entered = {(s.module, s.call): n for n, s in enumerate(sites) if s.side == "input"}
    source = [entered.get((s.module, s.call)) if s.side == "output" else None for s in sites]
    found = [n for n, now in enumerate(rectified) if now]
    made = [n for n in found if (before := source[n]) is not None and not rectified[before]]
    return made or [
        n for n in found if source[n] is None and not any(rectified[m] for m in same[n])
    ]


class _Census:
    """Zeros, counted at all sites of one group."""

    def __init__(self, group: Group) -> None:
        self.group, sites = group, group.sites
        self.zeros = torch.zeros(len(sites), group.channels, dtype=torch.float64)
        self.silent = torch.zeros_like(self.zeros)
        self.values = [0] * len(sites)
        self.negative = [False] * len(sites)
        self.same: list[set[int]] = [set() for _ in sites]
        # The first batch tells which sites see the same numbers: held, no memory is used twice.
        self._held: list[tuple[int, Tensor]] = []

    def see(self, place: int, activation: Tensor) -> None:
        """Count one activation."""
        if not self.values[place]:
            address = activation.data_ptr()
            self.same[place] = {n for n, other in self._held if other.data_ptr() == address}
            self._held.append((place, activation))
        rows = by_channel(activation, self.group.sites[place])
        self.zeros[place] += (rows == 0).sum(dim=(0, 2)).cpu()
        self.silent[place] += (rows <= 0).sum(dim=(0, 2)).cpu()
        self.values[place] += rows.shape[0] * rows.shape[2]
        self.negative[place] |= bool((rows < 0).any())

    def end_of_batch(self) -> None:
        """Let the activations go."""
        self._held = []

    def share(self, extended: bool) -> np.ndarray | None:
        """The mean APoZ over the ReLUs that the channels pass; None if nothing can be counted.

        Args:
            extended: without a ReLU, take the share of values that are not positive.
        """
        sites, some = self.group.sites, self.zeros.any(dim=1).tolist()
        rectified = [any_zero and not n for any_zero, n in zip(some, self.negative, strict=True)]
        found, counted = after_relu(sites, rectified, self.same), self.zeros
        if not found and extended:
            read = set(map(id, uses(self.group)))
            found, counted = [n for n, site in enumerate(sites) if id(site) in read], self.silent
        shares = [counted[n] / self.values[n] for n in found if counted[n].any()]
        return torch.stack(shares).mean(0).numpy() if shares else None


@method
class Apoz(ChannelMethod):
    """Remove the channels that are zero most often after their ReLU.

    Attributes:
        deviations: for the paper's rule, which acts when neither keep nor budget is given: how many
            standard deviations above its layer's mean a channel's APoZ must lie.
        layers_at_once: the rule treats only so many layers a round, those of highest mean APoZ; by
            default all.
        samples: calibration examples.
        unrectified: what to do with channels that no ReLU makes zero: leave them whole, or count the
            values that are not positive.

    Example:
        >>> Apoz(layers=["conv2", "fc1"], rounds=4, round_to=1).deviations
        1.0
    """

    deviations: Positive = 1.0
    layers_at_once: Annotated[int, Field(ge=1)] | None = None
    samples: Annotated[int, Field(ge=1)] = 1000
    unrectified: Literal["leave", "not_positive"] = "leave"

    # The groups that were last found to have no zeros, beside the analysis that they belong to.
    _blind: tuple[Groups | None, set[int]] = PrivateAttr((None, set()))

    def _check_amount(self) -> None:
        if self.keep is not None and self.budget is not None:
            raise ValueError(
                "give keep or budget, and not both; without them the paper's rule acts"
            )

    def takes_part(self, groups: Groups) -> list[bool]:
        """Whether the settings mean each of the groups, and its activations have zeros."""
        blind = self._blind[1] if self._blind[0] is groups else set()
        meant = super().takes_part(groups)
        return [mine and number not in blind for number, mine in enumerate(meant)]

    def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
        """``1 - APoZ`` of each channel; 0 for channels that cannot be judged.

        Raises:
            NothingMatched: no channel that the settings mean can be judged, or none of a named layer.
        """
        self._blind = (None, set())
        meant = [n for n, mine in enumerate(self.takes_part(groups)) if mine]
        shares = self._shares(run, groups.groups, meant)
        blind = [n for n in meant if n not in shares]
        per_layer = self.keep if isinstance(self.keep, dict) else None
        asked = [n for n in blind if named(groups.groups[n], self.layers, per_layer)]
        if asked or not shares:
            names = ", ".join(groups.groups[n].name for n in asked or blind)
            raise NothingMatched(
                f"apoz: no activation of {names} is sometimes zero and never negative, so no channel "
                "of it can be judged by its zeros. Choose layers that a ReLU follows, set unrectified: "
                "not_positive, or use a criterion that needs no zeros, such as taylor."
            )
        self._blind = groups, set(blind)
        return [1 - shares.get(n, np.ones(g.channels)) for n, g in enumerate(groups.groups)]

    def removal(self, run: Run, groups: Groups) -> Removal:
        """The channels of highest APoZ: as many as keep or budget say, or those that the rule names."""
        if self.keep is not None or self.budget is not None:
            return super().removal(run, groups)
        scores = self.scores(run, groups)
        above = {
            number: outliers(1 - scores[number], self.deviations)
            for number, mine in enumerate(self.takes_part(groups))
            if mine
        }
        silent = sorted((n for n in above if above[n].any()), key=lambda n: float(scores[n].mean()))
        memory = self.memory(run)
        memory["named"] = memory.get("named", 0) + len(silent)
        if not memory["named"] and self.part(run) == 1:
            raise NothingChanged(
                f"apoz: no channel is zero more often than {self.deviations:g} standard deviations above "
                "its layer's mean. Lower deviations, or say with keep how many stay."
            )
        kept, allowed = [g.channels for g in groups.groups], self.allowed(run, groups)
        for number in silent[: self.layers_at_once]:
            stay = int((~above[number]).sum())
            kept[number] = int(allowed[number][allowed[number] >= stay][0])
        return lowest(scores, np.array(kept))

    def _shares(self, run: Run, groups: Sequence[Group], meant: list[int]) -> dict[int, np.ndarray]:
        """APoZ of the groups that can be judged."""
        counts = {n: _Census(groups[n]) for n in meant}
        places = [(census, n) for census in counts.values() for n in range(len(census.group.sites))]

        def see(number: int, activation: Tensor) -> None:
            census, place = places[number]
            census.see(place, activation)

        sites = [census.group.sites[place] for census, place in places]
        with torch.no_grad(), calibrating(run, sites, see):
            for batch in run.calibration(self.samples):
                answer(run.model, batch.inputs)
                for census in counts.values():
                    census.end_of_batch()
        found = {n: counts[n].share(self.unrectified == "not_positive") for n in meant}
        return {n: share for n, share in found.items() if share is not None}
