"""Channels drawn by lot: the baseline that every criterion has to beat.

Paper: Recovering from Random Pruning: On the Plasticity of Deep Convolutional Neural Networks (Mittal,
Bhardwaj, Khapra, Ravindran; WACV 2018; arXiv 1801.10447)

The paper's point is that after enough retraining random channels do about as well as chosen ones. So
a criterion is to be compared with this one at the same widths and the same training, not with nothing.

Faithful: within a layer every channel is equally likely to go. The draw follows the run's seed.

Cost: none. When not to use it: as anything but a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from ...core.registry import method
from ...core.run import Run
from ...mechanisms.groups import Groups
from ._channels import ChannelMethod


@method
class Random(ChannelMethod):
    """Remove channels at random.

    Example:
        >>> Random(keep={"conv*": 0.5}).scope
        'layer'
    """

    data_free: ClassVar[bool] = True

    def scores(self, run: Run, groups: Groups) -> Sequence[np.ndarray]:
        """Uniform draws."""
        generator = run.generator("random channels")
        return [torch.rand(g.channels, generator=generator).numpy() for g in groups.groups]
