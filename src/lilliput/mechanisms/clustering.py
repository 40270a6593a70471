r"""One-dimensional k-means: the shared values that stand for the weights of a layer.

Deep Compression (Han et al. 2016) replaces every weight ``w_i`` by the nearest of ``k`` centroids
and picks the centroids that minimize ``sum_i (w_i - c(i))^2``. Choi et al. (2017, "Towards the
limit of network quantization") weigh each term with a curvature ``h_i`` instead. Both are k-means
on a line, where sorting makes everything cheap: a cluster is an interval of the sorted values, so
a mean is a difference of two running sums and an iteration costs O(k log n), not O(n k).

The surprising rule: **fewer centroids than asked may come back.** A centroid that no value is
nearest to is dropped as soon as Lloyd's iteration finds it empty (``init="linear"`` leaves many
on heavy-tailed weights), and data with at most ``k`` distinct values are returned as they are.
Only ``init="exact"`` always uses all ``k``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lilliput.errors import InputError, UnknownName

Init: TypeAlias = Literal["linear", "density", "random", "exact"]
Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Codes: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]
Indices: TypeAlias = NDArray[np.intp]

MAX_CLUSTERS = 1 << 16  # what a uint16 code can name
EXACT_LIMIT = 1 << 15  # distinct values up to which the dynamic program sees each of them
BINS = 1 << 14  # equal-weight bins, and as many equal-width bins, beyond that
_CHUNK = 1 << 20  # values handled at once, so that temporaries stay in a few megabytes


class Clustering(NamedTuple):
    """Values replaced by shared ones: ``centroids[codes]`` is the approximation.

    Attributes:
        centroids: shape ``[k]``, float32, strictly ascending.
        codes: shape ``[n]``, the index of the centroid nearest to each value (a tie goes to the
            lower one); uint8 up to 256 centroids, uint16 above.
        distortion: the sum (not the mean) of squared errors, each times its weight.
    """

    centroids: Floats
    codes: Codes
    distortion: float


def kmeans(
    values: ArrayLike,
    clusters: int,
    *,
    init: Init = "linear",
    weights: ArrayLike | None = None,
    seed: int = 0,
    iterations: int = 10_000,
    tolerance: float = 0.0,
) -> Clustering:
    """Cluster numbers into at most ``clusters`` shared values.

    Each initialization is followed by Lloyd's iteration. The first three are Deep Compression's:
    ``"linear"`` spaces the centroids evenly on [min, max], ``"density"`` takes the quantiles
    ``(j + 1/2) / k`` of the cumulative distribution, ``"random"`` (Forgy) draws ``k`` distinct
    observed values. ``"exact"`` finds the global optimum by dynamic programming; beyond
    ``EXACT_LIMIT`` distinct values it solves for the best borders among those of fine bins first
    and Lloyd's iteration moves them to their place.

    Args:
        values: shape ``[n]``; rounded to float32.
        clusters: how many centroids at most, 1 to 65536.
        init: the initialization.
        weights: shape ``[n]``, non-negative importance of each value (Choi's ``h_ii``), rounded
            to float32. Every mean, quantile and draw counts a value that many times; a value of
            weight 0 (or below 1e-16 of the total) gets a code and influences nothing. None means
            1 for all.
        seed: for ``init="random"``.
        iterations: the most steps of Lloyd's iteration.
        tolerance: stop when no centroid moves by more than this fraction of the range of the
            values; 0 goes on until no value changes its cluster.

    Returns:
        The centroids, the codes and the distortion.

    Raises:
        InputError: empty, non-finite or misshapen input, negative weights, weights that are all
            zero, or a number of clusters out of range.
        UnknownName: an ``init`` that does not exist.

    Example:
        >>> found = kmeans([-1.0, -0.9, 0.4, 0.5, 0.6], 2)
        >>> found.centroids.tolist(), found.codes.tolist()
        ([-0.949999988079071, 0.5], [0, 0, 1, 1, 1])
    """
    _check_options(clusters, init)
    data, importance = _checked(values, weights)
    points = _aggregate(data, importance)
    if points.values.size <= clusters:
        centroids = points.values
    else:
        start = _initial(points, clusters, init, seed)
        centroids = _lloyd(points, start, iterations, tolerance).astype(np.float32)
    codes = _encode(data, centroids)
    return Clustering(centroids, codes, _squared_error(data, centroids, codes, importance))


def distortion(values: ArrayLike, centroids: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The sum of squared distances to the nearest centroid, each times its weight.

    Args:
        values: shape ``[n]``; rounded to float32.
        centroids: shape ``[k]``, in any order; rounded to float32.
        weights: shape ``[n]``, non-negative; None means 1 for all.

    Raises:
        InputError: as for `kmeans`.

    Example:
        >>> distortion([0.0, 1.0, 4.0], [0.5, 4.0])
        0.5
    """
    data, importance = _checked(values, weights)
    ascending = np.sort(_vector("centroids", centroids))
    return _squared_error(data, ascending, _encode(data, ascending), importance)


class _Points(NamedTuple):
    """Distinct values with running sums: interval ``[a, b)`` weighs ``weight[b] - weight[a]``.

    ``moment`` sums ``weight * (value - center)``: without the shift, values far from zero would
    lose their differences to rounding. Both sums start with 0 and have one entry more.
    """

    values: Floats
    weight: Doubles
    moment: Doubles
    center: float

    def means(self, cuts: Indices) -> Doubles:
        """The mean of each interval between successive cuts, none of them empty."""
        mean = self.center + np.diff(self.moment[cuts]) / np.diff(self.weight[cuts])
        # Rounding in the running sums must not push a mean out of its own interval.
        inside: Doubles = np.clip(mean, self.values[cuts[:-1]], self.values[cuts[1:] - 1])
        return inside


def _aggregate(data: Floats, importance: Floats | None) -> _Points:
    """Sort, merge equal values and leave out those that weigh nothing."""
    order = None if importance is None else np.argsort(data)
    values = np.sort(data) if order is None else data[order]
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))
    values, weight = values[last], np.zeros(last.size + 1)
    if importance is None:
        weight[1:] = last + 1
    else:
        weight[1:] = np.cumsum(importance[order], dtype=np.float64)[last]
        counted = np.diff(weight) > 0
        values, weight = values[counted], weight[np.append(True, counted)]
    center, moment = float(values[values.size // 2]), np.zeros_like(weight)
    np.cumsum(np.diff(weight) * (values - np.float64(center)), out=moment[1:])
    return _Points(values, weight, moment, center)


def _initial(points: _Points, clusters: int, init: Init, seed: int) -> Doubles:
    values, total = points.values, points.weight[-1]
    if init == "linear":
        return np.linspace(float(values[0]), float(values[-1]), clusters)
    if init == "exact":
        return points.means(_optimal_cuts(points, clusters))
    if init == "density":
        levels = (np.arange(clusters) + 0.5) * total / clusters  # whole counts stay exact
        return np.unique(values[np.searchsorted(points.weight[1:], levels)]).astype(np.float64)
    share = np.diff(points.weight) / total
    drawn = np.random.default_rng(seed).choice(values, clusters, replace=False, p=share)
    return np.sort(drawn).astype(np.float64)


def _lloyd(points: _Points, centroids: Doubles, iterations: int, tolerance: float) -> Doubles:
    """Alternate nearest-centroid assignment and means; drop the clusters that come out empty."""
    size = points.values.size
    span = float(points.values[-1]) - float(points.values[0])
    for _ in range(iterations):
        inner = np.searchsorted(points.values, _boundaries(centroids), side="right")
        cuts = np.unique(np.concatenate([[0], inner, [size]]))
        previous, centroids = centroids, points.means(cuts)
        same_count = centroids.size == previous.size
        if same_count and np.abs(centroids - previous).max() <= tolerance * span:
            break
    return centroids


def _boundaries(centroids: Doubles | Floats) -> Floats:
    """The largest float32 of each cluster but the last, so that comparing float32 is exact."""
    middle = (centroids[:-1].astype(np.float64) + centroids[1:]) / 2
    nearest = middle.astype(np.float32)
    return np.where(nearest > middle, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _optimal_cuts(points: _Points, clusters: int) -> Indices:
    """The borders of the best partition into intervals, among all or among those of fine bins.

    Within-cluster and between-cluster sums of squares add up to a constant, so this maximizes
    ``sum_j moment_j^2 / weight_j``. ``gain[b]`` is the best for the values before border ``b``.
    """
    borders = _candidate_borders(points)
    weight, moment = points.weight[borders], points.moment[borders]
    gain = np.zeros(borders.size)
    gain[1:] = moment[1:] ** 2 / weight[1:]
    splits = []
    for _ in range(clusters - 1):
        gain, split = _add_cluster(gain, weight, moment)
        splits.append(split)
    cuts = [borders.size - 1]
    for split in reversed(splits):
        cuts.append(int(split[cuts[-1]]))
    return np.unique(borders[[*cuts, 0]])


def _candidate_borders(points: _Points) -> Indices:
    """Every border, or those of bins that are narrow where values are rare and light elsewhere."""
    size = points.values.size
    if size <= EXACT_LIMIT:
        return np.arange(size + 1)
    first, last = float(points.values[0]), float(points.values[-1])
    widths = np.searchsorted(points.values, np.linspace(first, last, BINS, dtype=np.float32))
    masses = np.searchsorted(points.weight, np.linspace(0, points.weight[-1], BINS))
    return np.unique(np.concatenate([widths, masses, [0, size]]))


def _add_cluster(gain: Doubles, weight: Doubles, moment: Doubles) -> tuple[Doubles, Indices]:
    """One layer of the dynamic program: the best gain with one cluster more, and its last border.

    The best last border never moves left as the end moves right (the cost obeys the quadrangle
    inequality), so the ends are solved in the order of a bisection and each one searches only
    between the answers of its neighbors: O(n log n) for all ends, each level in one sweep.
    """
    ends = gain.size - 1
    better = np.zeros_like(gain)
    split = np.zeros(gain.size, dtype=np.intp)
    step = 1 << (ends.bit_length() - 1)
    while step:
        rows = np.arange(step, ends + 1, 2 * step)
        after = rows + step
        high = np.where(after <= ends, split[np.minimum(after, ends)], ends)
        low, high = split[rows - step], np.minimum(high, rows - 1)
        better[rows], split[rows] = _best_split(rows, low, high, gain, weight, moment)
        step //= 2
    return better, split


def _best_split(
    rows: Indices, low: Indices, high: Indices, gain: Doubles, weight: Doubles, moment: Doubles
) -> tuple[Doubles, Indices]:
    """For each end in ``rows``, the best border in ``low..high``, all ranges laid end to end."""
    counts = high - low + 1
    first = np.cumsum(counts) - counts
    border = np.arange(counts.sum()) - np.repeat(first - low, counts)
    value = np.repeat(moment[rows], counts) - moment[border]
    value *= value
    value /= np.repeat(weight[rows], counts) - weight[border]
    value += gain[border]
    best = np.maximum.reduceat(value, first)
    hits = np.flatnonzero(value == np.repeat(best, counts))
    return best, border[hits[np.searchsorted(hits, first)]]


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, size, _CHUNK))


def _encode(data: Floats, centroids: Floats) -> Codes:
    boundaries = _boundaries(centroids)
    small, size = centroids.size <= 256, data.size
    codes: Codes = np.empty(size, np.uint8) if small else np.empty(size, np.uint16)
    for part in _chunks(size):
        codes[part] = np.searchsorted(boundaries, data[part])
    return codes


def _squared_error(
    data: Floats, centroids: Floats, codes: Codes, importance: Floats | None
) -> float:
    exact, total = centroids.astype(np.float64), 0.0
    for part in _chunks(data.size):
        error = data[part] - exact[codes[part]]
        error *= error
        total += float(error.sum() if importance is None else error @ importance[part])
    return total


def _check_options(clusters: int, init: str) -> None:
    if init not in get_args(Init):
        raise UnknownName("initialization of k-means", init, get_args(Init))
    if not 1 <= clusters <= MAX_CLUSTERS:
        raise InputError(
            f"k-means was asked for {clusters} clusters; the number must be 1 to {MAX_CLUSTERS}, "
            "because codes have at most 16 bits. Give a number in that range."
        )


def _checked(values: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats | None]:
    data = _vector("values", values)
    if weights is None:
        return data, None
    importance = _vector("weights", weights)
    if importance.shape != data.shape:
        raise InputError(
            f"k-means has {data.size} values but {importance.size} weights. "
            "Give one weight for each value, or weights=None."
        )
    if importance.min() < 0 or importance.max() == 0:
        raise InputError(
            f"The weights of k-means run from {importance.min():g} to {importance.max():g}; they "
            "must be non-negative and not all zero. Clamp a curvature that is negative."
        )
    return data, importance


def _vector(name: str, data: ArrayLike) -> Floats:
    with np.errstate(over="ignore"):  # a double beyond float32 becomes inf and is reported below
        vector = np.asarray(data, dtype=np.float32)
    if vector.ndim != 1 or vector.size == 0:
        raise InputError(
            f"The {name} of k-means have shape {list(vector.shape)}; one non-empty dimension is "
            "needed. Flatten the array, and leave out a layer that has no weights."
        )
    finite = np.isfinite(vector)
    if not finite.all():
        where = int(np.argmin(finite))
        raise InputError(
            f"The {name} of k-means hold {vector.size - int(finite.sum())} numbers that are not "
            f"finite in float32, the first at index {where} ({vector[where]}). Find where the "
            "training diverged, or leave those entries out."
        )
    return vector
