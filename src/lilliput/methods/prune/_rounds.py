"""Rounds of pruning, spread over the first part of a stage."""

from __future__ import annotations

from ...core.run import Run


def rounds_due(run: Run, rounds: int, until: float) -> int:
    """How many rounds should have pruned by now; all of them in a stage that does not train.

    Args:
        run: of this stage.
        rounds: in all.
        until: part of the stage over which they are spread.
    """
    part = run.progress / until if until else 1.0
    return min(rounds, 1 + int(part * rounds))
