"""Integers that modules hold, and that have to follow when channels go.

``self.num_heads`` in a ``view`` is one of them: the trace saw the attribute's value arrive there
(:mod:`.widths`), and so knows of which dim it is the size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .components import Assembly
from .labels import Solution
from .trace import Check, Trace, kept_by


class Attributes:
    """Which integers follow from which labels.

    Args:
        trace: of a forward pass.
        solution: its components.
        assembly: its groups.
    """

    def __init__(self, trace: Trace, solution: Solution, assembly: Assembly) -> None:
        self._solution, self._assembly = solution, assembly
        self._targets = {
            path: labels for path, labels in trace.attributes.items() if solution.live(labels).any()
        }

    def after(self, removal: Mapping[int, np.ndarray]) -> dict[str, int]:
        """The attributes that a removal changes, with their new values."""
        if not self._targets:
            return {}
        kept = kept_by(self._keeps(removal), self._solution)
        return {
            path: count
            for path, labels in self._targets.items()
            if (count := kept(labels)) != len(labels)
        }

    def _keeps(self, removal: Mapping[int, np.ndarray]) -> NDArray[np.bool_]:
        """Whether each component stays."""
        group, rank, count = self._assembly.group, self._assembly.rank, self._assembly.count
        starts = np.cumsum(count) - count
        stays = np.ones(int(count.sum()), dtype=bool)  # channels, group after group
        for number, channels in removal.items():
            stays[starts[number] + channels] = False
        keeps = np.ones(len(group), dtype=bool)
        inside = np.flatnonzero(group >= 0)
        keeps[inside] = stays[starts[group[inside]] + rank[inside]]
        return keeps


def settle(trace: Trace) -> tuple[Solution, list[str]]:
    """Solve, and make sure that the numbers in the code will be right after any removal.

    Where a number would not follow by itself, the dims are equated between which it mediates; whole
    dims first, since parts of them then often follow. What is still wrong must stay.

    Returns:
        The components, and where numbers in the code hold channels in place.
    """
    solution = trace.labels.solve()
    for parts in (False, True):
        wrong = [
            check
            for check in _failing(trace.checks, solution)
            if check.source is not None and (len(check.source) > 1) == parts
        ]
        for check in wrong:
            trace.equate(check)
        solution = trace.labels.solve() if wrong else solution
    checks, held = trace.checks, []
    while wrong := _failing(checks, solution):
        for check in wrong:
            _fix(trace, solution, check)
            held.append(f"{int(check.value)} in {check.context}")
        done = {id(check) for check in wrong}
        checks = [check for check in checks if id(check) not in done]
    return solution, list(dict.fromkeys(held))


def _failing(checks: list[Check], solution: Solution) -> list[Check]:
    """The checks that do not hold after some random removals, the largest possible among them."""
    if not checks:
        return []
    random = np.random.default_rng(0).random((4, len(solution.fixed)))
    draws = [
        kept_by(solution.fixed | (its < keep), solution)
        for its, keep in zip(random, (0.0, 0.3, 0.5, 0.7), strict=True)
    ]
    return [check for check in checks if any(check.fails(kept) for kept in draws)]


def _fix(trace: Trace, solution: Solution, check: Check) -> None:
    why = f"its size is a number in the code, {int(check.value)}"
    dims = list(trace.labels_of(check.value))
    if isinstance(check.target, int):
        dims += trace.labels_of(check.target)
    else:
        dims.append(check.target)
    for labels in dims:
        solution.fix(labels, why, check.context)
