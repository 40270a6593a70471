"""One-dimensional k-means against brute force, plain dynamic programming and naive Lloyd."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lilliput.errors import InputError, UnknownName
from lilliput.mechanisms import clustering
from lilliput.mechanisms.clustering import Init, distortion, kmeans

Doubles = NDArray[np.float64]

DRAWS = ["gaussian", "laplace", "trained", "bimodal", "student"]
seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-8, 8, width=16)


def draw(kind: str, size: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        values = rng.normal(0, 0.05, size)
    elif kind == "laplace":
        values = rng.laplace(0, 0.02, size)
    elif kind == "trained":  # pruned layer: no small weights, two tails of unequal scale
        values = rng.choice([-1, 1], size) * 0.03 + rng.normal(0.004, 0.02, size)
        values = np.where(np.abs(values) < 0.02, np.sign(values) * 0.02 + values, values)
    elif kind == "bimodal":
        values = np.where(
            rng.random(size) < 0.3, rng.normal(-1, 0.1, size), rng.normal(1, 0.2, size)
        )
    else:
        values = rng.standard_t(2, size)
    return values.astype(np.float32)


def draw_weights(size: int, seed: int) -> NDArray[np.float32]:
    """Curvatures: spread over orders of magnitude, a tenth of them zero, never all."""
    rng = np.random.default_rng(seed + 1)
    weights = np.exp(rng.normal(0, 1.5, size)) * (rng.random(size) > 0.1)
    weights[0] = 1
    return weights.astype(np.float32)


def interval_cost(values: Doubles, weights: Doubles) -> float:
    if weights.sum() == 0:
        return 0.0
    return float(weights @ (values - np.average(values, weights=weights)) ** 2)


def brute_force(values: Doubles, weights: Doubles, clusters: int) -> float:
    """The best partition of the sorted values into at most ``clusters`` intervals: try them all."""
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    best = np.inf
    for borders in combinations(range(1, values.size), min(clusters, values.size) - 1):
        parts = zip(np.split(values, borders), np.split(weights, borders), strict=True)
        best = min(best, sum(interval_cost(v, w) for v, w in parts))
    return best


def plain_program(values: Doubles, weights: Doubles, clusters: int) -> float:
    """The textbook O(k n^2) recursion with all interval costs tabulated, no monotonicity used."""
    order = np.argsort(values)
    values, weights = values[order] - values.mean(), weights[order]
    sums = [np.concatenate([[0], np.cumsum(weights * values**p)]) for p in (0, 1, 2)]
    w, m, q = (s[None, :] - s[:, None] for s in sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(w > 0, q - m**2 / w, 0)
    cost[np.tril_indices(values.size + 1, -1)] = np.inf
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


def naive_lloyd(values: Doubles, weights: Doubles, centroids: Doubles) -> Doubles:
    """Every distance computed; a cluster without weight is dropped."""
    for _ in range(10_000):
        codes = np.abs(values[:, None] - centroids).argmin(axis=1)
        used = [j for j in range(centroids.size) if weights[codes == j].sum() > 0]
        means = [np.average(values[codes == j], weights=weights[codes == j]) for j in used]
        previous, centroids = centroids, np.array(means)
        if np.array_equal(previous, centroids):
            return centroids
    raise AssertionError("the naive iteration did not converge")


def naive_initial(values: Doubles, weights: Doubles, clusters: int, init: Init) -> Doubles:
    values, weights = values[weights > 0], weights[weights > 0]
    if init == "linear":
        return np.linspace(values.min(), values.max(), clusters)
    order = np.argsort(values)
    count = np.cumsum(weights[order])  # multiplied out: a level that meets a whole count is exact
    reached = [2 * clusters * count >= (2 * j + 1) * count[-1] for j in range(clusters)]
    return np.unique([values[order][np.argmax(above)] for above in reached])


# The exact optimum


@given(st.lists(numbers, min_size=1, max_size=9), st.integers(1, 5), st.booleans(), seeds)
@settings(max_examples=80, deadline=None)
def test_exact_is_the_best_of_all_partitions(
    values: list[float], clusters: int, weighted: bool, seed: int
) -> None:
    data = np.array(values)
    weights = draw_weights(data.size, seed) if weighted else np.ones(data.size, np.float32)
    found = kmeans(data, clusters, init="exact", weights=weights if weighted else None)
    best = brute_force(data, weights.astype(np.float64), clusters)
    assert found.distortion == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert found.centroids.size <= clusters


@given(st.sampled_from(DRAWS), st.integers(2, 300), st.integers(1, 40), st.booleans(), seeds)
@settings(max_examples=60, deadline=None)
def test_exact_equals_plain_dynamic_programming(
    kind: str, size: int, clusters: int, weighted: bool, seed: int
) -> None:
    values = draw(kind, size, seed)
    weights = draw_weights(size, seed) if weighted else None
    found = kmeans(values, clusters, init="exact", weights=weights)
    h = np.ones(size) if weights is None else weights.astype(np.float64)
    best = plain_program(values.astype(np.float64), h, clusters)
    scale = float(h @ values.astype(np.float64) ** 2)
    assert found.distortion == pytest.approx(best, rel=1e-5, abs=1e-12 * scale)
    assert found.centroids.size == min(clusters, np.unique(values[h > 0]).size)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", DRAWS)
def test_bins_come_within_a_thousandth_of_the_optimum(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = draw(kind, 40_000, seed=3)
    weights = draw_weights(values.size, seed=3) if weighted else None
    assert np.unique(values).size > clustering.EXACT_LIMIT
    binned = kmeans(values, 32, init="exact", weights=weights)
    monkeypatch.setattr(clustering, "EXACT_LIMIT", values.size)
    optimum = kmeans(values, 32, init="exact", weights=weights)
    assert optimum.distortion <= binned.distortion * (1 + 1e-9)
    assert binned.distortion <= optimum.distortion * 1.001


@pytest.mark.parametrize("kind", DRAWS)
def test_coarse_bins_against_plain_dynamic_programming(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "EXACT_LIMIT", 0)
    monkeypatch.setattr(clustering, "BINS", 256)
    values = draw(kind, 1500, seed=5)
    best = plain_program(values.astype(np.float64), np.ones(values.size), 12)
    assert kmeans(values, 12, init="exact").distortion <= 1.001 * best


def test_bins_survive_an_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.append(draw("gaussian", 40_000, seed=6), np.float32(1e4))
    binned = kmeans(values, 32, init="exact")
    monkeypatch.setattr(clustering, "EXACT_LIMIT", values.size)
    assert binned.distortion <= 1.001 * kmeans(values, 32, init="exact").distortion


# Lloyd's iteration


@pytest.mark.parametrize("init", ["linear", "density", "random"])
@given(st.sampled_from(DRAWS), st.integers(20, 200), st.integers(1, 19), st.booleans(), seeds)
@settings(max_examples=40, deadline=None)
def test_lloyd_equals_the_naive_iteration(
    init: Init, kind: str, size: int, clusters: int, weighted: bool, seed: int
) -> None:
    values = draw(kind, size, seed)
    weights = draw_weights(size, seed) if weighted else None
    h = np.ones(size) if weights is None else weights.astype(np.float64)
    if np.unique(values[h > 0]).size <= clusters:
        return
    exact = values.astype(np.float64)
    if init == "random":
        drawn = kmeans(values, clusters, init=init, weights=weights, seed=seed, iterations=0)
        assert np.isin(drawn.centroids, values[h > 0]).all()
        assert drawn.centroids.size == clusters
        start = drawn.centroids.astype(np.float64)
    else:
        start = naive_initial(exact, h, clusters, init)
    found = kmeans(values, clusters, init=init, weights=weights, seed=seed)
    expected = naive_lloyd(exact, h, start)
    np.testing.assert_allclose(found.centroids, expected, rtol=1e-5, atol=1e-7)


@given(st.sampled_from(DRAWS), st.sampled_from(["linear", "density", "random"]), seeds)
@settings(max_examples=20, deadline=None)
def test_no_step_increases_the_distortion(kind: str, init: Init, seed: int) -> None:
    values = draw(kind, 500, seed)
    steps = [kmeans(values, 8, init=init, seed=seed, iterations=i).distortion for i in range(8)]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(steps))


def test_empty_clusters_are_dropped() -> None:
    # The start is 0, 2.5, 5, 7.5, 10: nothing lies next to the third and the fourth.
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 10.0]
    assert kmeans(values, 5, init="linear").centroids.tolist() == [0.5, 1.75, 10.0]
    assert kmeans(values, 5, init="exact").centroids.size == 5


def test_random_follows_its_seed_and_the_weights() -> None:
    values = draw("gaussian", 1000, seed=0)
    first, again, other = (
        kmeans(values, 8, init="random", seed=s, iterations=0).centroids for s in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    heavy = np.where(np.arange(1000) == 17, 1e9, 1)
    drawn = kmeans(values, 2, init="random", weights=heavy, iterations=0).centroids
    assert values[17] in drawn


def test_tolerance_stops_early() -> None:
    values = draw("laplace", 5000, seed=0)
    loose = kmeans(values, 16, init="random", tolerance=1.0)
    assert loose.distortion == kmeans(values, 16, init="random", iterations=1).distortion
    assert loose.distortion > kmeans(values, 16, init="random").distortion


def test_tolerance_is_a_fraction_of_the_range() -> None:
    values = draw("laplace", 5000, seed=0)
    large = kmeans(values, 16, tolerance=1e-3).centroids
    small = kmeans(values / 1024, 16, tolerance=1e-3).centroids
    assert np.array_equal(large, small * 1024)


def test_a_tie_goes_to_the_lower_cluster_while_iterating() -> None:
    assert kmeans([0.0, 2.0, 4.0], 2, init="linear").centroids.tolist() == [1.0, 4.0]


# Weights


@given(st.sampled_from(DRAWS), st.sampled_from(["linear", "density", "random", "exact"]), seeds)
@settings(max_examples=20, deadline=None)
def test_equal_weights_are_no_weights(kind: str, init: Init, seed: int) -> None:
    values = draw(kind, 200, seed)
    plain = kmeans(values, 7, init=init, seed=seed)
    weighted = kmeans(values, 7, init=init, seed=seed, weights=np.ones(200))
    assert np.array_equal(plain.centroids, weighted.centroids)
    assert plain.distortion == pytest.approx(weighted.distortion, rel=1e-12)


@pytest.mark.parametrize("init", ["linear", "density", "exact"])
@given(st.lists(st.tuples(numbers, st.integers(0, 4)), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_an_integer_weight_repeats_its_value(init: Init, pairs: list[tuple[float, int]]) -> None:
    values, times = np.array([v for v, _ in pairs]), np.array([t for _, t in pairs])
    if times.sum() == 0:
        return
    weighted = kmeans(values, 3, init=init, weights=times)
    repeated = kmeans(np.repeat(values, times), 3, init=init)
    np.testing.assert_array_equal(weighted.centroids, repeated.centroids)
    assert weighted.distortion == pytest.approx(repeated.distortion, rel=1e-9)


@pytest.mark.parametrize("init", ["linear", "density", "random", "exact"])
def test_a_value_of_weight_zero_moves_no_centroid(init: Init) -> None:
    values = draw("bimodal", 400, seed=2)
    alone = kmeans(values, 6, init=init)
    outliers = np.array([-100.0, 0.01, 100.0], np.float32)
    weights = np.concatenate([np.ones(400), np.zeros(3)])
    beside = kmeans(np.concatenate([values, outliers]), 6, init=init, weights=weights)
    assert np.array_equal(alone.centroids, beside.centroids)
    assert beside.codes[-3] == 0
    assert beside.codes[-1] == beside.centroids.size - 1


def test_weights_of_very_different_size() -> None:
    found = kmeans([0.0, 1.0, 2.0, 3.0], 2, init="exact", weights=[1e-30, 1e30, 1e-30, 1.0])
    assert np.isfinite(found.centroids).all()
    assert 1.0 in found.centroids


def test_a_light_value_alone_in_its_cluster_is_kept() -> None:
    values = np.append(draw("gaussian", 1000, seed=0) + 1, np.float32(3.7))
    weights = np.append(np.ones(1000), 1e-11)
    assert kmeans(values, 2, init="linear", weights=weights).centroids[-1] == np.float32(3.7)


# Codes, distortion, extreme data


@given(st.lists(numbers, min_size=1, max_size=60), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_codes_name_the_nearest_centroid(values: list[float], clusters: int) -> None:
    found = kmeans(values, clusters)
    data, centroids = np.array(values), found.centroids.astype(np.float64)
    distance = np.abs(data[:, None] - centroids)
    assert np.array_equal(found.codes, distance.argmin(axis=1))  # argmin: a tie goes to the lower
    assert (np.diff(found.centroids) > 0).all()
    assert found.distortion == pytest.approx(float((distance.min(axis=1) ** 2).sum()), rel=1e-9)
    assert distortion(values, found.centroids[::-1]) == found.distortion


def test_a_tie_goes_to_the_lower_centroid() -> None:
    # After one step the centroids are 0 and 4, and 2 lies in the middle.
    found = kmeans([0.0, 2.0, 4.0], 2, weights=[1.0, 0.0, 1.0])
    assert found.centroids.tolist() == [0.0, 4.0]
    assert found.codes.tolist() == [0, 0, 1]


def test_neighboring_floats_are_told_apart() -> None:
    # Halfway between them rounds up to the second one, which must not fall to the first.
    ulp = 2.0**-23
    assert kmeans([1 + ulp, 1 + 2 * ulp], 2).codes.tolist() == [0, 1]


def test_distortion_counts_weights() -> None:
    assert distortion([0.0, 1.0, 4.0], [4.0, 0.5], weights=[2.0, 4.0, 9.0]) == 1.5


@pytest.mark.parametrize("init", ["linear", "density", "random", "exact"])
@pytest.mark.parametrize(("count", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2")])
def test_few_distinct_values_are_kept_exactly(init: Init, count: int, dtype: str) -> None:
    values = np.random.default_rng(0).permutation(np.repeat(np.arange(count) / 7, 3))
    found = kmeans(values, 300, init=init)
    assert found.distortion == 0
    assert found.codes.dtype == dtype
    assert np.array_equal(found.centroids[found.codes], values.astype(np.float32))


def test_values_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw("gaussian", 1000, seed=1)
    whole = kmeans(values, 9)
    monkeypatch.setattr(clustering, "_CHUNK", 64)
    parts = kmeans(values, 9)
    assert np.array_equal(whole.codes, parts.codes)
    assert whole.distortion == pytest.approx(parts.distortion, rel=1e-12)


@pytest.mark.parametrize("init", ["linear", "density", "random", "exact"])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes(init: Init, scale: float) -> None:
    values = np.linspace(-1, 1, 50) * scale
    found = kmeans(values, 4, init=init)
    assert np.isfinite(found.centroids).all()
    assert np.isfinite(found.distortion)
    assert (np.diff(found.centroids) > 0).all()


def test_values_far_from_zero_keep_their_differences() -> None:
    near = np.random.default_rng(4).integers(0, 4096, 2000).astype(np.float64)
    best = plain_program(near, np.ones(2000), 6)
    assert kmeans(near + 2**23, 6, init="exact").distortion == pytest.approx(best, rel=1e-3)


# Bad input


@pytest.mark.parametrize(
    ("values", "clusters", "weights", "message"),
    [
        ([], 4, None, "non-empty"),
        ([[1.0, 2.0]], 4, None, r"shape \[1, 2\]"),
        ([1.0, np.nan], 4, None, "index 1"),
        ([np.inf, 1.0], 4, None, "index 0"),
        ([1e39, 1.0], 4, None, "not finite in float32"),
        ([1.0], 0, None, "asked for 0 clusters"),
        ([1.0], 65_537, None, "1 to 65536"),
        ([1.0, 2.0], 2, [1.0], "2 values but 1 weights"),
        ([1.0, 2.0], 2, [1.0, -1.0], "non-negative"),
        ([1.0, 2.0], 2, [0.0, 0.0], "not all zero"),
        ([1.0, 2.0], 2, [1.0, np.nan], "weights of k-means"),
    ],
)
def test_bad_input_is_refused(
    values: list[float], clusters: int, weights: list[float] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        kmeans(values, clusters, weights=weights)


def test_unknown_initialization_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'linear'"):
        kmeans([1.0], 1, init="liner")  # type: ignore[arg-type]


def test_distortion_refuses_no_centroids() -> None:
    with pytest.raises(InputError, match="centroids"):
        distortion([1.0], [])
