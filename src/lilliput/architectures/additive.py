"""An additive model with pairwise terms, as tables: the form of a fitted GA2M.

``f(x) = intercept + sum_i f_i(x_i) + sum_(i, j) f_ij(x_i, x_j)``, where each ``f_i`` is constant within a
bin of the feature and each ``f_ij`` within a cell of two coarser binnings. What it has learned can be drawn:
a curve a feature, a heat map a pair.

Paper: Intelligible Models for Classification and Regression (Lou, Caruana, Gehrke; KDD 2012)

Paper: Accurate Intelligible Models with Pairwise Interactions (Lou, Caruana, Gehrke, Hooker; KDD 2013)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.registry import architecture
from ..errors import InputError, ModelMismatch
from ._lookup import LARGEST, Lookup


class Curve(NamedTuple):
    """The term of one feature.

    Attributes:
        edges: ascending, ``(edges,)``; a value equal to an edge belongs to the bin above it.
        scores: ``(outputs, 1 + edges + 1)``: where the feature is missing, then bin by bin.
    """

    edges: Tensor
    scores: Tensor


class Surface(NamedTuple):
    """The term of two features.

    Attributes:
        features: their numbers, from 0.
        edges: of both, as in :class:`Curve`.
        scores: ``(outputs, 1 + edges + 1, 1 + edges + 1)``, missing first in both dims.
    """

    features: tuple[int, int]
    edges: tuple[Tensor, Tensor]
    scores: Tensor


class Additive(nn.Module):
    """See :func:`additive`; :meth:`fill` gives it what was fitted elsewhere.

    The surprising rule: bins that a term does not need repeat its last one, so that shapes depend on the
    architecture's arguments only, and a value beyond all edges finds its bin whatever was fitted.
    """

    edges: Tensor
    pair_features: Tensor
    pair_edges: Tensor

    def __init__(self, features: int, outputs: int, bins: int, pairs: int, pair_bins: int) -> None:
        super().__init__()
        self.features, self.outputs, self.pairs = features, outputs, pairs
        self.bins, self.pair_bins = bins, pair_bins
        self.register_buffer("edges", torch.full((features, bins - 1), LARGEST))
        self.register_buffer("pair_features", torch.zeros(pairs, 2, dtype=torch.int64))
        self.register_buffer("pair_edges", torch.full((pairs, 2, pair_bins - 1), LARGEST))
        cells = features * (bins + 1) + pairs * (pair_bins + 1) ** 2
        self.table = Lookup(cells, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """From ``(batch, ...)`` with ``features`` numbers a sample to ``(batch, outputs)``; NaN is missing.

        Raises:
            ModelMismatch: a sample has another number of features.
        """
        values = inputs.flatten(1).t().contiguous().to(self.edges.dtype)
        if len(values) != self.features:
            raise ModelMismatch(
                f"this additive network has {self.features} features, and a sample has {len(values)}."
            )
        return self.table(self._rows(values).unsqueeze(0))  # type: ignore[no-any-return]

    def _rows(self, values: Tensor) -> Tensor:
        """The table's rows of each sample, ``(batch, terms)``; values are ``(features, batch)``."""
        start = torch.arange(self.features, device=values.device) * (self.bins + 1)
        rows = (_bins(values, self.edges) + start[:, None]).t()
        if not self.pairs:
            return rows
        side = self.pair_bins + 1
        inside = _bins(values[self.pair_features], self.pair_edges)
        first = torch.arange(self.pairs, device=values.device) * side**2
        first = first + self.features * (self.bins + 1)
        cells = inside[:, 0] * side + inside[:, 1] + first[:, None]
        return torch.cat([rows, cells.t()], 1)

    @torch.no_grad()
    def fill(
        self, intercept: Tensor, curves: Sequence[Curve], surfaces: Sequence[Surface] = ()
    ) -> None:
        """Take in what was fitted.

        Args:
            intercept: ``(outputs,)``.
            curves: one a feature.
            surfaces: at most ``pairs``; those that are left over are zero.

        Raises:
            ModelMismatch: there are more bins or terms than the architecture has room for.
        """
        self._check(curves, surfaces)
        for place, curve in enumerate(curves):
            self.edges[place] = _padded(curve.edges, self.bins - 1)
        for place, surface in enumerate(surfaces):
            self.pair_features[place] = torch.tensor(surface.features)
            for side, edges in enumerate(surface.edges):
                self.pair_edges[place, side] = _padded(edges, self.pair_bins - 1)
        tables = [_extended(c.scores, self.bins + 1) for c in curves]
        side_length = self.pair_bins + 1
        for surface in surfaces:
            wide = _extended(surface.scores, side_length).transpose(1, 2)
            tables.append(_extended(wide, side_length).transpose(1, 2).flatten(1))
        filled = torch.cat(tables, 1).to(self.table.weight)
        self.table.weight.zero_()
        self.table.weight[:, : filled.shape[1]] = filled
        self.table.bias.copy_(intercept)

    def _check(self, curves: Sequence[Curve], surfaces: Sequence[Surface]) -> None:
        bins = max(len(c.edges) for c in curves) + 1
        cells = max((len(e) + 1 for s in surfaces for e in s.edges), default=0)
        found = (len(curves), bins, len(surfaces), cells)
        room = (self.features, self.bins, self.pairs, self.pair_bins)
        if found[0] != room[0] or any(f > r for f, r in zip(found, room, strict=True)):
            raise ModelMismatch(
                "this additive network has room for (features, bins, pairs, bins of a pair) = "
                f"{room}, and {found} are to be filled in: build it larger."
            )


@architecture
def additive(
    features: int = 10, outputs: int = 1, bins: int = 32, pairs: int = 0, pair_bins: int = 8
) -> nn.Module:
    """A curve a feature and a surface a pair, as tables, 331 parameters.

    Input ``(N, ...)`` with ``features`` numbers a sample, NaN where one is missing; output ``(N, outputs)``.
    The count is for the defaults: 32 bins and one for missing values for each of 10 features, and an
    intercept. All is zero until a method fills it (``transparent``).

    Args:
        features: numbers of a sample.
        outputs: additive functions, one an output.
        bins: of a feature, at most.
        pairs: of features with a term of their own, at most.
        pair_bins: of each feature of a pair, at most.

    Raises:
        InputError: a count is too small.

    Example:
        >>> network = additive(features=1, bins=2)
        >>> curve = Curve(torch.tensor([0.5]), torch.tensor([[7.0, -1.0, 1.0]]))
        >>> network.fill(torch.tensor([10.0]), [curve])
        >>> network(torch.tensor([[0.4], [0.5], [torch.nan]])).flatten().tolist()
        [9.0, 11.0, 17.0]
    """
    least = {"features": (features, 1), "outputs": (outputs, 1), "bins": (bins, 2)}
    least |= {"pairs": (pairs, 0), "pair_bins": (pair_bins, 2)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise InputError(f"additive: {name}={value}: give at least {minimum}.")
    return Additive(features, outputs, bins, pairs, pair_bins)


def _bins(values: Tensor, edges: Tensor) -> Tensor:
    """Of each value its bin, from 1, or 0 where it is missing.

    Args:
        values: ``(..., batch)``.
        edges: ``(..., edges)``, ascending.
    """
    inside = torch.searchsorted(edges, values, right=True) + 1
    return torch.where(values.isnan(), 0, inside)


def _padded(edges: Tensor, length: int) -> Tensor:
    """The edges rounded up to 32 bits, and the largest number behind them.

    Rounded up, a 32-bit value lies on the same side of an edge as it did of the 64-bit one.
    """
    single = edges.float()
    single = torch.where(single < edges, torch.nextafter(single, torch.tensor(torch.inf)), single)
    return nn.functional.pad(single, (0, length - len(single)), value=LARGEST)


def _extended(scores: Tensor, length: int) -> Tensor:
    """Scores with their last entry of the second dim repeated up to a length."""
    last = scores[:, -1:].expand(-1, length - scores.shape[1], *scores.shape[2:])
    return torch.cat([scores, last], 1)
