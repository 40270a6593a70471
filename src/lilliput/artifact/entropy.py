"""Order-0 entropy: the size that an ideal coder of independent symbols would reach."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Total bits of a sequence with these counts of symbols: N * H.

    Args:
        counts: occurrences of each symbol, zero as a symbol like any other.

    Example:
        >>> entropy_bits(np.array([2, 1, 1]))
        6.0
    """
    present = counts[counts > 0].astype(np.float64)
    return float(present @ np.log2(present.sum() / present)) if len(present) else 0.0
