"""Fitting transparent students by other libraries, and laying them out as networks.

An additive student is fitted by the package interpret (explainable boosting machines), trees by scikit-learn.
What they have fitted is copied into arrays, from which the network computes the same.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...architectures.additive import Additive, Curve, Surface
from ...architectures.tree_ensemble import TreeEnsemble
from ...core.optional import optional

Array = NDArray[np.float64]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Boosting:
    """How a student is fitted.

    Attributes:
        learning_rate: of each round; None for the library's default.
        rounds: of an additive student, at most; None for the library's default.
        bags: additive students that are averaged, each on its own part of the samples.
        seed: of everything random.
    """

    learning_rate: float | None = None
    rounds: int | None = None
    bags: int = 8
    seed: int = 0

    def options(self, **more: Any) -> dict[str, Any]:
        """Keyword arguments for a library, without those that it is to choose itself."""
        return {name: value for name, value in more.items() if value is not None}


@dataclass(frozen=True)
class Fitted:
    """A fitted student.

    Attributes:
        predictions: the library's own for the samples that it was fitted on, ``(samples, outputs)``.
        importances: of each term by name: the mean absolute score of an additive model, the share of the
            reduced error of trees; the mean over outputs.
    """

    predictions: Array
    importances: dict[str, float]


# -- additive models ----------------------------------------------------------------------------


def fit_additive(network: Additive, features: Array, scores: Array, how: Boosting) -> Fitted:
    """Fit an explainable boosting machine for each output, and fill the network with them.

    All outputs share the network's pairs: where the machines choose other ones, the most important pairs are
    taken and the machines that lack one are fitted again.

    Args:
        network: gives the number of bins and pairs; filled.
        features: ``(samples, features)``, NaN where missing.
        scores: what to fit by squared error, ``(samples, outputs)``.
        how: settings.
    """

    def fit(output: int, interactions: Any) -> Any:
        return boosted(
            features,
            scores[:, output],
            how,
            interactions=interactions,
            max_bins=network.bins + 2,  # the library counts those of missing and of unknown values
            max_interaction_bins=network.pair_bins + 2,
        )

    machines = [fit(output, network.pairs) for output in range(network.outputs)]
    pairs = common_pairs([_importances(m) for m in machines], network.pairs)
    machines = [
        m if set(pairs) == set(_pairs(m)) else fit(output, pairs or 0)
        for output, m in enumerate(machines)
    ]
    fill_additive(network, machines)
    return Fitted(
        np.stack([m.predict(features) for m in machines], 1),
        _mean_importances([_importances(m) for m in machines]),
    )


def boosted(
    features: Array, target: Array, how: Boosting, *, classify: bool = False, **options: Any
) -> Any:
    """An explainable boosting machine, fitted.

    Raises:
        MissingDependency: the package interpret is not installed.
    """
    glassbox = optional("interpret.glassbox", "interpret-core", "audit", "an additive student")
    kind = "Classifier" if classify else "Regressor"
    machine = getattr(glassbox, f"ExplainableBoosting{kind}")(
        feature_types=["continuous"] * features.shape[1],
        outer_bags=how.bags,
        n_jobs=1,
        random_state=how.seed % 2**31,
        **how.options(learning_rate=how.learning_rate, max_rounds=how.rounds),
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Missing values detected")
        return machine.fit(features, np.ascontiguousarray(target))


def curve_of(machine: Any, feature: int) -> tuple[Array, Array]:
    """Edges and scores of one feature's term, ``(edges,)`` and ``(1 + edges + 1,)``; missing comes first."""
    return np.asarray(machine.bins_[feature][0]), machine.term_scores_[feature][:-1]


def common_pairs(importances: Sequence[dict[tuple[int, ...], float]], count: int) -> list[Pair]:
    """The pairs that matter most to all outputs together.

    Example:
        >>> common_pairs([{(0,): 9.0, (0, 1): 1.0}, {(0, 1): 1.0, (1, 2): 3.0}], 1)
        [(1, 2)]
    """
    total: Counter[Pair] = Counter()
    for each in importances:
        total.update({(t[0], t[1]): value for t, value in each.items() if len(t) == 2})
    return sorted(pair for pair, _ in total.most_common(count))


def fill_additive(network: Additive, machines: Sequence[Any]) -> None:
    """Copy machines, one an output, that agree in bins and pairs."""
    first = machines[0]
    curves = [
        Curve(_tensor(curve_of(first, f)[0]), _stacked([curve_of(m, f)[1] for m in machines]))
        for f in range(network.features)
    ]
    surfaces = [
        Surface(pair, _pair_edges(first, pair), _stacked([_cells(m, pair) for m in machines]))
        for pair in _pairs(first)
    ]
    network.fill(_tensor([float(np.squeeze(m.intercept_)) for m in machines]), curves, surfaces)


def _pairs(machine: Any) -> list[Pair]:
    return [tuple(term) for term in machine.term_features_ if len(term) == 2]


def _pair_edges(machine: Any, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair's bins are coarser than a feature's own, where that has more than one binning."""
    first, second = (_tensor(machine.bins_[f][min(1, len(machine.bins_[f]) - 1)]) for f in pair)
    return first, second


def _cells(machine: Any, pair: Pair) -> Array:
    """A pair's scores without those of unknown values."""
    scores: Array = machine.term_scores_[list(machine.term_features_).index(pair)]
    return scores[:-1, :-1]


def _importances(machine: Any) -> dict[tuple[int, ...], float]:
    values = machine.term_importances()
    return {tuple(t): float(v) for t, v in zip(machine.term_features_, values, strict=True)}


def _mean_importances(found: Sequence[dict[tuple[int, ...], float]]) -> dict[str, float]:
    terms = sorted({term for each in found for term in each}, key=lambda t: (len(t), t))
    return {
        " x ".join(f"feature {f}" for f in term): float(np.mean([e.get(term, 0.0) for e in found]))
        for term in terms
    }


# -- trees --------------------------------------------------------------------------------------


def fit_trees(network: TreeEnsemble, features: Array, scores: Array, how: Boosting) -> Fitted:
    """Boost trees for each output by squared error, and fill the network with them.

    Args:
        network: gives the number of trees and their depth; filled.
        features: ``(samples, features)``, none missing.
        scores: what to fit, ``(samples, outputs)``.
        how: settings; ``rounds`` and ``bags`` are those of additive students.
    """
    ensemble = optional("sklearn.ensemble", "scikit-learn", "data", "a student of trees")
    boosters = [
        ensemble.GradientBoostingRegressor(
            n_estimators=network.trees,
            max_depth=network.depth,
            random_state=how.seed % 2**31,
            **how.options(learning_rate=how.learning_rate),
        ).fit(features, scores[:, output])
        for output in range(network.outputs)
    ]
    fill_trees(network, boosters)
    shares = np.mean([b.feature_importances_ for b in boosters], 0)
    return Fitted(
        np.stack([b.predict(features) for b in boosters], 1),
        {f"feature {f}": float(share) for f, share in enumerate(shares)},
    )


def fill_trees(network: TreeEnsemble, boosters: Sequence[Any]) -> None:
    """Copy boosters, one an output, of the network's depth."""
    laid = [
        [whole_tree(tree.tree_, network.depth) for tree in booster.estimators_[:, 0]]
        for booster in boosters
    ]
    feature, threshold, leaves = (
        torch.from_numpy(np.array([[tree[part] for tree in trees] for trees in laid]))
        for part in range(3)
    )
    rates = _tensor([booster.learning_rate for booster in boosters])
    intercept = _tensor([float(np.squeeze(b.init_.constant_)) for b in boosters])
    network.fill(intercept, feature, threshold, leaves * rates[:, None, None])


def whole_tree(tree: Any, depth: int) -> tuple[NDArray[np.int64], Array, Array]:
    """One of scikit-learn's trees as a whole binary tree.

    A leaf above the last level becomes a part of the tree whose leaves all hold its value and whose nodes
    send everything to their first side.

    Args:
        tree: with ``children_left``, ``children_right``, ``feature``, ``threshold`` and ``value``.
        depth: levels of decisions.

    Returns:
        Features and thresholds of the ``2**depth - 1`` nodes, and the values of the leaves.
    """
    feature = np.zeros(2**depth - 1, np.int64)
    threshold = np.full(2**depth - 1, np.inf)
    place = np.zeros(1, np.int64)  # which of the library's nodes stands at each place of a level
    for level in range(depth):
        inner = tree.children_left[place] >= 0
        here = slice(2**level - 1, 2 ** (level + 1) - 1)
        feature[here] = np.where(inner, tree.feature[place], 0)
        threshold[here] = np.where(inner, tree.threshold[place], np.inf)
        sides = [
            np.where(inner, c[place], place) for c in (tree.children_left, tree.children_right)
        ]
        place = np.stack(sides, 1).ravel()
    return feature, threshold, tree.value[place].reshape(-1)


def _tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, np.float64))


def _stacked(values: Sequence[Array]) -> torch.Tensor:
    return _tensor(np.stack(values))
