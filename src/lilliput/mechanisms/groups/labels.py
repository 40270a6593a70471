"""A store of labels: which indices of which dims are one channel, and which must stay.

Every index of every dim of every tensor carries an integer. A positive label names a channel; 0 says
that the index must stay; a negative one says the same, and that the dim came out of the split of that
number (which is how attention heads are recognized). Operators emit equalities; one call of scipy's
``connected_components`` at the end says which labels are one channel.

The surprising rule: nothing is merged on the way. Two labels may long have been equated and still be
different numbers; only :meth:`Labels.solve` knows.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

#: One label an index of a dim, int64.
Dim: TypeAlias = NDArray[np.int64]

#: The labels of a tensor, one array a dim.
Dims: TypeAlias = list[Dim]


class Context(NamedTuple):
    """What was at work when something was learned."""

    operator: object = ""
    module: str = ""

    def __str__(self) -> str:
        where = f"in {self.module!r}" if self.module else "in the model itself"
        return f"{self.operator} {where}" if self.operator else where


class Reason(NamedTuple):
    """Why labels must stay, or are mixed."""

    why: str
    context: Context

    def __str__(self) -> str:
        return f"{self.why} ({self.context})" if self.context.operator else self.why


class Note(NamedTuple):
    """Something learned about labels: that they are mixed, or contracted pairwise."""

    labels: Dim
    reason: Reason


class Solution:
    """Which labels are one channel.

    Args:
        of: component of each label.
        count: of components.
        stuck: labels that must stay.
        cause: number of the reason of each of them.
        reasons: all of them, in the order in which they were learned.

    Attributes:
        of: component of each label.
        fixed: whether the component must stay.
    """

    def __init__(
        self,
        of: NDArray[np.int32],
        count: int,
        stuck: Dim,
        cause: NDArray[np.int64],
        reasons: list[tuple[str, Context]],
    ) -> None:
        self.of, self._reasons = of, reasons
        self.fixed = np.zeros(count, dtype=bool)
        self.fixed[of[0]] = True
        self.fixed[of[stuck]] = True
        self._cause = np.full(count, len(reasons), dtype=np.int64)
        np.minimum.at(self._cause, of[stuck], cause)

    def fix(self, labels: Dim, why: str, context: Context) -> None:
        """Let further components stay."""
        components = self.of[labels[labels > 0]]
        fresh = components[~self.fixed[components]]
        self._cause[fresh] = len(self._reasons)
        self._reasons.append((why, context))
        self.fixed[components] = True

    def live(self, labels: Dim) -> NDArray[np.bool_]:
        """Which of the labels may go."""
        return np.asarray(~self.fixed[self.of[np.maximum(labels, 0)]])

    def reason(self, labels: Dim) -> str:
        """Why the first of the labels that must stay has to."""
        stuck = labels[~self.live(labels)]
        cause = self._cause[self.of[max(int(stuck[0]), 0)]] if len(stuck) else len(self._reasons)
        known = cause < len(self._reasons)
        return str(Reason(*self._reasons[cause])) if known else "it meets a dim that stays"


class Labels:
    """Labels, the equalities between them, and what else operators say about them.

    Attributes:
        context: what is at work now; stands in reasons.
        mixed: labels over which a statistic is computed.
        pairs: labels over which two activations are contracted.
    """

    def __init__(self) -> None:
        self.count = 1
        self.context = Context()
        self.mixed: list[Note] = []
        self.pairs: list[Note] = []
        self._left: list[Dim] = []
        self._right: list[Dim] = []
        self._reasons: list[tuple[str, Context]] = []  # one for each pair of dims in left and right
        self._still: dict[int, Dim] = {}

    def new(self, size: int) -> Dim:
        """Labels of channels not met before."""
        start, self.count = self.count, self.count + size
        return np.arange(start, self.count)

    def still(self, size: int) -> Dim:
        """Labels of a dim that stays; the same array for the same size, so that ``is`` may compare."""
        known = self._still.get(size)
        if known is None:
            known = self._still[size] = np.zeros(size, dtype=np.int64)
            known.flags.writeable = False
        return known

    def is_live(self, labels: Dim) -> bool:
        """Whether any label names a channel."""
        return self._still.get(len(labels)) is not labels and bool((labels > 0).any())

    def equate(self, left: Dim, right: Dim) -> None:
        """Let corresponding labels, after broadcasting, be one channel; nobody may write into them."""
        if left is not right:
            if left.shape != right.shape:
                left, right = np.broadcast_arrays(left, right)
            self._tie(left.reshape(-1), right.reshape(-1), "it meets a dim that must stay")

    def fix(self, labels: Dim, why: str) -> None:
        """Let labels stay, and remember why."""
        still = self.still(len(labels))
        if labels is not still:
            self._tie(labels, still, why)

    def _tie(self, left: Dim, right: Dim, why: str) -> None:
        self._left.append(left)
        self._right.append(right)
        self._reasons.append((why, self.context))

    def mix(self, labels: Dim, why: str) -> None:
        """Say that a statistic is computed over the labels."""
        self._note(self.mixed, labels, why)

    def pair(self, labels: Dim) -> None:
        """Say that two activations are contracted over the labels."""
        self._note(self.pairs, labels, "contracted")

    def _note(self, notes: list[Note], labels: Dim, why: str) -> None:
        if self._still.get(len(labels)) is not labels:
            notes.append(Note(labels, Reason(why, self.context)))

    def solve(self) -> Solution:
        """One connected-components call over all equalities."""
        empty = [np.zeros(0, dtype=np.int64)]
        left, right = (np.concatenate(side or empty) for side in (self._left, self._right))
        low, high = np.minimum(left, right), np.maximum(left, right)
        joins = np.flatnonzero((low > 0) & (low != high))
        stays = np.flatnonzero((low <= 0) & (high > 0))
        ones = np.ones(len(joins), dtype=bool)
        graph = coo_matrix((ones, (low[joins], high[joins])), shape=(self.count, self.count))
        count, of = connected_components(graph, directed=False)
        ends = np.cumsum([len(labels) for labels in self._left])
        cause = np.searchsorted(ends, stays, side="right")
        return Solution(of, count, high[stays], cause, list(self._reasons))
