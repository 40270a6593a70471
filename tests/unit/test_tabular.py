"""The tables that come with scikit-learn, as tasks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lilliput.core.task import Task, evaluate
from lilliput.errors import InputError, MissingDependency
from lilliput.tasks.tabular import VarianceExplained, breast_cancer, diabetes

metrics = pytest.importorskip("sklearn.metrics")

TASKS = [(diabetes, 442, 10), (breast_cancer, 569, 30)]


@pytest.mark.parametrize(("make", "rows", "features"), TASKS)
def test_parts_are_the_whole_table(make: Callable[..., Task], rows: int, features: int) -> None:
    task = make()
    parts = [task.train.inputs, task.validation.inputs, task.test.inputs]  # type: ignore[union-attr, attr-defined]
    together = torch.cat(parts)
    assert together.shape == (rows, features)
    assert len({tuple(row) for row in together.tolist()}) == rows  # no row is in two parts
    assert len(parts[2]) == round(rows / 5)
    assert [len(p) for p in parts[1:]] == [len(task.validation.inputs), round(rows / 5)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("make", "rows", "features"), TASKS)
def test_features_are_standardized_by_the_training_rows(
    make: Callable[..., Task], rows: int, features: int
) -> None:
    inputs = make().train.inputs  # type: ignore[attr-defined]
    torch.testing.assert_close(inputs.mean(0), torch.zeros(features), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(0), torch.ones(features))


@pytest.mark.parametrize(("make", "rows", "features"), TASKS)
def test_the_split_is_fixed(make: Callable[..., Task], rows: int, features: int) -> None:
    torch.manual_seed(1)
    first = make().test.inputs  # type: ignore[union-attr]
    torch.manual_seed(2)
    assert torch.equal(make().test.inputs, first)  # type: ignore[union-attr]


def test_classes_and_targets() -> None:
    assert set(breast_cancer().train.target.tolist()) == {0, 1}  # type: ignore[attr-defined]
    target = diabetes().train.target  # type: ignore[attr-defined]
    assert target.shape == (442 - 88 - 71, 1)
    assert float(target.mean()) == pytest.approx(0.0, abs=1e-5)


def test_variance_explained_is_the_librarys() -> None:
    score, output, target = VarianceExplained(), torch.randn(50, 2), torch.randn(50, 2)
    for part in range(0, 50, 20):
        score.update(output[part : part + 20], target[part : part + 20])
    # Over both columns together, as their sums of squares.
    expected = metrics.r2_score(target, output, multioutput="variance_weighted")
    assert score.compute() == pytest.approx(100 * expected, rel=1e-5)
    constant = VarianceExplained()
    constant.update(torch.zeros(3, 1), torch.full((3, 1), 0.1))
    with pytest.raises(InputError, match="the 3 targets are all equal"):
        constant.compute()
    with pytest.raises(ValueError, match=r"\(3,\) for a target \(3, 1\)"):
        score.update(torch.zeros(3), torch.zeros(3, 1))


@pytest.mark.parametrize(("make", "rows", "features"), TASKS)
def test_few_rows_are_finite(make: Callable[..., Task], rows: int, features: int) -> None:
    for validation in (2, rows - round(rows / 5) - 2):  # the fewest to validate, or to train on
        task = make(validation=validation)
        assert all(
            part.inputs.isfinite().all() for part in (task.train, task.validation, task.test)
        )  # type: ignore[union-attr, attr-defined]
        score = evaluate(
            torch.nn.Linear(features, 2 if features == 30 else 1), task.validation, task.score
        )
        assert math.isfinite(score)


@pytest.mark.parametrize("validation", [0, 1, 353, 5000])
def test_bad_counts(validation: int) -> None:
    with pytest.raises(InputError, match=f"validation={validation}"):
        diabetes(validation=validation)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependency, match="scikit-learn"):
        diabetes()
