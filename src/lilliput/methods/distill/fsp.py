"""FSP: the student learns how its teacher's features flow from one layer to another.

Paper: A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning
(Yim, Joo, Bae, Kim; CVPR 2017)

The flow of the solution procedure between two layers with features F1 ``(m, h, w)`` and F2 ``(n, h, w)`` is
the matrix (equation 1)

    G_ij = sum_s sum_t  F1_{i,s,t} * F2_{j,s,t} / (h * w)

that is ``F1^T F2 / (h w)`` with the positions as rows: which channels of the one are active where which of
the other are. Over the pairs of layers k the loss is (equation 2)

    L_FSP = 1/N * sum_x sum_k lambda_k * || G_T,k(x) - G_S,k(x) ||_F**2

Two stages: first L_FSP alone, then the task's loss alone, from the weights that the first stage left. So
this method sets the task's weight to 0, and a stage without it comes after; see the recipe ``fsp_digits``.

Faithful: the sum, not a mean, over the matrix; one matrix a sample; maps of one pair that differ in size
are brought to the smaller one by max-pooling; no adapters, so both networks need the same channels at the
places of a pair (their sizes may differ). ``shuffle`` is the paper's variant for ensembles, in which
students that are trained with other permutations of the teacher's matrix become more different: the rows
and the columns are permuted, all the samples and all steps alike. The paper does not say more [not
confirmed]; here a place of the teacher has one permutation of its channels, wherever it occurs, so that the
matrices of several pairs can still be met together.

Differs: the paper computes the teacher's matrices once and keeps them, which is possible only without
random augmentation; here the teacher runs along.

Cost: the teacher's forward pass, and two small matrix products a pair and sample. When not to use it:
networks of other widths. With several processes, freeze what lies behind the last place
(``train.trainable``): it gets no gradient in the first stage.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from torch.nn import functional as F

from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.types import NonNegative, Term
from ...errors import ModelMismatch
from ...mechanisms.adapters import Shape
from ._features import FeatureMethod, width_of
from ._players import precise


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """``G = F1^T F2 / (h w)`` of each sample.

    Args:
        first: F1, shape ``(batch, m, height, width)``, or ``(batch, m)`` for one position.
        second: F2, shape ``(batch, n, height, width)``; where sizes differ, both are max-pooled to
            the smaller.

    Returns:
        Shape ``(batch, m, n)``.

    Example:
        >>> fsp_matrix(torch.ones(1, 2, 4, 4), torch.full((1, 3, 2, 2), 5.0))
        tensor([[[5., 5., 5.],
                 [5., 5., 5.]]])
    """
    first, second = same_size(as_maps(first), as_maps(second))
    positions = first.shape[2] * first.shape[3]
    # In 16 bits the sums over positions overflow, and a product loses most of its digits.
    with torch.autocast(first.device.type, enabled=False):
        first, second = precise(first).flatten(2), precise(second).flatten(2)
        return first @ second.transpose(1, 2) / positions


def as_maps(feature: Tensor) -> Tensor:
    """A vector a sample, ``(batch, channels)``, as a map of one position."""
    return feature[..., None, None] if feature.ndim == 2 else feature


def same_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Max-pool maps to the smaller height and width of both."""
    height, width = (min(first.shape[dim], second.shape[dim]) for dim in (2, 3))

    def pooled(maps: Tensor) -> Tensor:
        small = maps.shape[2:] == (height, width)
        return maps if small else F.adaptive_max_pool2d(maps, (height, width))

    return pooled(first), pooled(second)


def fsp_loss(own: Tensor, taught: Tensor) -> Tensor:
    """``||G_T - G_S||_F**2``, the mean over the batch.

    Args:
        own: the student's matrices, ``(batch, m, n)``.
        taught: the teacher's, same shape.
    """
    return (taught - own).square().sum((1, 2)).mean()


@method
class Fsp(FeatureMethod):
    """Learn the teacher's FSP matrices, which say how features flow between two layers.

    Attributes:
        teacher: one network; see :meth:`~lilliput.core.run.Run.find_network`.
        pairs: place in the student -> place in the teacher (see :mod:`lilliput.mechanisms.taps`) with the
            same channels; a list where both have the same names.
        flows: between which two of the student's places each matrix is taken, for example
            ``[[relu1, relu2], [relu2, relu3]]``.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        lambdas: the weight of each flow; by default all 1.
        weight: of all flows together, a number or ``{start: 1, end: 0}``.
        shuffle: permute the rows and the columns of the teacher's matrices.
        hard_weight: of the task's own loss; the paper has 0.

    Example:
        >>> Fsp(pairs=["relu1", "relu2"], flows=[("relu1", "relu2")], teacher="previous").hard_weight
        0.0
    """

    flows: Annotated[list[tuple[str, str]], Field(min_length=1)]
    lambdas: list[NonNegative] | None = None
    weight: LossWeight = 1.0
    shuffle: bool = False
    hard_weight: LossWeight = 0.0

    _order: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fit_together(self) -> Fsp:
        used = {place for flow in self.flows for place in flow}
        if unknown := used - self.pairs.keys():
            raise ValueError(f"flows name {sorted(unknown)}, which pairs do not have")
        if idle := self.pairs.keys() - used:
            raise ValueError(f"no flow begins or ends at {sorted(idle)}: leave them out of pairs")
        if self.lambdas is not None and len(self.lambdas) != len(self.flows):
            raise ValueError(f"{len(self.lambdas)} lambdas for {len(self.flows)} flows")
        return self

    @classmethod
    def example(cls) -> Fsp:
        """From the input to the last place that both a perceptron and a convolutional network have."""
        return cls(pairs=["0:input", "5"], flows=[("0:input", "5")])

    def attach(self, run: Run) -> None:
        """Find the teacher, compare its channels with the student's, and draw the permutations."""
        super().attach(run)
        for (place, told), (own, taught) in zip(self.pairs.items(), self.shapes(run), strict=True):
            _check(place, told, own, taught)
            if self.shuffle:
                drawn = torch.randperm(width_of(taught), generator=run.generator(f"fsp {told}"))
                self._order[place] = drawn.to(run.device)

    def task_weight(self, run: Run) -> float:
        """The weight of the task's own loss."""
        return weight_at(self.hard_weight, run.progress)

    def loss(self, run: Run) -> dict[str, Term]:
        """The sum over the flows."""
        found = dict(zip(self.pairs, self.features(run), strict=True))
        losses = [
            fsp_loss(
                fsp_matrix(found[first][0], found[second][0]),
                self._shuffled(fsp_matrix(found[first][1], found[second][1]), first, second),
            )
            for first, second in self.flows
        ]
        value = torch.stack(
            [
                factor * loss
                for factor, loss in zip(self.lambdas or [1.0] * len(losses), losses, strict=True)
            ]
        )
        return {"fsp": Term(value.sum(), weight_at(self.weight, run.progress))}

    def _shuffled(self, matrices: Tensor, first: str, second: str) -> Tensor:
        """The teacher's matrices with their rows and columns in another order, if that is asked."""
        if not self.shuffle:
            return matrices
        return matrices[:, self._order[first]][:, :, self._order[second]]


def _check(place: str, told: str, own: Shape, taught: Shape) -> None:
    """Raise ModelMismatch where two places cannot be compared."""
    shapes = f"fsp: {place!r} of the student hands over {own}, {told!r} of the teacher {taught}"
    if len(own) not in (2, 4) or len(taught) not in (2, 4):
        raise ModelMismatch(
            f"{shapes}: name places with maps (batch, channels, height, width) or (batch, channels)."
        )
    if width_of(own) != width_of(taught):
        raise ModelMismatch(
            f"{shapes}. The matrices are compared as they are, without adapters: choose places with the "
            "same number of channels, or a student as wide as its teacher."
        )
