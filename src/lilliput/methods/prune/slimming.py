"""Network slimming: batch normalization's scales are pushed towards zero; channels with small ones go.

Paper: Learning Efficient Convolutional Networks through Network Slimming (Liu, Li, Shen, Huang, Yan,
Zhang; ICCV 2017; arXiv 1708.06519)

The loss gets ``lambda * sum |gamma|`` over the scales of all channels that can go, by its subgradient:
after the backward pass ``lambda * sign(gamma)`` is added to each scale's gradient. Then one threshold for
the whole network: the channels with the smallest ``|gamma|`` of all layers go, so layers keep different
fractions. They go with scale and shift, that is, as if they sent zeros. Fine-tune in a stage of its own;
repeat both for another pass.

Faithful: penalty, global threshold, what a removed channel leaves (nothing: ``fold: none``). Differs:
where several normalizations scale one channel (a residual stream, the readers of a concatenation), the
mean of their ``|gamma|`` counts and the channel goes from all of them; the paper selects channels anew in
front of each. ``at_least`` keeps a layer from collapsing, which the paper does not prevent. As options:
``initial_scale`` 0.5 for a network that starts from random weights, as the authors do; ``fold: constant``
moves what the shift of a removed channel still sends into the next layer; ``prune: start`` removes by the
scales that the network has, so that the same stage fine-tunes it.

Cost: one addition a scale and step. When not to use it: without batch normalization (refused); in a stage
too short for the penalty to separate the scales, where it ranks like ``|gamma|`` of any network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import PrivateAttr, model_validator
from torch import Tensor, nn

from ...core.registry import method
from ...core.run import Run
from ...core.types import NonNegative, Positive
from ...errors import NothingMatched
from ...mechanisms.budget import Scope
from ...mechanisms.groups import Group, Groups, Member
from ._channels import ChannelMethod
from ._norms import effective


def subgradient(scale: Tensor, strength: float) -> Tensor:
    """The penalty's part of the gradient: ``strength * sign(scale)``, zero at zero.

    Example:
        >>> subgradient(torch.tensor([2.0, 0.0, -0.5]), 0.1)
        tensor([ 0.1000,  0.0000, -0.1000])
    """
    return strength * scale.sign()


def scales(group: Group) -> list[Member]:
    """The scales of batch normalization (whatever keeps a running mean) among the members of a group."""
    tensors = {member.tensor for member in group.members}
    return [
        member
        for member in group.with_role("along")
        if member.tensor == f"{member.layer}.weight" and f"{member.layer}.running_mean" in tensors
    ]


def magnitudes(model: nn.Module, group: Group) -> np.ndarray:
    """The mean ``|gamma|`` of each channel over all that scale it, ``(channels,)``; 0 where nothing does."""
    found = [
        effective(model, m.tensor).abs().double().cpu().numpy()[m.index].mean(1)
        for m in scales(group)
    ]
    return np.mean(found, axis=0) if found else np.zeros(group.channels)


def scaled_entries(model: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Of every scale that belongs to one of the groups: which of its entries do.

    Returns:
        Name of the scale -> bool, ``(features,)``, on its device.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        for member in scales(group):
            scale = effective(model, member.tensor)
            entries = found.setdefault(member.tensor, torch.zeros_like(scale, dtype=torch.bool))
            entries[torch.from_numpy(member.index.ravel()).to(scale.device)] = True
    return found


def require_scales(model: nn.Module, by: str) -> None:
    """Refuse a network without batch normalization.

    Raises:
        NothingMatched: no batch normalization has scales.
    """
    norms = nn.modules.batchnorm._BatchNorm
    if not any(isinstance(m, norms) and m.affine for m in model.modules()):
        raise NothingMatched(
            f"{by} ranks channels by the scales of batch normalization, and {type(model).__name__} has no "
            "batch normalization with scales. Use filter_l1 or taylor, which need none."
        )


@method
class Slimming(ChannelMethod):
    """Penalize batch normalization's scales; remove the channels with the smallest ones.

    Attributes:
        penalty: lambda, the weight of ``sum |gamma|`` in the loss. The paper: 1e-4 for VGG, 1e-5 for
            ResNet and DenseNet, at a learning rate of 0.1.
        prune: remove at the end of the stage, or at its start, by the scales as they are.
        initial_scale: what all scales are set to as the stage begins; the authors start at 0.5. Only for
            a network that is not trained yet.
        scope: one threshold for all layers as in the paper, or one for each.

    Example:
        >>> Slimming(keep=0.3, penalty=1e-4).scope
        'global'
    """

    when: ClassVar[Literal["start", "end"]] = "end"
    data_free: ClassVar[bool] = True

    penalty: NonNegative = 1e-4
    prune: Literal["end", "start"] = "end"
    initial_scale: Positive | None = None
    scope: Scope = "global"

    _known: tuple[Groups, list[tuple[Tensor, Tensor]]] | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _not_erased(self) -> Slimming:
        if self.prune == "start" and self.initial_scale is not None:
            raise ValueError("initial_scale would erase the scales by which prune: start removes")
        return self

    @classmethod
    def example(cls) -> Slimming:
        """Half of the channels go, in steps of two."""
        return cls(keep=0.5, penalty=1e-2, round_to=2)

    def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
        """The size of each channel's scale."""
        return [magnitudes(run.model, group) for group in groups.groups]

    def takes_part(self, groups: Groups) -> list[bool]:
        """Whether the settings mean each of the groups, and batch normalization scales it."""
        asked = super().takes_part(groups)
        return [mine and bool(scales(g)) for mine, g in zip(asked, groups.groups, strict=True)]

    def check(self, model: nn.Module) -> None:
        """The pattern must cover a layer, and the network must have batch normalization."""
        super().check(model)
        require_scales(model, self.method_name())

    def attach(self, run: Run) -> None:
        """Set the scales, if asked; remove by them, if the start is the time."""
        super().attach(run)
        for scale, entries in self._scales(run):
            if self.initial_scale is not None:
                scale.data[entries] = self.initial_scale
        if self.prune == "start":
            self._prune(run, self.rounds)

    def after_backward(self, run: Run) -> None:
        """Add the penalty's subgradient."""
        total = torch.zeros((), device=run.device)
        for scale, entries in self._scales(run):
            if scale.grad is not None:  # it trains
                scale.grad += subgradient(scale.detach(), self.penalty) * entries
                total += (scale.detach().abs() * entries).sum()
        run.log("slimming/sum_of_scales", total)

    def settled(self, run: Run) -> bool:
        """Whether the penalty has had its time; before, a better score only means wider layers."""
        return self.prune == "start" or run.progress >= 1.0

    def _nothing(self, groups: Groups) -> NothingMatched:
        """Why the settings mean no group: the layers are there, but no scale is theirs."""
        if not any(super().takes_part(groups)):
            return super()._nothing(groups)
        return NothingMatched(
            f"slimming: no batch normalization scales the channels of {self.layers!r}. Let more layers "
            "take part, or use filter_l1 or taylor, which need no scales."
        )

    def _scales(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        """The scales under penalty, and which of their entries are."""
        groups = self.groups(run)
        if self._known is None or self._known[0] is not groups:
            mine = [g for g, m in zip(groups.groups, self.takes_part(groups), strict=True) if m]
            entries = scaled_entries(run.model, mine)
            parameters = dict(run.model.named_parameters())
            self._known = groups, [(parameters[name], e) for name, e in entries.items()]
        return self._known[1]
