"""Entropy-constrained codebooks: shared values for codes of variable length.

Paper: Towards the Limit of Network Quantization (Choi, El-Khamy, Lee; ICLR 2017; arXiv 1612.01543)

What is Huffman-coded afterwards should not be clustered for distance alone. With ``D`` the distortion
weighted by the diagonal of the Hessian and ``H`` the entropy of the codes, ``D + lambda H`` is lowered in
turns: a weight goes to the cluster with the least ``h_ii |w_i - c_j|^2 - lambda log2 p_j``, then shares and
centers follow (section 5). Or (``quantizer: uniform``) weights are rounded to a grid and each bin's
weighted mean stands for it, which the paper finds nearly as good, and best where the values train
afterwards. All layers share one codebook.

Faithful: both quantizers, curvature weighting, all layers together, zeros of pruning left out. Differs:
``penalty`` is lambda as a part of the mean of ``h_ii w_i^2``, and ``step`` in units of the root mean square
of the weights, so that both mean the same in every network; the diagonal is that of the Gauss-Newton
matrix.

The surprising rule: how many values come out is found, not set. The file's writer does the Huffman coding
(``artifact``).

Cost: distances of all weights to all centers, some dozens of times; the uniform quantizer one pass. When
not to use it: where a code must have a fixed length (``hessian_codebook``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...core.registry import method
from ...core.types import NonNegative, Positive
from ...mechanisms.scalar_quantizers import entropy_constrained, uniform
from ._shared_values import Found, SharedValues


@method
class EntropyCodebook(SharedValues):
    """Let all layers share values whose codes take few bits once they are Huffman-coded, and train them.

    Attributes:
        quantizer: ``entropy`` lowers distortion and entropy together, ``uniform`` rounds to a grid.
        penalty: of ``entropy``: how much of the relative error one bit a weight is worth.
        clusters: of ``entropy``: how many values it begins with.
        step: of ``uniform``: the distance of the grid's points, in root mean squares of the weights.
        curvature: of the loss by each weight: ``gauss_newton``, ``adam``, or ``none``.
        samples: of the training data on which it is measured.
        joint: one codebook for all layers, or one for each.
        layers: pattern over module names.

    Example:
        >>> EntropyCodebook(quantizer="uniform", step=0.5).joint
        True
    """

    quantizer: Literal["entropy", "uniform"] = "entropy"
    penalty: NonNegative = 0.01
    clusters: Annotated[int, Field(ge=2, le=4096)] = 64
    step: Positive = 0.5

    @classmethod
    def example(cls) -> Any:
        """A dozen values or so."""
        return cls(clusters=16, samples=16)

    def cluster(self, values: NDArray[np.float64], curvature: NDArray[np.float64]) -> Found:
        """By the chosen quantizer."""
        if self.quantizer == "uniform":
            step = self.step * float(np.sqrt(np.mean(values**2)))
            found = uniform(values, curvature, step)
        else:
            found = entropy_constrained(values, curvature, self.clusters, self.penalty)
        return Found(found.centroids, found.codes)
