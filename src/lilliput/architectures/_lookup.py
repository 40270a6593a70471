"""A linear layer over one-hot inputs, computed by looking rows up instead of multiplying.

Tables of an additive model and leaves of trees are such layers: each sample has a one in some rows and
zeros elsewhere. As a ``Linear`` they can be pruned, clustered and counted like any other weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Stands for an edge or a threshold that is not there; files and reports hold it as any number.
LARGEST = torch.finfo(torch.float32).max


class Lookup(nn.Linear):
    """``weight (outputs, rows)`` and ``bias (outputs,)``, both zero at first.

    The surprising rule: the forward pass takes the numbers of the rows that are one, not the one-hot
    vector.

    Args:
        rows: how many there are.
        outputs: numbers a row holds.

    Example:
        >>> layer = Lookup(3, 1)
        >>> layer.weight.data = torch.tensor([[1.0, 10.0, 100.0]])
        >>> layer(torch.tensor([[[0, 2]]]))
        tensor([[101.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, rows: int, outputs: int) -> None:
        super().__init__(rows, outputs)

    def reset_parameters(self) -> None:
        """Everything is zero until it is filled."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """The sum of the rows of each sample, and the bias.

        Args:
            rows: int64 ``(outputs, batch, terms)``, or ``(1, batch, terms)`` where all outputs look up the
                same rows.

        Returns:
            Shape ``(batch, outputs)``.
        """
        flat = rows.flatten(1).expand(self.out_features, -1)
        found = self.weight.gather(1, flat).unflatten(1, rows.shape[1:])
        total: Tensor = found.sum(-1).t() + self.bias
        return total
