"""Filters of small length: the baseline that ranks by the ℓ2 norm, once.

Paper: Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks (He, Kang, Dong, Fu, Yang;
IJCAI 2018; arXiv 1808.06866)

Only the criterion is the paper's: ``s_j = ||F_j||_2`` of all weights that make channel j. Here the
filters of smallest norm go at once and for good; the paper lets them come back, see ``soft_filter``. Where
several layers make a channel (a residual stream), the norm is that of all their filters together.

Cost: one pass over the weights. When not to use it: as anything but a baseline for other criteria.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ...core.registry import method
from ...core.run import Run
from ...mechanisms.groups import Groups
from ._channels import ChannelMethod
from ._norms import norms


@method
class FilterL2(ChannelMethod):
    """Remove the filters of smallest ℓ2 norm.

    Example:
        >>> FilterL2(keep=0.5).round_to
        8
    """

    data_free: ClassVar[bool] = True

    def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
        """The ℓ2 norm of the weights that make each channel."""
        return [norms(run.model, group, 2) for group in groups.groups]
