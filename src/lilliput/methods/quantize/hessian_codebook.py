"""Hessian-weighted k-means: shared values that cost the loss least, at a fixed length of code.

Paper: Towards the Limit of Network Quantization (Choi, El-Khamy, Lee; ICLR 2017; arXiv 1612.01543)

Near a minimum a change of the weights costs about ``1/2 sum_i h_ii (w_i - c)^2`` with the diagonal of the
Hessian, so that the clusters should minimize (equation 6) and the centers be (equation 7)::

    sum_j sum_{i in C_j} h_ii |w_i - c_j|^2          c_j = sum h_ii w_i / sum h_ii

over the weights of *all* layers together. Zeros that pruning left are not clustered. The shared values may
then train (the stage's epochs), each with the summed gradient of its members.

Faithful: objective, centers, all layers together, the curvature by back-propagation on a subset or from the
second moments of gradients. Differs: the clusters are the optimum (one-dimensional k-means allows that),
where the paper runs Lloyd's iteration; the diagonal is that of the Gauss-Newton matrix, which is never
negative.

Cost: a backward pass a sample and class for the curvature, a sort of all weights. When not to use it: where
codes are Huffman-coded anyway; then ``entropy_codebook`` is smaller at the same loss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.registry import method
from ...core.types import Bits
from ...mechanisms.clustering import kmeans
from ._shared_values import Found, SharedValues


@method
class HessianCodebook(SharedValues):
    """Let all layers share ``2**bits - 1`` values, clustered by what they cost the loss, and train them.

    Attributes:
        bits: of one code; one code is the zero's.
        curvature: of the loss by each weight: ``gauss_newton``, ``adam``, or ``none`` for plain k-means.
        samples: of the training data on which it is measured.
        joint: one codebook for all layers, or one for each.
        layers: pattern over module names.

    Example:
        >>> HessianCodebook(bits=4).joint
        True
    """

    bits: Bits = 5

    @classmethod
    def example(cls) -> HessianCodebook:
        """Seven values."""
        return cls(bits=3, samples=16)

    def cluster(self, values: NDArray[np.float64], curvature: NDArray[np.float64]) -> Found:
        """Weighted k-means, exactly."""
        found = kmeans(values, 2**self.bits - 1, init="exact", weights=curvature)
        return Found(found.centroids, found.codes)
