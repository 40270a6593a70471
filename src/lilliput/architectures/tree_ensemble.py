"""A sum of decision trees of one depth, as arrays: the form of fitted gradient-boosted trees.

``f(x) = intercept + sum_t leaf_t(x)``. Every tree is laid out as a whole binary tree: below node n are the
nodes ``2 n + 1`` and ``2 n + 2``, and a sample goes to the first where ``x[feature] <= threshold``. All
samples go down all trees at once, a level at a time.

Paper: Greedy Function Approximation: A Gradient Boosting Machine (Friedman; Annals of Statistics 2001;
doi 10.1214/aos/1013203451)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.registry import architecture
from ..errors import InputError, ModelMismatch
from ._checks import check_counts
from ._lookup import LARGEST, Lookup

_DEEPEST = 12


class TreeEnsemble(nn.Module):
    """See :func:`tree_ensemble`; :meth:`fill` gives it what was fitted elsewhere.

    The surprising rule: there is no way down a tree for a missing value, so a sample with one gets NaN.
    """

    feature: Tensor
    threshold: Tensor

    def __init__(self, features: int, outputs: int, trees: int, depth: int) -> None:
        super().__init__()
        self.features, self.outputs, self.trees, self.depth = features, outputs, trees, depth
        shape = (outputs, trees, 2**depth - 1)
        self.register_buffer("feature", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("threshold", torch.full(shape, LARGEST))
        self.leaves = Lookup(trees * 2**depth, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """From ``(batch, ...)`` with ``features`` numbers a sample to ``(batch, outputs)``.

        Raises:
            ModelMismatch: a sample has another number of features.
        """
        values = inputs.flatten(1)
        if values.shape[1] != self.features:
            raise ModelMismatch(
                f"this tree ensemble has {self.features} features, and a sample has {values.shape[1]}."
            )
        leaf = self._leaf(values)
        start = torch.arange(self.trees, device=values.device) * 2**self.depth
        rows = (leaf + start[:, None]).transpose(1, 2)
        missing = values.isnan().any(1, keepdim=True)
        output: Tensor = self.leaves(rows).masked_fill(missing, torch.nan)
        return output

    def _leaf(self, values: Tensor) -> Tensor:
        """The leaf that each sample reaches in each tree, ``(outputs, trees, batch)``."""
        columns = torch.arange(len(values), device=values.device)
        node = columns.new_zeros(*self.feature.shape[:2], len(values))
        for _ in range(self.depth):
            wanted = self.feature.gather(2, node)
            beyond = values[columns, wanted] > self.threshold.gather(2, node)
            node = 2 * node + 1 + beyond
        leaf: Tensor = node - (2**self.depth - 1)
        return leaf

    @torch.no_grad()
    def fill(self, intercept: Tensor, feature: Tensor, threshold: Tensor, leaves: Tensor) -> None:
        """Take in what was fitted; trees that are left over stay zero.

        Args:
            intercept: ``(outputs,)``.
            feature: int64 ``(outputs, trees, nodes)``, which one a node looks at.
            threshold: of the same shape, infinite where it does not matter.
            leaves: ``(outputs, trees, nodes + 1)``, what each adds.

        Raises:
            ModelMismatch: these are more trees, or trees of another depth.
        """
        room, found = tuple(self.feature.shape), tuple(feature.shape)
        if found[0] != room[0] or found[1] > room[1] or found[2] != room[2]:
            raise ModelMismatch(
                f"this tree ensemble has room for (outputs, trees, nodes) = {room}, not for {found}."
            )
        self.feature[:, : found[1]] = feature
        self.threshold[:, : found[1]] = _rounded_down(threshold)
        self.leaves.weight.zero_()
        self.leaves.weight[:, : leaves[0].numel()] = leaves.flatten(1).to(self.leaves.weight)
        self.leaves.bias.copy_(intercept)


@architecture
def tree_ensemble(
    features: int = 10, outputs: int = 1, trees: int = 100, depth: int = 3
) -> nn.Module:
    """A sum of decision trees, 801 parameters.

    Input ``(N, ...)`` with ``features`` numbers a sample, output ``(N, outputs)``. The count is for the
    defaults: 100 trees with 8 leaves each, and an intercept; the trees' features and thresholds are
    buffers. All is zero until a method fills it (``transparent``).

    Args:
        features: numbers of a sample.
        outputs: sums of trees, one an output.
        trees: of each output.
        depth: decisions from the root to a leaf.

    Raises:
        InputError: a count is below 1, or the trees are deeper than 12.

    Example:
        >>> tree_ensemble(features=3, trees=2)(torch.zeros(4, 3)).shape
        torch.Size([4, 1])
    """
    check_counts("tree_ensemble", features=features, outputs=outputs, trees=trees, depth=depth)
    if depth > _DEEPEST:
        raise InputError(
            f"tree_ensemble: depth={depth}: a tree is laid out whole, so that is {2**depth:,} leaves for "
            f"each: give at most {_DEEPEST}."
        )
    return TreeEnsemble(features, outputs, trees, depth)


def _rounded_down(threshold: Tensor) -> Tensor:
    """The thresholds in 32 bits; rounded down, they part 32-bit values as the 64-bit ones did."""
    single = threshold.float()
    below = torch.nextafter(single, torch.tensor(-torch.inf))
    return torch.where(single > threshold, below, single).clamp_max(LARGEST)
