"""Filters near the geometric median of their layer: what the others can stand in for goes.

Paper: Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration (He, Liu,
Wang, Hu, Yang; CVPR 2019; arXiv 1811.00250)

``g(F_j) = sum over k of ||F_j - F_k||_2``: the filters with the smallest sum of distances to all filters of
their layer lie nearest to the geometric median and are taken to be replaceable; no norm needs to be small for
that. Where several layers make a channel, distances are between all their filters together.

Faithful: the criterion, within each layer. Differs: the paper zeroes the filters after every epoch while it
trains, and mixes the criterion with a norm; here they go at once.

Cost: a table of distances between the filters of each layer. When not to use it: over all layers
together (``scope: global``) without ``normalize``, because the sums grow with the width of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.registry import method
from ...core.run import Run
from ...mechanisms.groups import Groups
from ._channels import ChannelMethod
from ._norms import filters


def distances(filters: Tensor) -> Tensor:
    """The sum of the distances from each filter to all others.

    Args:
        filters: ``(filters, weights)``.

    Returns:
        Shape ``(filters,)``.

    Example:
        >>> distances(torch.tensor([[0.0], [1.0], [5.0]]))
        tensor([6., 5., 9.])
    """
    exact = "donot_use_mm_for_euclid_dist"  # the fast formula is wrong for near-equal filters
    return torch.cdist(filters, filters, compute_mode=exact).sum(1)


@method
class Fpgm(ChannelMethod):
    """Remove the filters nearest to the geometric median of their layer.

    Example:
        >>> Fpgm(keep=0.7, layers="!conv1").keep
        0.7
    """

    data_free: ClassVar[bool] = True

    def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
        """The sum of distances of the weights that make each channel."""
        joined = [torch.cat(filters(run.model, group), dim=1) for group in groups.groups]
        return [distances(rows).cpu().double().numpy() for rows in joined]
