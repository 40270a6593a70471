"""Sparse scales by proximal steps: batch normalization's scales become exactly zero, and their channels go.

Paper: Rethinking the Smaller-Norm-Less-Informative Assumption in Channel Pruning of Convolution Layers
(Ye, Lu, Lin, Wang; ICLR 2018; arXiv 1802.00124)

A norm says nothing about a filter in front of batch normalization, which undoes any scaling. So the
scales gamma themselves are made sparse, by ISTA: after a gradient step of plain SGD with learning rate
mu, layer l's scales go through ``soft(gamma, mu * rho * cost_l)``, which moves them towards zero by that
much and stops there. A channel whose scale is exactly zero sends a constant; it is removed and the
constant folded into the next bias or running mean. How many channels go follows from rho; ``keep`` and
``budget`` are not for this method.

``cost_l`` is the memory that one channel of layer l takes, in units of the input's pixels: ``(k**2 *
c_before + sum of k_next**2 * c_next + height * width of its map) / pixels``. ``cost: speed`` is the
authors' code's variant, ``height * width of the layer's input * k**2 * c_before / pixels**2``;
``uniform`` is 1 for all. For a flat input its features count as pixels.

``rescale`` is the gamma-W rescaling: before, gamma and beta are multiplied by alpha and the next layer's
weights divided by it; after the removal the other way round. The function stays the same where everything
between is positively homogeneous (ReLU, pooling, dropout), which is tried on data, group by group;
elsewhere it is left out. A small alpha brings scales to zero sooner and makes their gradients larger:
with alpha 0.1 the way is ten times shorter and each step ten times longer.

Faithful: cost, proximal step, exact zeros, rescaling, folding, no weight decay on the scales. Scales that
feed a residual addition are not penalized, as in the authors' code: a group takes part if one layer makes
its channels. Where several normalizations scale one channel (the readers of a concatenation), all must be
zero before it goes. Differs: the scales are moved here and not by the stage's optimizer, so its momentum,
decay, adaptive rates and gradient clipping do not apply to them; everything else trains as the stage says
(the paper uses plain SGD). With an adaptive optimizer, whose learning rates are small, set ``lr``.
``round_to`` may keep some channels whose scale is zero, which costs nothing in accuracy; set it to 1 for
the paper's exact removal.

``patience``: when for so many epochs no scale has become zero, the channels go, and the rest of the stage
fine-tunes what is left without the penalty. Without it they go at the end. Be patient: in a trained
network some scales are next to zero at once, and the others follow much later.

Cost: nothing measurable. When not to use it: without batch normalization (refused); for a given size,
since rho must be searched for it: take ``slimming``, which removes to a ratio.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.task import call, evaluation
from ...core.types import Keep, Positive
from ...errors import InputError, NothingChanged, NothingMatched
from ...mechanisms.budget import lowest
from ...mechanisms.encodings import original_of
from ...mechanisms.groups import Group, Groups, Member
from ...mechanisms.groups.classes import Removal, Role
from ._channels import ChannelMethod
from ._norms import effective, rows
from .slimming import magnitudes, require_scales, scales

Cost: TypeAlias = Literal["memory", "speed", "uniform"]

# Two outputs that differ by less, relative to the largest, are the same but for rounding.
_SAME = 1e-4


def soft_threshold(value: Tensor, threshold: Tensor) -> Tensor:
    """``sign(value) * max(|value| - threshold, 0)``: the proximal step of ``threshold * |value|``.

    Example:
        >>> soft_threshold(torch.tensor([3.0, -0.5, -2.0]), torch.tensor(1.0))
        tensor([ 2.,  0., -1.])
    """
    return value - torch.minimum(torch.maximum(value, -threshold), threshold)


def memory_cost(made: int, used: int, positions: int, pixels: int) -> float:
    """What a channel takes: weights that make it, weights that use it, its map; in input pixels.

    Example:
        >>> memory_cost(made=3 * 3 * 16, used=3 * 3 * 32, positions=16 * 16, pixels=32 * 32)
        0.671875
    """
    return (made + used + positions) / pixels


def speed_cost(work: int, pixels: int) -> float:
    """The authors' code's variant: positions of the layer's input times weights, over pixels squared."""
    return work / pixels**2


def costs(
    model: nn.Module, groups: Groups, taking: list[bool], inputs: Any, kind: Cost
) -> dict[str, Tensor]:
    """The cost of each entry of the scales, 0 of those that are not penalized.

    Args:
        model: runs once, in eval mode.
        groups: of the model.
        taking: which of them take part.
        inputs: an example.
        kind: which cost.

    Returns:
        Name of the scale -> float, ``(features,)``, on its device.
    """
    mine = [group for group, takes in zip(groups.groups, taking, strict=True) if takes]
    read = positions_read(model, {m.layer for group in mine for m in group.members}, inputs)
    found: dict[str, Tensor] = {}
    for group in mine:
        for member in scales(group):
            scale = effective(model, member.tensor)
            entries = found.setdefault(member.tensor, torch.zeros_like(scale))
            index = torch.from_numpy(member.index.ravel()).to(scale.device)
            entries[index] = _cost(model, group, read, pixels_of(inputs), kind)
    return found


@torch.no_grad()
def positions_read(model: nn.Module, layers: set[str], inputs: Any) -> dict[str, int]:
    """Over how many positions the input of each layer extends: pixels of a map, tokens of a sequence."""
    seen: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            channels = args[0].shape[-1] if isinstance(module, nn.Linear) else args[0].shape[1]
            seen[name] = args[0][0].numel() // channels

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in sorted(layers)]
    try:
        with evaluation(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def pixels_of(inputs: Any) -> int:
    """Over how many positions an example extends; the features of a flat one count as such."""
    first = next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
    return int(first[0, 0].numel() if first.ndim > 2 else first[0].numel())


@torch.no_grad()
def rescale_channels(model: nn.Module, group: Group, factor: float) -> None:
    """Multiply scales and shifts of a group's channels, and divide the weights that use them, in place."""
    for member in scales(group):
        index = torch.from_numpy(member.index.ravel())
        for tensor in _scale_and_shift(model, member):
            tensor[index.to(tensor.device)] *= factor
    for member in group.with_role("uses"):
        weight = _stored(model, member)
        index = torch.from_numpy(member.index.ravel()).to(weight.device)
        weight.movedim(member.dim, 0)[index] /= factor


@torch.no_grad()
def rescale_if_invariant(model: nn.Module, group: Group, factor: float, inputs: Any) -> bool:
    """Rescale a group if the network computes the same afterwards; else leave it bit for bit as it was.

    Args:
        model: tried in eval mode.
        group: whose channels.
        factor: alpha.
        inputs: a batch to try it on.

    Returns:
        Whether it was done.
    """
    users = [_stored(model, member) for member in group.with_role("uses")]
    if any(
        user.shape != effective(model, m.tensor).shape
        for user, m in zip(users, group.with_role("uses"), strict=True)
    ):
        return False
    tensors = [t for member in scales(group) for t in _scale_and_shift(model, member)] + users
    kept, before = [t.clone() for t in tensors], _outputs(model, inputs)
    rescale_channels(model, group, factor)
    if _close(_outputs(model, inputs), before):
        return True
    for tensor, old in zip(tensors, kept, strict=True):
        tensor.copy_(old)
    return False


def _cost(model: nn.Module, group: Group, read: dict[str, int], pixels: int, kind: Cost) -> float:
    def numbers(role: Role) -> list[tuple[int, int]]:
        """For each weight: positions that its layer reads, numbers of one channel in it."""
        members = group.with_role(role)
        return [
            (read.get(m.layer, 1), rows(effective(model, m.tensor), m).shape[1]) for m in members
        ]

    made, used = numbers("makes"), numbers("uses")
    if kind == "memory":
        positions = max(read.get(member.layer, 1) for member in scales(group))
        return memory_cost(sum(n for _, n in made), sum(n for _, n in used), positions, pixels)
    return speed_cost(sum(p * n for p, n in made), pixels) if kind == "speed" else 1.0


def _scale_and_shift(model: nn.Module, scale: Member) -> list[Tensor]:
    module: Any = model.get_submodule(scale.layer)
    return [t.detach() for t in (module.weight, module.bias) if t is not None]


def _stored(model: nn.Module, member: Member) -> Tensor:
    """What is stored of a weight: under a mask the weight itself, under a codebook its centroids."""
    module = model.get_submodule(member.layer)
    return original_of(Weight(member.layer, module, member.tensor.rpartition(".")[2])).detach()


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluation(model):
        return [t for t in pytree.tree_leaves(call(model, inputs)) if isinstance(t, Tensor)]


def _close(after: list[Tensor], before: list[Tensor]) -> bool:
    pairs = zip(after, before, strict=True)
    return all(bool((a - b).abs().max() <= _SAME * b.abs().max()) for a, b in pairs)


@method
class BnIsta(ChannelMethod):
    """Make batch normalization's scales exactly zero by proximal steps; remove their channels.

    Attributes:
        penalty: rho; a scale loses ``learning rate * rho * cost`` a step. The authors: 0.001, then 0.005,
            at a learning rate of 0.1, for ResNet-20.
        cost: what a channel's penalty is proportional to; see the module's docstring.
        rescale: alpha of the rescaling, at most 1; 1 for none. The paper tries 1, 0.1, 0.01 and 0.001.
        lr: learning rate of the scales; None for the stage's.
        patience: epochs without a new zero after which the channels go and the penalty ends; None to
            wait for the end of the stage.
        fold: add what removed channels always send to the bias or running mean behind them.

    Example:
        >>> BnIsta(penalty=0.005, rescale=0.1).cost
        'memory'
    """

    when: ClassVar[Literal["start", "end"]] = "end"

    penalty: Positive = 1e-3
    cost: Cost = "memory"
    rescale: Keep = 1.0
    lr: Positive | None = None
    patience: int | None = Field(default=None, ge=1)
    fold: Literal["none", "constant"] = "constant"

    _known: tuple[Groups, list[tuple[Tensor, Tensor]]] | None = PrivateAttr(None)

    def _check_amount(self) -> None:
        if (self.keep, self.budget, self.scope, self.normalize) != (None, None, "layer", "none"):
            raise ValueError(
                "penalty says what goes: keep, budget, scope, normalize do nothing here"
            )

    @classmethod
    def example(cls) -> BnIsta:
        """A penalty that finds zeros within a few steps."""
        return cls(penalty=0.1, lr=1.0, round_to=1)

    def takes_part(self, groups: Groups) -> list[bool]:
        """Whether the settings mean each of the groups, one layer makes it and scales belong to it."""
        asked = super().takes_part(groups)
        return [
            mine and len(group.layers) == 1 and bool(scales(group))
            for mine, group in zip(asked, groups.groups, strict=True)
        ]

    def removal(self, run: Run, groups: Groups) -> Removal:
        """Channels whose scales are all exactly zero, as many as the rounding of widths allows.

        Raises:
            NothingChanged: there is none.
        """
        sizes = [magnitudes(run.model, group) for group in groups.groups]
        kept = [
            allowed[np.searchsorted(allowed, np.count_nonzero(size))] if mine else allowed[-1]
            for allowed, size, mine in zip(
                self.allowed(run, groups), sizes, self.takes_part(groups), strict=True
            )
        ]
        if not self._zeros(run):
            raise NothingChanged(
                f"bn_ista: no scale has become zero in {run.step} steps. Raise penalty, lower rescale, "
                "raise the learning rate (lr is that of the scales alone), or train longer."
            )
        return lowest(sizes, np.array(kept))

    def check(self, model: nn.Module) -> None:
        """The pattern must cover a layer, and the network must have batch normalization."""
        super().check(model)
        require_scales(model, self.method_name())

    def attach(self, run: Run) -> None:
        """Compute the costs, and rescale where that leaves the function as it is."""
        if self.patience is not None and torch.distributed.is_initialized():
            raise InputError(
                "bn_ista with patience changes shapes while several processes train together, which "
                "torch's DistributedDataParallel cannot follow. Leave patience out, and fine-tune in a "
                "stage of its own."
            )
        super().attach(run)
        self.memory(run).update(zeros=0, waited=0, rescaled=self._rescale(run))

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        """Move the scales: a gradient step, then the proximal step. The optimizer finds no gradient."""
        if self._pruned(run):
            return
        rate = self._rate(run)
        for scale, cost in self._penalized(run):
            if scale.grad is not None:  # it trains
                gradient = scale.grad.nan_to_num(0.0, 0.0, 0.0)  # float16 may overflow now and then
                moved = soft_threshold(scale - rate * gradient, rate * self.penalty * cost)
                scale.copy_(moved)
                scale.grad = None
        run.log("bn_ista/zeros", self._zeros(run))

    def after_epoch(self, run: Run) -> None:
        """Remove, if the zeros have stopped to become more."""
        if self.patience is None or self._pruned(run):
            return
        memory, zeros = self.memory(run), int(self._zeros(run))
        memory["waited"] = memory["waited"] + 1 if 0 < zeros <= memory["zeros"] else 0
        memory["zeros"] = max(zeros, memory["zeros"])
        if memory["waited"] >= self.patience and self.removal(run, self.groups(run)):
            self._prune(run, self.rounds)

    def settled(self, run: Run) -> bool:
        """Whether the channels are gone, or go now; before, a better score only means wider layers."""
        return self._pruned(run) or run.progress >= 1.0

    def _prune(self, run: Run, number: int) -> None:
        """Remove, and undo the rescaling of what is left."""
        super()._prune(run, number)
        rescaled = self.memory(run)["rescaled"]
        for group in self.groups(run).groups:
            if any(scale.tensor in rescaled for scale in scales(group)):
                rescale_channels(run.model, group, 1 / self.rescale)

    def _pruned(self, run: Run) -> bool:
        return bool(self.memory(run)["round"] == self.rounds)

    def _penalized(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        """The scales and the cost of each of their entries, for the network as it is now."""
        groups = self.groups(run)
        if self._known is None or self._known[0] is not groups:
            taking, parameters = self.takes_part(groups), dict(run.model.named_parameters())
            found = costs(run.model, groups, taking, self.inputs(run), self.cost)
            self._known = groups, [(parameters[name], cost) for name, cost in found.items()]
        return self._known[1]

    def _zeros(self, run: Run) -> Tensor:
        """How many penalized entries are zero."""
        found = [((scale == 0) & (cost > 0)).sum() for scale, cost in self._penalized(run)]
        return torch.stack(found).sum()

    def _rate(self, run: Run) -> float:
        if self.lr is not None:
            return self.lr
        return run.learning_rate(
            "bn_ista moves the scales itself and must know how far: set lr, or"
        )

    def _rescale(self, run: Run) -> list[str]:
        """Rescale every group that has a scale of its own and allows it; returns those scales' names."""
        if self.rescale == 1.0:
            return []
        groups = self.groups(run)
        mine = [g for g, takes in zip(groups.groups, self.takes_part(groups), strict=True) if takes]
        owners = Counter(scale.tensor for group in mine for scale in scales(group))
        inputs = next(run.calibration(1)).inputs
        return [
            scales(group)[0].tensor
            for group in mine
            if [owners[scale.tensor] for scale in scales(group)] == [1]
            and rescale_if_invariant(run.model, group, self.rescale, inputs)
        ]

    def _nothing(self, groups: Groups) -> NothingMatched:
        """Why the settings mean no group: the layers are there, but no scale is theirs alone."""
        if not any(super().takes_part(groups)):
            return super()._nothing(groups)
        return NothingMatched(
            f"bn_ista: batch normalization scales no channel of {self.layers!r} that one layer alone "
            "makes; channels of a residual stream are left out. Let more layers take part."
        )
