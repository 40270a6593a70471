"""Scalar quantization of numbers that will be coded at variable length.

Choi, El-Khamy, Lee (2017, "Towards the limit of network quantization"): with N values ``w_i`` of curvature
``h_i``, clusters of share ``p_j`` and ``codes[i] = j``, the distortion and the entropy are::

    D = 1/N sum_i h_i (w_i - c_j)^2        H = - sum_j p_j log2 p_j

:func:`entropy_constrained` lowers ``D + lambda H`` in turns, as Lloyd does; :func:`uniform` rounds to a grid
and lets the bins' weighted means stand for them, which is nearly as good at high rates.

The surprising rule: unlike k-means, a value need not belong to the nearest center. A frequent cluster is
cheap to name, and the less a value's curvature the farther it may lie from what stands for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .clustering import kmeans

_CHUNK = 1 << 15  # values whose distances to all centers are in memory at once
#: Of more values than this the turns are taken on cells of nearly equal ones.
LIMIT = 1 << 18
_PLACES, _OCTAVES = 8192, 32  # of values, of curvatures; in all at most so many cells


class _Points(NamedTuple):
    """Values, their curvature, and how many each of them stands for."""

    w: NDArray[np.float64]
    h: NDArray[np.float64]
    counts: NDArray[np.float64]


class Quantized(NamedTuple):
    """Values replaced by shared ones: ``centroids[codes]``.

    Attributes:
        centroids: float64, ascending, none without a value.
        codes: int64, for every value.
        history: ``D + lambda H`` after each half step, which never rises; of more than :data:`LIMIT` values
            that of the cells, and in the end of the values.
    """

    centroids: NDArray[np.float64]
    codes: NDArray[np.int64]
    history: list[float]


def entropy_constrained(
    values: ArrayLike,
    curvature: ArrayLike,
    clusters: int,
    penalty: float,
    *,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> Quantized:
    """Entropy-constrained scalar quantization (ECSQ).

    Args:
        values: w, shape ``(n,)``.
        curvature: h, not negative, not all zero.
        clusters: how many at the beginning; those that become empty are dropped.
        penalty: lambda, as a part of the mean of ``h w^2``: at 0.01 a bit a value costs as much as one
            percent of relative error. 0 is k-means weighted by h.
        iterations: at most.
        tolerance: stop when the objective falls by less than this part of itself.

    Raises:
        InputError: the curvature is zero everywhere, or negative.

    Example:
        >>> w = np.array([-1.0, -0.9, 0.8, 0.9, 1.0])
        >>> entropy_constrained(w, np.ones(5), 4, 0.0).codes.tolist()
        [0, 1, 2, 3, 3]
        >>> entropy_constrained(w, np.ones(5), 4, 1.0).centroids.round(2).tolist()
        [-0.95, 0.9]
    """
    w, h = _checked(values, curvature)
    price = penalty * float(np.mean(h * w * w))
    every = _Points(w, h, np.ones(len(w)))
    points = every if len(w) <= LIMIT else _cells(w, h)
    centroids = kmeans(w, clusters, init="linear", weights=h).centroids.astype(np.float64)
    codes = _assigned(points, centroids, np.zeros(len(centroids)))
    history: list[float] = []
    for _ in range(iterations):
        centroids, shares, codes = _settled(points, codes, centroids)
        history.append(_objective(points, centroids, codes, shares, price))
        codes = _assigned(points, centroids, price * -np.log2(shares))
        history.append(_objective(points, centroids, codes, shares, price))
        if len(history) > 3 and history[-3] - history[-1] <= tolerance * history[-1]:
            break
    if points is not every:
        codes = _assigned(every, centroids, price * -np.log2(shares))
    centroids, shares, codes = _settled(every, codes, centroids)
    history.append(_objective(every, centroids, codes, shares, price))
    order = np.argsort(centroids)
    return Quantized(centroids[order], np.argsort(order)[codes], history)


def uniform(values: ArrayLike, curvature: ArrayLike, step: float) -> Quantized:
    """Values rounded to a multiple of a step; for each multiple stands the weighted mean of its values.

    Args:
        values: w, shape ``(n,)``.
        curvature: h; where all of a bin's are zero its middle stands for it.
        step: the width of a bin.

    Example:
        >>> uniform(np.array([0.1, 0.9, 1.1, 2.0]), np.ones(4), 1.0).centroids.tolist()
        [0.1, 1.0, 2.0]
    """
    w, h = _checked(values, curvature)
    points = _Points(w, h, np.ones(len(w)))
    bins, codes = np.unique(np.rint(w / step), return_inverse=True)
    centroids, shares, codes = _settled(points, codes, bins * step)
    return Quantized(centroids, codes, [_objective(points, centroids, codes, shares, 0.0)])


def entropy(codes: NDArray[np.int64]) -> float:
    """The order-0 entropy of codes, in bits each.

    Example:
        >>> entropy(np.array([0, 0, 1, 2]))
        1.5
    """
    counts = np.bincount(codes)
    shares = counts[counts > 0] / len(codes)
    return float(-(shares * np.log2(shares)).sum())


def _checked(
    values: ArrayLike, curvature: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    w, h = np.asarray(values, np.float64), np.asarray(curvature, np.float64)
    if not (h >= 0).all() or not h.any():
        raise InputError(
            "the curvature is zero for every weight, or negative: calibration samples on which the network "
            "is wrong somewhere are needed. Give more samples."
        )
    return w, h


def _cells(w: NDArray[np.float64], h: NDArray[np.float64]) -> _Points:
    """Values that lie close together and have a curvature of the same octave, as one.

    Close together for what they are: places are ever wider beyond the root of the mean square.
    """
    bent = np.arcsinh(w / np.sqrt(np.mean(w * w)))
    low, high = float(bent.min()), float(bent.max())
    place = ((bent - low) * ((_PLACES - 1) / max(high - low, 1e-300))).astype(np.int64)
    octave = np.minimum(np.frexp(h.max())[1] - np.frexp(h)[1], _OCTAVES - 1)
    cell = place * (_OCTAVES + 1) + np.where(h > 0, octave, _OCTAVES)
    counts, weight = np.bincount(cell), np.bincount(cell, h)
    full, bare = counts > 0, weight == 0
    total = np.bincount(cell, w * np.where(bare[cell], 1.0, h))
    mean = total[full] / np.where(bare, counts, weight)[full]
    return _Points(mean, weight[full] / counts[full], counts[full].astype(np.float64))


def _settled(
    points: _Points, codes: NDArray[np.int64], centroids: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Clusters at the weighted means of their values, their shares, and codes; empty ones are gone.

    What has no weight stands where it stood.
    """
    w, h, counts = points
    shares = np.bincount(codes, counts, minlength=len(centroids)) / counts.sum()
    stays = shares > 0
    codes = (np.cumsum(stays) - 1)[codes]
    weight = np.bincount(codes, counts * h)
    total = np.bincount(codes, counts * h * w)
    means = np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), centroids[stays])
    return means, shares[stays], codes


def _assigned(
    points: _Points, centroids: NDArray[np.float64], lengths: NDArray[np.float64]
) -> NDArray[np.int64]:
    """For each value the cluster of least distortion and length together."""
    codes = np.empty(len(points.w), np.int64)
    for first in range(0, len(codes), _CHUNK):
        part = slice(first, first + _CHUNK)
        cost = points.w[part, None] - centroids
        cost *= cost
        cost *= points.h[part, None]
        cost += lengths
        codes[part] = cost.argmin(axis=1)
    return codes


def _objective(
    points: _Points,
    centroids: NDArray[np.float64],
    codes: NDArray[np.int64],
    shares: NDArray[np.float64],
    price: float,
) -> float:
    """``D + lambda H``, with the lengths that the shares give to the codes."""
    w, h, counts = points
    distortion = (counts * h * (w - centroids[codes]) ** 2).sum()
    lengths = (counts * -np.log2(shares)[codes]).sum()
    return float((distortion + price * lengths) / counts.sum())
