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


class Note(NamedTuple):
    """Something learned about labels: that they must stay, are mixed, are contracted pairwise."""

    labels: Dim
    why: str
    context: Context

    def __str__(self) -> str:
        return f"{self.why} ({self.context})" if self.context.operator else self.why


class Solution:
    """Which labels are one channel.

    Attributes:
        of: component of each label.
        fixed: whether the component must stay.
    """

    def __init__(self, of: NDArray[np.int32], count: int, stays: list[Note]) -> None:
        self.of = of
        self.fixed = np.zeros(count, dtype=bool)
        self.fixed[of[0]] = True
        self._cause = np.full(count, len(stays), dtype=np.int64)
        self._stays = stays
        for number, note in enumerate(stays):
            np.minimum.at(self._cause, of[note.labels], number)
        self.fixed[self._cause < len(stays)] = True

    def fix(self, labels: Dim, why: str, context: Context) -> None:
        """Let further components stay."""
        components = self.of[labels[labels > 0]]
        fresh = components[~self.fixed[components]]
        self._cause[fresh] = len(self._stays)
        self._stays.append(Note(labels, why, context))
        self.fixed[components] = True

    def live(self, labels: Dim) -> NDArray[np.bool_]:
        """Which of the labels may go."""
        return np.asarray((labels > 0) & ~self.fixed[self.of[np.maximum(labels, 0)]])

    def reason(self, labels: Dim) -> str:
        """Why the first of the labels that must stay has to."""
        stuck = labels[~self.live(labels)]
        cause = self._cause[self.of[max(int(stuck[0]), 0)]] if len(stuck) else len(self._stays)
        return str(self._stays[cause]) if cause < len(self._stays) else "it meets a dim that stays"


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
        self._stays: list[Note] = []
        self._left: list[Dim] = []
        self._right: list[Dim] = []
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
        """Let corresponding labels, after broadcasting, be one channel."""
        if left is right:
            return
        different = left != right
        if not different.any():
            return
        if left.shape != right.shape:
            left, right = np.broadcast_arrays(left, right)
        left, right = left[different], right[different]
        low, high = np.minimum(left, right), np.maximum(left, right)
        free = low > 0
        if not free.all():
            self.fix(high[~free], "it meets a dim that must stay")
            low, high = low[free], high[free]
        if len(low):
            self._left.append(low)
            self._right.append(high)

    def fix(self, labels: Dim, why: str) -> None:
        """Let labels stay, and remember why."""
        if self.is_live(labels):
            self._stays.append(Note(labels[labels > 0], why, self.context))

    def mix(self, labels: Dim, why: str) -> None:
        """Say that a statistic is computed over the labels."""
        if self.is_live(labels):
            self.mixed.append(Note(labels[labels > 0], why, self.context))

    def pair(self, labels: Dim) -> None:
        """Say that two activations are contracted over the labels."""
        if self.is_live(labels):
            self.pairs.append(Note(labels[labels > 0], "contracted", self.context))

    def solve(self) -> Solution:
        """One connected-components call over all equalities."""
        empty = [np.zeros(0, dtype=np.int64)]
        left, right = (np.concatenate(side or empty) for side in (self._left, self._right))
        ones = np.ones(len(left), dtype=bool)
        graph = coo_matrix((ones, (left, right)), shape=(self.count, self.count))
        count, of = connected_components(graph, directed=False)
        return Solution(of, count, list(self._stays))
