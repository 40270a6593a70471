"""Soft filter pruning: after every epoch small filters become zero, and may come back in the next.

Paper: Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks (He, Kang, Dong, Fu, Yang;
IJCAI 2018; arXiv 1808.06866)

The network trains as usual. After every epoch the filters of each layer are ranked by their l2 norm, and
the lowest fraction P of each layer, the same for all, is set to zero. Nothing holds the zeros: in the
next epoch these filters get gradients like all others, and the set may be another one. After the last
epoch the zero filters are removed. ``keep`` is 1 - P.

Batch normalization makes a constant of a zero filter, so removing it is exact only if the constant stays:
it is folded into the next bias or running mean (``fold: none`` for the plain cut).

Faithful: norm, ranking after every epoch, training between without a mask. Differs: where several layers
make a channel (a residual stream), their filters are ranked by their norm together, and become zero
together, for one layer's choice could not be removed; ``shortcuts: skip`` leaves such channels whole (the
authors' ImageNet code leaves out the layers beside the shortcut). Counts are rounded to ``round_to`` as
everywhere. ``zero_first`` sets filters to zero once before the first epoch too, as the authors' code
does. A filter whose weights are shared values (``codebook``) cannot become zero while it trains; it is
ranked, and removed at the end, as it is.

Cost: one pass over the weights an epoch. When not to use it: in a stage of a few epochs, in which no
filter comes back; use ``filter_l2`` and retrain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...mechanisms.encodings import original_of
from ...mechanisms.groups import Groups, Member
from ...mechanisms.groups.classes import Removal
from ._channels import ChannelMethod
from ._norms import effective, norms


@torch.no_grad()
def zero_filters(model: nn.Module, groups: Groups, removal: Removal) -> None:
    """Set the filters that make the channels of a removal to zero, in place.

    A filter of shared values stays as it is: what is stored of it are centroids.
    """
    for number, gone in removal.items():
        for member in groups.groups[number].with_role("makes"):
            _zero(model, member, gone)


def _zero(model: nn.Module, member: Member, gone: np.ndarray) -> None:
    module = model.get_submodule(member.layer)
    stored = original_of(Weight(member.layer, module, member.tensor.rpartition(".")[2])).detach()
    if stored.shape == effective(model, member.tensor).shape:
        index = torch.from_numpy(member.index[gone].ravel()).to(stored.device)
        stored.index_fill_(member.dim, index, 0.0)


@method
class SoftFilter(ChannelMethod):
    """Set the smallest filters to zero after every epoch and let them train on; remove them at the end.

    Attributes:
        keep: 1 - P; the authors' code calls it the rate.
        shortcuts: rank the layers of a residual stream together, or leave the stream whole.
        zero_first: set filters to zero before the first epoch too.
        fold: add what removed channels always send to the bias or running mean behind them.

    Example:
        >>> SoftFilter(keep=0.7).fold
        'constant'
    """

    when: ClassVar[Literal["start", "end"]] = "end"

    shortcuts: Literal["together", "skip"] = "together"
    zero_first: bool = False
    fold: Literal["none", "constant"] = "constant"

    def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
        """The l2 norm of the weights that make each channel."""
        return [norms(run.model, group, 2) for group in groups.groups]

    def takes_part(self, groups: Groups) -> list[bool]:
        """Whether the settings mean each of the groups."""
        alone = [self.shortcuts == "together" or len(g.layers) == 1 for g in groups.groups]
        asked = super().takes_part(groups)
        return [mine and single for mine, single in zip(asked, alone, strict=True)]

    def part(self, run: Run) -> float:
        """The final amount from the first epoch on."""
        return 1.0

    def attach(self, run: Run) -> None:
        """Set the first filters to zero, if asked."""
        super().attach(run)
        if self.zero_first:
            self.after_epoch(run)

    def after_epoch(self, run: Run) -> None:
        """Set the smallest filters to zero; a filter that has come back since may stay."""
        groups = self.groups(run)
        zero_filters(run.model, groups, self.removal(run, groups))
