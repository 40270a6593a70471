"""Distill-and-Compare: a student of a teacher's scores beside a model of true outcomes.

The surprising rule: the teacher must not have been trained on these very samples. What it has learned by
heart would correlate the errors of both models, as a missing feature does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...core.optional import optional
from ...errors import InputError, LilliputWarning
from ._boosting import Array, Boosting, boosted, curve_of

_FOLDS = 5


@dataclass(frozen=True)
class Difference:
    """How differently a feature acts on the teacher's scores and on the outcomes.

    Attributes:
        feature: its name.
        grid: values of the feature at which the curves are given, ascending; the last is NaN where some
            samples lack the feature.
        share: of the samples that each of them stands for.
        teacher: the student's curve, on the scale of the outcomes; its mean over the samples is 0.
        outcome: the curve of the model of outcomes.
        difference: ``teacher - outcome``.
        low: end of the confidence interval of the difference, point by point.
        high: its other end.
    """

    feature: str
    grid: Array
    share: Array
    teacher: Array
    outcome: Array
    difference: Array
    low: Array
    high: Array

    @property
    def significant(self) -> NDArray[np.bool_]:
        """At which points the interval does not hold zero."""
        return (self.low > 0) | (self.high < 0)

    @property
    def size(self) -> float:
        """Root of the mean square of the difference over the samples."""
        return float(np.sqrt(self.share @ self.difference**2))


@dataclass(frozen=True)
class Audit:
    """What :func:`compare` finds.

    Attributes:
        differences: one a feature.
        fidelity: correlation of the student with the teacher's scores, on samples that it was not fitted on.
        accuracy: of the model of outcomes on such samples: the area under the ROC curve of binary ones,
            else the correlation.
        correlation: Pearson's, between both models' errors on such samples.
        low: end of its confidence interval.
        high: its other end.
        rank_correlation: Spearman's, between the same errors.
        confidence: of all intervals.
    """

    differences: tuple[Difference, ...]
    fidelity: float
    accuracy: float
    correlation: float
    low: float
    high: float
    rank_correlation: float
    confidence: float

    @property
    def lacks_features(self) -> bool:
        """Whether the data lack something that the teacher has seen and that matters to the outcomes."""
        return self.low > 0

    def summary(self) -> str:
        """The findings in words, the largest differences first."""
        percent = f"{100 * self.confidence:g} %"
        lines = [
            f"student of the scores: correlation {self.fidelity:.3f}; model of outcomes: {self.accuracy:.3f} "
            "(both on samples held out)",
            f"errors of both: correlation {self.correlation:.3f}, {percent} interval {self.low:.3f} to "
            f"{self.high:.3f}: "
            + (
                "the data likely lack features"
                if self.lacks_features
                else "no sign of missing features"
            ),
        ]
        for found in sorted(self.differences, key=lambda d: -d.size):
            at = found.grid[found.significant]
            where = "nowhere beyond chance"
            if len(at):
                where = "beyond chance at " + ", ".join(
                    "missing" if np.isnan(value) else f"{value:.4g}" for value in at
                )
            lines.append(f"{found.feature}: differs by {found.size:.3f}, {where}")
        return "\n".join(lines)


def compare(
    teacher_scores: ArrayLike,
    outcomes: ArrayLike,
    features: ArrayLike,
    *,
    names: Sequence[str] | None = None,
    points: int = 12,
    pairs: int = 0,
    bins: int = 32,
    learning_rate: float | None = None,
    rounds: int | None = None,
    bags: int = 4,
    bootstraps: int = 50,
    confidence: float = 0.95,
    calibrate: bool = True,
    seed: int = 0,
) -> Audit:
    """Compare what a black box makes of features with what the outcomes say of them.

    Two additive models of one kind are fitted on the same samples: a student of the teacher's scores by
    squared error, and a model of the outcomes, by squared error or, for outcomes 0 and 1, by log-loss. Their
    curves, feature by feature, are compared on a grid; intervals come from fitting both anew on samples drawn
    with replacement (normal intervals, point by point; each model is a mean over ``bags``, as in the
    bootstrap of little bags that the paper's first version names, whose bias correction is left out).

    So that the scales agree, scores are first mapped to the outcomes by one straight line: to the log-odds
    of binary outcomes by logistic regression, else by least squares. The paper calibrates too; how was not
    at hand.

    The test for missing features takes both models' errors on samples held out (five folds): a feature that
    the teacher and the outcomes know and the data lack moves both errors in one direction. So does, weakly,
    what both models cannot express: give ``pairs`` where features interact, and read a small correlation of
    scores without noise as the roughness of the curves.

    Args:
        teacher_scores: ``(samples,)``, of a teacher that was not trained on these samples.
        outcomes: ``(samples,)``, 0 and 1 or real numbers.
        features: ``(samples, features)``, NaN where missing.
        names: of the features.
        points: of each curve, at most; they are quantiles.
        pairs: of features with terms of their own, in both models; they are not compared.
        bins: of a feature, at most.
        learning_rate: of each round of boosting; None for the library's default.
        rounds: of boosting, at most; None for the library's default.
        bags: models that are averaged in each fit.
        bootstraps: fits for the intervals.
        confidence: of the intervals.
        calibrate: whether to map scores to the scale of outcomes.
        seed: of everything random.

    Raises:
        InputError: the arrays do not fit each other, are too short, or outcomes are of more than two classes.
        MissingDependency: the package interpret is not installed.

    Example:
        >>> compare([0.1, 0.2], [0, 1, 1], [[1.0], [2.0]])
        Traceback (most recent call last):
            ...
        lilliput.errors.InputError: compare: 2 scores, 3 outcomes and features (2, 1) do not fit: ...
    """
    data = _checked(teacher_scores, outcomes, features, names, confidence, bootstraps)
    how = Boosting(learning_rate, rounds, bags, seed)
    models = _Models(data.binary, calibrate, how, {"interactions": pairs, "max_bins": bins + 2})
    grids = [_grid(column, points) for column in data.features.T]
    whole = models.curves(data, np.arange(len(data.scores)), grids)
    drawn = [models.curves(data, rows, grids) for rows in _resampled(data, bootstraps, seed)]
    width = _normal_quantile(confidence)
    found = []
    for number, (grid, share) in enumerate(grids):
        teacher, outcome = whole[0][number], whole[1][number]
        again = np.stack([t[number] - o[number] for t, o in drawn])
        reach = width * again.std(0, ddof=1)
        apart = teacher - outcome
        found.append(
            Difference(
                data.names[number],
                grid,
                share,
                teacher,
                outcome,
                apart,
                apart - reach,
                apart + reach,
            )
        )
    return Audit(tuple(found), **models.held_out(data, confidence, seed), confidence=confidence)


@dataclass(frozen=True)
class _Data:
    """The checked arrays."""

    scores: Array
    outcomes: Array
    features: Array
    names: Sequence[str]
    binary: bool


@dataclass(frozen=True)
class _Models:
    """Both models of the comparison, and how they are fitted."""

    binary: bool
    calibrate: bool
    how: Boosting
    options: dict[str, Any]

    def fit(
        self, data: _Data, rows: NDArray[np.int64]
    ) -> tuple[Any, Any, Callable[[Array], Array]]:
        """A student of the scores, a model of the outcomes, and the scores' calibration."""
        features, outcomes = data.features[rows], data.outcomes[rows]
        line = _line(data.scores[rows], outcomes, self.binary) if self.calibrate else (0.0, 1.0)

        def calibrated(scores: Array) -> Array:
            return line[0] + line[1] * scores

        student = boosted(features, calibrated(data.scores[rows]), self.how, **self.options)
        model = boosted(features, outcomes, self.how, classify=self.binary, **self.options)
        return student, model, calibrated

    def curves(self, data: _Data, rows: NDArray[np.int64], grids: Any) -> tuple[Any, Any]:
        """Of both models all curves on the grids, with mean 0."""
        student, model, _ = self.fit(data, rows)
        found = [
            [_centered(_at(*curve_of(m, f), grid), share) for f, (grid, share) in enumerate(grids)]
            for m in (student, model)
        ]
        return found[0], found[1]

    def held_out(self, data: _Data, confidence: float, seed: int) -> dict[str, float]:
        """How good both models are on samples held out, and how their errors are correlated."""
        from scipy import stats  # takes half a second, which only an audit should cost

        order = np.random.default_rng(seed).permutation(len(data.scores))
        if self.binary:  # every fold gets its part of both classes
            order = order[np.argsort(data.outcomes[order], kind="stable")]
        wanted, said, predicted = (np.zeros(len(order)) for _ in range(3))
        for fold in range(_FOLDS):
            out = order[fold::_FOLDS]
            rows = np.setdiff1d(order, out)
            student, model, calibrated = self.fit(data, rows)
            wanted[out] = calibrated(data.scores[out])
            said[out] = student.predict(data.features[out])
            predicted[out] = _predicted(model, data.features[out], self.binary)
        errors = wanted - said, data.outcomes - predicted
        pearson = stats.pearsonr(*errors)
        interval = pearson.confidence_interval(confidence)
        good = _area if self.binary else _correlation
        return {
            "fidelity": _correlation(wanted, said),
            "accuracy": good(data.outcomes, predicted),
            "correlation": float(pearson.statistic),
            "low": float(interval.low),
            "high": float(interval.high),
            "rank_correlation": float(stats.spearmanr(*errors).statistic),
        }


def _checked(
    scores: Any, outcomes: Any, features: Any, names: Any, confidence: float, bootstraps: int
) -> _Data:
    kind = np.asarray(outcomes).dtype.kind
    scores, outcomes, features = (np.asarray(a, np.float64) for a in (scores, outcomes, features))
    if features.ndim != 2 or not scores.shape == outcomes.shape == features.shape[:1]:
        raise InputError(
            f"compare: {scores.size} scores, {outcomes.size} outcomes and features {features.shape} do not "
            "fit: give (samples,), (samples,) and (samples, features)."
        )
    names = names or [f"feature {number}" for number in range(features.shape[1])]
    if len(names) != features.shape[1]:
        raise InputError(f"compare: {len(names)} names for {features.shape[1]} features.")
    _refuse_missing(features, names)
    if not (np.isfinite(scores).all() and np.isfinite(outcomes).all()):
        raise InputError("compare: a score or an outcome is not finite: leave those samples out.")
    if not 0 < confidence < 1 or bootstraps < 2:
        raise InputError(
            f"compare: confidence={confidence}, bootstraps={bootstraps}: give a confidence between 0 and 1, "
            "and at least 2 bootstraps."
        )
    values = np.unique(outcomes)
    binary = bool(np.isin(values, (0, 1)).all())
    if kind in "iub" and not binary:
        raise InputError(
            f"compare: the outcomes are {len(values)} classes. Compare one class with the rest (0 and 1), or "
            "give real numbers for a regression."
        )
    if len(values) < 2:
        raise InputError("compare: all outcomes are the same: there is nothing to model.")
    rarest = min((outcomes == value).sum() for value in values) if binary else 2
    if len(scores) < 2 * _FOLDS or rarest < 2:
        raise InputError(
            f"compare: {len(scores)} samples, {rarest} of the rarest outcome, are too few to hold some out: "
            f"give at least {2 * _FOLDS}, and 2 of each class."
        )
    _warn_of_constants(features, names)
    return _Data(scores, outcomes, features, names, binary)


def _refuse_missing(features: Array, names: Sequence[str]) -> None:
    lost = [name for name, c in zip(names, features.T, strict=True) if np.isnan(c).all()]
    if lost:
        raise InputError(
            f"compare: {', '.join(lost[:10])} is missing in all samples: leave it out."
        )


def _warn_of_constants(features: Array, names: Sequence[str]) -> None:
    constant = [name for name, c in zip(names, features.T, strict=True) if len(np.unique(c)) == 1]
    if constant:
        warnings.warn(
            f"compare: {', '.join(constant[:10])} is the same in all samples: its curve is flat.",
            LilliputWarning,
            stacklevel=3,
        )


def _grid(column: Array, points: int) -> tuple[Array, Array]:
    """Values that stand for equally many samples each, and the samples' shares; missing comes last."""
    known = np.sort(column[~np.isnan(column)])
    parts = np.array_split(known, min(points, len(np.unique(known))))
    grid, place = np.unique([part[len(part) // 2] for part in parts], return_inverse=True)
    share = np.bincount(place, [len(part) for part in parts])
    if len(known) < len(column):
        grid, share = np.append(grid, np.nan), np.append(share, len(column) - len(known))
    return grid, share / len(column)


def _at(edges: Array, scores: Array, grid: Array) -> Array:
    """A curve's values; a value equal to an edge belongs to the bin above it."""
    place = np.searchsorted(edges, grid, side="right") + 1
    curve: Array = scores[np.where(np.isnan(grid), 0, place)]
    return curve


def _centered(curve: Array, share: Array) -> Array:
    return curve - share @ curve


def _resampled(data: _Data, count: int, seed: int) -> list[NDArray[np.int64]]:
    """Rows drawn with replacement; of binary outcomes both classes are always there."""
    generator = np.random.default_rng((seed, 1))
    drawn: list[NDArray[np.int64]] = []
    while len(drawn) < count:
        rows = generator.integers(0, len(data.scores), len(data.scores))
        if not data.binary or len(np.unique(data.outcomes[rows])) == 2:
            drawn.append(rows)
    return drawn


def _line(scores: Array, outcomes: Array, binary: bool) -> tuple[float, float]:
    """Intercept and slope that map scores to outcomes, or to their log-odds."""
    if np.ptp(scores) == 0:
        raise InputError("compare: all scores are the same: there is nothing to explain.")
    if not binary:
        slope, intercept = np.polyfit(scores, outcomes, 1)
        return float(intercept), float(slope)
    linear = optional("sklearn.linear_model", "scikit-learn", "data", "compare")
    fitted = linear.LogisticRegression(C=1e6).fit(_scaled(scores)[:, None], outcomes)
    slope = fitted.coef_[0, 0] / scores.std()
    return float(fitted.intercept_[0] - slope * scores.mean()), float(slope)


def _scaled(scores: Array) -> Array:
    scaled: Array = (scores - scores.mean()) / scores.std()
    return scaled


def _predicted(model: Any, features: Array, binary: bool) -> Array:
    found: Array = model.predict_proba(features)[:, 1] if binary else model.predict(features)
    return found


def _correlation(a: Array, b: Array) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _area(outcomes: Array, predicted: Array) -> float:
    """Area under the ROC curve: the share of pairs of samples that are in the right order."""
    from scipy import stats

    positive = outcomes == 1
    count = positive.sum()
    ranks = stats.rankdata(predicted)[positive].sum() - count * (count + 1) / 2
    return float(ranks / (count * (len(outcomes) - count)))


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
