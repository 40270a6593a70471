"""``lilliput demo``: the whole of Lilliput on data that needs no download."""

from __future__ import annotations

from pathlib import Path

from .run import run


def demo(*, directory: Path | None = None, fresh: bool = False, json: bool = False) -> int:
    """Train and compress a small network in under a minute.

    Runs the recipe digits_deep_compression on scikit-learn's handwritten digits: train, sparsify
    while the dense network teaches, let the weights share values, and code the file.

    Args:
        directory: the run directory; by default one below runs.
        fresh: start anew instead of showing what an earlier demo has left there.
        json: print the figures as one JSON object instead of the table.
    """
    return run("digits_deep_compression", directory=directory, fresh=fresh, json=json)
