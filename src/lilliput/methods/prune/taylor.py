"""Taylor pruning: the channel goes whose removal changes the loss least, to first order.

Paper: Pruning Convolutional Neural Networks for Resource Efficient Inference (Molchanov, Tyree, Karras,
Aila, Kautz; ICLR 2017; arXiv 1611.06440)

To first order the loss C changes by ``z * dC/dz`` when an activation z becomes zero. For each example, the
criterion of a channel is ``|(1 / M) * sum over its M positions of z * dC/dz|``, with z after the
nonlinearity; it is averaged over the examples, and divided by the l2 norm of its layer's criteria.
``flops_weight`` (the paper's lambda, 1e-3 there) takes ``lambda * FLOPs`` off. The lowest channel of the
whole network is removed, the network trains on for some updates, and so on; the criteria come from the
gradients of those very updates.

That greedy form is ``channels=1, every=30``; ``rounds`` removes in a few steps instead, the same fraction
each. One-shot use, and the first of several rounds, take the gradients of ``samples`` calibration examples,
in eval mode; no parameter's ``.grad`` is touched. The paper's first version was called "... for Resource
Efficient Transfer Learning": fine-tune on the new task, prune, fine-tune, as in the recipe
``taylor_resnet20``.

``criterion`` also offers the paper's baselines (mean activation, its standard deviation, mean squared weight,
random) and ``weight_gradient``: ``|sum of w * dC/dw|`` over the weights that make a channel, the form that is
understood here under "Pruning Convolutional Filters with First Order Taylor Series Ranking" (2018; its
text was not found, author and venue are unverified).

Faithful: criterion, normalization, global ranking, greedy removal, gradients of training. Differs: a channel
counts at the inputs of the layers that use it, so one with several users (a residual stream, a concatenation)
gets the sum of its effects; behind a single user it is the paper's, for dropout and pooling leave the sum
of ``z * dC/dz`` as it is. FLOPs are what the network really saves by one channel less, in millions, two a
multiply-add (the paper does not give its unit). ``batch_mean`` is the deviation of a popular repository,
which averages over the batch before it takes the magnitude: examples that disagree then cancel.

The surprising rule: the loss must be a mean over the batch, as tasks have it; each example's own gradient is
the batch's times the number of examples. Channels that no plain module reads (inside fused attention)
have no activation to watch: they stay whole, unless the criterion looks at weights.

Cost: while training about a tenth of a step, and an analysis of the network for each removal; one forward
and backward pass over the samples otherwise. When not to use it: without labels (use apoz or filter_l1);
with a loss at its minimum for every example, where all gradients vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.registry import method
from ...core.run import Run
from ...core.task import answer, batch_size
from ...core.types import Batch, Change, NonNegative
from ...errors import InputError, NothingMatched
from ...measure import macs, size
from ...mechanisms.budget import Normalize, Scope, lowest
from ...mechanisms.groups import Group, Groups, Site
from ...mechanisms.groups.classes import Removal
from ._activations import Watch, by_channel, by_example, calibrating, named, own_use, uses
from ._channels import ChannelMethod
from ._costs import Costs
from ._norms import filters, rows

Criterion: TypeAlias = Literal["taylor", "weight_gradient", "weight", "mean", "std", "random"]
#: Those that are read off activations.
_WATCHING = ("taylor", "mean", "std")


def effects(activation: Tensor, gradient: Tensor) -> Tensor:
    """What removing each channel does to each example's loss, to first order: the mean over positions.

    Args:
        activation: ``(examples, channels, positions)``.
        gradient: of each example's own loss, same shape.

    Returns:
        Signed, shape ``(examples, channels)``.
    """
    return (activation.float() * gradient.float()).mean(dim=2)


def over_examples(each: Tensor, *, batch_mean: bool = False) -> Tensor:
    """The paper's criterion times the number of examples: the sum of the magnitudes of their effects.

    Args:
        each: of :func:`effects`.
        batch_mean: let the examples' effects cancel (not the paper's).

    Returns:
        Shape ``(channels,)``; with ``batch_mean`` signed, so that batches can be added up.

    Example:
        >>> opposed = effects(torch.ones(2, 1, 1), torch.tensor([1.0, -1.0]).view(2, 1, 1))
        >>> over_examples(opposed), over_examples(opposed, batch_mean=True)
        (tensor([2.]), tensor([0.]))
    """
    return each.sum(dim=0) if batch_mean else each.abs().sum(dim=0)


def weight_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|sum of w * dC/dw|`` of each filter, what scaling it down does to the loss.

    Args:
        weight: ``(channels, numbers)``.
        gradient: same shape.

    Returns:
        Shape ``(channels,)``.

    Example:
        >>> weight_gradient(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]]))
        tensor([1.])
    """
    return (weight * gradient).sum(dim=1).abs()


def saved_flops(costs: Costs) -> np.ndarray:
    """What one channel less of each group saves, in millions of FLOPs an example, ``(groups,)``."""
    whole = costs.macs(costs.channels)
    fewer = costs.channels - np.eye(len(costs.channels), dtype=np.int64)
    return np.array([2e-6 * (whole - costs.macs(kept)) for kept in fewer])


def lowest_of(scores: Sequence[np.ndarray | None], candidates: Removal, count: int) -> Removal:
    """Of the channels that are to go, the few with the lowest scores, over all groups.

    Example:
        >>> scores = [np.array([3.0, 1.0]), np.array([2.0, 0.5])]
        >>> lowest_of(scores, {0: np.array([1]), 1: np.array([0, 1])}, 2)
        {0: array([1]), 1: array([1])}
    """
    ranked = sorted(
        (float(scores[group][channel]), group, int(channel))  # type: ignore[index]
        for group, channels in candidates.items()
        for channel in channels
    )
    gone: dict[int, list[int]] = {}
    for _, group, channel in ranked[:count]:
        gone.setdefault(group, []).append(channel)
    return {group: np.sort(channels) for group, channels in sorted(gone.items())}


class Sums:
    """What a criterion adds up over examples, while batches run forward and backward.

    Args:
        method: whose criterion.
        model: that runs.
        groups: of the model.
        meant: the numbers of the groups that are scored.
        memory: where the sums are kept: empty, or as an earlier object has left it.
    """

    def __init__(
        self,
        method: Taylor,
        model: nn.Module,
        groups: Groups,
        meant: Sequence[int],
        memory: dict[str, Any],
    ) -> None:
        self.method, self.model, self.groups = method, model, groups.groups
        self.meant, self.memory = meant, memory
        self._places = _places(self.groups, meant) if method.criterion in _WATCHING else []
        self.sites = [site for _, site, _ in self._places]
        self._examples = 0
        self._uses: list[Tensor] = []
        self._positions: dict[int, int] = {}
        self._effects: dict[int, Tensor] = {}
        if not memory:
            zeros = [torch.zeros(g.channels, dtype=torch.float64) for g in self.groups]
            memory.update(first=zeros, second=[z.clone() for z in zeros], count=[0] * len(zeros))

    def begin(self, batch: Batch) -> None:
        """A batch is about to run."""
        self._examples = batch_size(batch)
        self._uses, self._positions, self._effects = [], {}, {}

    def see(self, place: int, activation: Tensor) -> Tensor | None:
        """An activation passes a site; without gradients it is not the pass that trains."""
        number, site, used = self._places[place]
        if not torch.is_grad_enabled():
            return None
        if self.method.criterion != "taylor":
            if used:
                self._add_moments(number, by_channel(activation.detach(), site))
            return None
        repeats = site.index.shape[1] / activation.shape[site.dim]
        positions = round(activation.numel() * repeats / self._examples)
        self._positions[number] = max(self._positions.get(number, 1), positions)
        return self._watched(number, site, activation) if used else None

    def differentiate(self, loss: Tensor) -> dict[str, Tensor]:
        """Run backward without touching any ``.grad``.

        Returns:
            The gradients of the weights by name, where the criterion looks at weights.
        """
        if self.method.criterion == "taylor":
            torch.autograd.grad(loss, self._uses, allow_unused=True)
        if self.method.criterion != "weight_gradient":
            return {}
        weights = self.weights()
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return {n: g for n, g in zip(weights, found, strict=True) if g is not None}

    def close(self, gradients: dict[str, Tensor]) -> None:
        """The batch has run backward.

        Args:
            gradients: of the weights by name, where the criterion looks at weights.
        """
        for number in self.meant if self.method.criterion == "weight_gradient" else ():
            found = weight_gradient(*self._filters(number, gradients))
            self._add(number, self._examples, found * self._examples)
        for number, effect in self._effects.items():
            each = effect * (self._examples / self._positions[number])
            # Where a scaled 16-bit loss overflows, the optimizer skips the step; so does the criterion.
            each = torch.nan_to_num(each, nan=0.0, posinf=0.0, neginf=0.0)
            summed = over_examples(each, batch_mean=self.method.batch_mean)
            self._add(number, self._examples, summed)
        self._uses, self._effects = [], {}

    def result(self, number: int) -> np.ndarray:
        """The criterion of each channel of a group.

        Raises:
            InputError: nothing has been seen of the group.
        """
        first, second, count = (self.memory[name][number] for name in ("first", "second", "count"))
        if not count:
            raise InputError(
                f"taylor: no gradient came through the channels of {self.groups[number].name}: the loss does "
                "not depend on them, or they are bypassed. Leave the layer out with layers: "
                f"'!{self.groups[number].name}'."
            )
        found = first / count
        if self.method.criterion == "std":
            found = (second / count - found.square()).clamp(min=0).sqrt()
        elif self.method.criterion != "mean":
            found = found.abs()
        return np.asarray(found.numpy())

    def weights(self) -> dict[str, Tensor]:
        """What trains of the weights that make the channels, by name."""
        makers = [m for n in self.meant for m in self.groups[n].with_role("makes")]
        return {m.tensor: _trained(self.model, m.tensor) for m in makers}

    def _watched(self, number: int, site: Site, activation: Tensor) -> Tensor:
        """One use of an activation, whose effect is taken in as soon as its gradient is there."""
        value, examples = activation.detach(), self._examples

        def add(gradient: Tensor) -> None:
            own = by_example(value, site, examples)
            effect = effects(own, by_example(gradient, site, examples)) * own.shape[2]
            known = self._effects.get(number)
            # Removing a channel takes it from all its users: the sum comes before the magnitude.
            self._effects[number] = effect if known is None else known + effect

        use = own_use(activation)
        use.register_hook(add)
        self._uses.append(use)
        return use

    def _filters(self, number: int, gradients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """All numbers that make the channels, ``(channels, numbers)``, and their gradients."""
        makers = self.groups[number].with_role("makes")
        missing = [m.tensor for m in makers if m.tensor not in gradients]
        if missing:
            raise InputError(
                f"taylor: {missing[0]} has no gradient: it is frozen, or the loss does not depend on "
                "it. Let it train, leave its layer out, or use criterion: taylor."
            )
        values = {m.tensor: _trained(self.model, m.tensor).detach() for m in makers}
        return (
            torch.cat([rows(values[m.tensor], m) for m in makers], dim=1),
            torch.cat([rows(gradients[m.tensor], m) for m in makers], dim=1),
        )

    def _add(self, number: int, count: int, first: Tensor, second: Tensor | None = None) -> None:
        self.memory["count"][number] += count
        self.memory["first"][number] += first.double().cpu()
        if second is not None:
            self.memory["second"][number] += second.cpu()

    def _add_moments(self, number: int, values: Tensor) -> None:
        wide = values.double()
        sums, squares = wide.sum(dim=(0, 2)), wide.square().sum(dim=(0, 2))
        self._add(number, values.shape[0] * values.shape[2], sums, squares)


@method
class Taylor(ChannelMethod):
    """Remove the channels whose removal changes the loss least, to first order.

    Attributes:
        criterion: the paper's, its form on weights, or one of the paper's baselines: mean squared
            weight, mean activation, standard deviation of the activation, random.
        batch_mean: average the effects over the examples before taking the magnitude (not the paper's).
        flops_weight: lambda, what a million FLOPs saved counts against the criterion.
        channels: remove so few at a time, over all layers together; needs ``every``.
        every: steps of training between two such removals. What is still above the target when the
            stage ends goes at once.
        samples: calibration examples, where there are no gradients of training yet.

    Example:
        >>> Taylor(budget={"macs": 0.5}, channels=1, every=30, round_to=1).normalize
        'l2'
    """

    scope: Scope = "global"
    normalize: Normalize = "l2"
    criterion: Criterion = "taylor"
    batch_mean: bool = False
    flops_weight: NonNegative = 0.0
    channels: Annotated[int, Field(ge=1)] | None = None
    every: Annotated[int, Field(ge=1)] | None = None
    samples: Annotated[int, Field(ge=1)] = 1000

    _watch: Watch | None = PrivateAttr(None)
    _sums: Sums | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _one_pace(self) -> Taylor:
        if (self.channels is None) != (self.every is None):
            raise ValueError(
                "channels and every belong together: so many channels every so many steps"
            )
        if self.every is not None and (self.rounds != 1 or self.round_to != 1):
            raise ValueError(
                "channels and every set a pace of their own: leave rounds out, and set round_to: 1, "
                "for widths on the way are no multiples"
            )
        return self

    @classmethod
    def example(cls) -> Taylor:
        """Half of the channels go, in two rounds: one by calibration, one by gradients of training."""
        return cls(keep=0.5, round_to=2, rounds=2)

    # -- the criterion ------------------------------------------------------------------------------

    def takes_part(self, groups: Groups) -> list[bool]:
        """Whether the settings mean each of the groups, and its activations can be watched if need be."""
        meant = super().takes_part(groups)
        return [m and self._watchable(g) for m, g in zip(meant, groups.groups, strict=True)]

    def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
        """The criterion, not normalized; of channels that take no part, 0."""
        meant = [n for n, mine in enumerate(self.takes_part(groups)) if mine]
        if self.criterion == "weight":
            found = {n: _mean_square(run.model, groups.groups[n]) for n in meant}
        elif self.criterion == "random":
            generator = run.generator("taylor")
            drawn = [torch.rand(g.channels, generator=generator).numpy() for g in groups.groups]
            found = dict(enumerate(drawn))
        else:
            sums = self._collected(run, groups, meant)
            found = {n: sums.result(n) for n in meant}
        return [found.get(n, np.zeros(g.channels)) for n, g in enumerate(groups.groups)]

    def removal(self, run: Run, groups: Groups) -> Removal:
        """The lowest channels, less what their FLOPs count; only a few of them where every is set."""
        memory = self.memory(run)
        scores = self._comparable(groups, self.scores(run, groups))
        memory["sums"] = {}  # the next removal sees the gradients from here on
        if self.flops_weight:
            costs = Costs(groups.groups, size(run.model), macs(run.model, self.inputs(run)))
            saved = self.flops_weight * saved_flops(costs)
            scores = [None if s is None else s - f for s, f in zip(scores, saved, strict=True)]
        gone = lowest(scores, self.counts(run, groups, scores))
        if self.channels is None or memory["rest"]:
            return gone
        memory["reached"] = not gone
        return lowest_of(scores, gone, self.channels)

    # -- hooks ------------------------------------------------------------------------------------

    def attach(self, run: Run) -> None:
        """Remove for the first time, unless that waits for gradients of training."""
        self.memory(run).update(sums={}, reached=False, rest=False)
        if any(named(group, self.layers) for group in self._blind(self.groups(run))):
            raise self._nothing(self.groups(run))
        super().attach(run)

    def before_step(self, run: Run) -> None:
        """Remove when it is time; then watch this step, if more is to be removed."""
        super().before_step(run)
        self._stop_watching()
        watching = self.criterion in (*_WATCHING, "weight_gradient")
        if watching and not self.settled(run):
            groups = self.groups(run)
            meant = [n for n, mine in enumerate(self.takes_part(groups)) if mine]
            self._sums = Sums(self, run.model, groups, meant, self.memory(run)["sums"])
            self._sums.begin(run.batch)
            self._watch = Watch(run.model, self._sums.sites, self._sums.see)

    def after_backward(self, run: Run) -> None:
        """Take in the gradients of the step."""
        if self._sums is not None:
            weights = self._sums.weights() if self.criterion == "weight_gradient" else {}
            self._sums.close({n: w.grad for n, w in weights.items() if w.grad is not None})
        self._stop_watching()

    def settled(self, run: Run) -> bool:
        """Whether no removal is to come."""
        return bool(self.memory(run)["reached"]) if self.every else super().settled(run)

    def finish(self, run: Run) -> list[Change]:
        """Remove what is still above the target; report the widths."""
        self._stop_watching()
        if self.every is not None and run.total_steps and not self.settled(run):
            self.memory(run)["rest"] = True
            self._prune(run, self.rounds)
        return super().finish(run)

    @property
    def once(self) -> bool:
        """Whether a stage removes channels only once."""
        return self.every is None and super().once

    def part(self, run: Run) -> float:
        """How much of the final amount is due: all of it, where a few channels go at a time."""
        return 1.0 if self.every else super().part(run)

    def _prune_if_due(self, run: Run) -> None:
        if self.every is None:
            super()._prune_if_due(run)
        elif not run.total_steps or (
            run.step and run.step % self.every == 0 and not self.settled(run)
        ):
            self.memory(run)["rest"] = not run.total_steps
            self._refuse_unknown_optimizer(run)
            self._prune(run, self.rounds)

    # -- how ----------------------------------------------------------------------------------------

    def _watchable(self, group: Group) -> bool:
        return self.criterion not in _WATCHING or bool(uses(group))

    def _blind(self, groups: Groups) -> list[Group]:
        """The groups that the settings mean and that cannot be watched."""
        meant = super().takes_part(groups)
        found = zip(groups.groups, meant, strict=True)
        return [group for group, mine in found if mine and not self._watchable(group)]

    def _nothing(self, groups: Groups) -> NothingMatched:
        blind = ", ".join(group.name for group in self._blind(groups))
        if not blind:
            return super()._nothing(groups)
        return NothingMatched(
            f"taylor: the channels of {blind} are read where no activation can be watched (inside of fused "
            "attention, or by a bare parameter). Choose other layers, or criterion: weight_gradient."
        )

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = self._sums = None

    def _collected(self, run: Run, groups: Groups, meant: Sequence[int]) -> Sums:
        """What training has added up since the last removal, or else calibration."""
        memory = self.memory(run).get("sums") or {}
        sums = Sums(self, run.model, groups, meant, memory)
        if any(memory["count"]):
            return sums
        weights = sums.weights().values() if self.criterion == "weight_gradient" else ()
        with torch.enable_grad(), _trainable(weights), calibrating(run, sums.sites, sums.see):
            for batch in run.calibration(self.samples):
                sums.begin(batch)
                loss = run.task.loss(answer(run.model, batch.inputs), batch.target)
                sums.close(sums.differentiate(loss))
        return sums


def _places(groups: Sequence[Group], meant: Sequence[int]) -> list[tuple[int, Site, bool]]:
    """Group number, site, and whether it is a use or only tells how large the map is as it is made."""
    return [
        place
        for number in meant
        for place in [
            (number, groups[number].sites[0], False),
            *((number, site, True) for site in uses(groups[number])),
        ]
    ]


def _mean_square(model: nn.Module, group: Group) -> np.ndarray:
    """The baseline of small weights: the mean of the squares of the numbers that make each channel."""
    joined = torch.cat(filters(model, group), dim=1)
    return np.asarray(joined.square().mean(dim=1).double().cpu().numpy())


def _trained(model: nn.Module, tensor: str) -> Tensor:
    """The parameter behind a weight, which has the weight's gradient."""
    layer, _, name = tensor.rpartition(".")
    module: Any = model.get_submodule(layer)
    if not parametrize.is_parametrized(module, name):
        return getattr(module, name)  # type: ignore[no-any-return]
    original: Tensor | None = getattr(module.parametrizations[name], "original", None)
    if original is None or original.shape != getattr(module, name).shape:
        raise InputError(
            f"taylor: what trains behind {tensor} is no weight but shared values or factors, so a weight "
            "has no gradient of its own. Use criterion: taylor, or prune before encoding."
        )
    return original


@contextmanager
def _trainable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let gradients be asked of frozen tensors too."""
    frozen = [t for t in tensors if not t.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
