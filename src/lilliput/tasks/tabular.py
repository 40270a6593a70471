"""Tables of numbers that come with scikit-learn: real data that needs no download.

Neither table has an official split. A fifth of the rows is the test set, drawn with a fixed seed, so scores
compare within Lilliput only. Features are standardized by the mean and deviation of the training rows.

Paper: Least Angle Regression (Efron, Hastie, Johnstone, Tibshirani; Annals of Statistics 2004; doi
10.1214/009053604000000067)

Paper: Nuclear Feature Extraction for Breast Tumor Diagnosis (Street, Wolberg, Mangasarian; IS&T/SPIE
Symposium 1993; doi 10.1117/12.148698)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from ..core.optional import optional
from ..core.registry import task
from ..core.task import Task, accuracy
from ..errors import InputError
from ._arrays import ArrayBatches, standardized
from ._images import SPLIT_SEED

_TEST = 0.2


@task
def diabetes(batch_size: int = 32, test_batch_size: int = 1000, validation: int = 71) -> Task:
    """Diabetes, how far the disease went in a year, from 10 numbers; ships with scikit-learn.

    442 patients: age, sex, body mass index, blood pressure and six blood values, inputs ``(10,)``; the target
    ``(1,)`` is standardized too. 88 patients are for the test. The loss is the mean squared error, the score
    the percentage of the target's variance that is explained.

    Args:
        batch_size: training patients a batch.
        test_batch_size: patients a batch of validation and test.
        validation: patients held out for validation, at least 2.

    Raises:
        MissingDependency: scikit-learn is not installed.
        InputError: the counts leave nothing to train on.

    Example:
        >>> diabetes().example_inputs().shape
        torch.Size([1, 10])
    """
    inputs, target = _load("diabetes")
    rows = _split(len(inputs), validation)
    wanted = target.float().unsqueeze(1)
    wanted = standardized(wanted, wanted[rows[0]])
    parts = _batches(inputs, wanted, rows, batch_size, test_batch_size)
    score = VarianceExplained()
    return Task(*parts, mse_loss, score, "diabetes", "variance explained, %")


@task
def breast_cancer(batch_size: int = 32, test_batch_size: int = 1000, validation: int = 91) -> Task:
    """Breast cancer, benign or malignant, from 30 numbers, 2 classes; ships with scikit-learn.

    569 tumors, each by the mean, the error and the worst of ten measures of its nuclei, inputs ``(30,)``;
    class 1 is benign. 114 tumors are for the test; one is 0.88 points of accuracy.

    Args:
        batch_size: training tumors a batch.
        test_batch_size: tumors a batch of validation and test.
        validation: tumors held out for validation, at least 2.

    Raises:
        MissingDependency: scikit-learn is not installed.
        InputError: the counts leave nothing to train on.

    Example:
        >>> breast_cancer().example_inputs().shape
        torch.Size([1, 30])
    """
    inputs, target = _load("breast_cancer")
    rows = _split(len(inputs), validation)
    parts = _batches(inputs, target, rows, batch_size, test_batch_size)
    return Task(*parts, cross_entropy, accuracy, "breast cancer", "accuracy, %")


class VarianceExplained:
    """100 times the coefficient of determination: 100 is exact, 0 as good as the mean, below it worse.

    Example:
        >>> score = VarianceExplained()
        >>> score.update(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
        >>> score.compute()
        50.0
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._seen: list[tuple[Tensor, Tensor]] = []

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in one batch, both of the same shape."""
        if output.shape != target.shape:
            raise ValueError(f"an output {tuple(output.shape)} for a target {tuple(target.shape)}")
        self._seen.append((output.detach().double().cpu(), target.double().cpu()))

    def compute(self) -> float:
        """The score of all batches since the last reset.

        Raises:
            InputError: the targets are all equal.
        """
        output, target = (torch.cat(part) for part in zip(*self._seen, strict=True))
        if (target == target[:1]).all():
            raise InputError(
                f"variance explained: the {len(target)} targets are all equal, so there is no variance to "
                "explain. Score on more samples."
            )
        missed = (output - target).square().sum()
        return float(100 * (1 - missed / (target - target.mean(0)).square().sum()))


def _load(name: str) -> tuple[Tensor, Tensor]:
    datasets = optional("sklearn.datasets", "scikit-learn", "data", f"the task {name!r}")
    loaded: Any = getattr(datasets, f"load_{name}")()
    return torch.from_numpy(loaded.data).float(), torch.from_numpy(loaded.target)


def _split(rows: int, validation: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows train, validate and test."""
    test = round(_TEST * rows)
    if not 2 <= validation <= rows - test - 2:
        raise InputError(
            f"validation={validation} of {rows - test} rows beside the test set: give 2 to "
            f"{rows - test - 2}, for one row has no variance."
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[test + validation :], order[test : test + validation], order[:test]


def _batches(
    inputs: Tensor,
    target: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    batch_size: int,
    test_batch_size: int,
) -> tuple[ArrayBatches, ArrayBatches, ArrayBatches]:
    inputs = standardized(inputs, inputs[rows[0]])
    train, validation, test = ((inputs[part], target[part]) for part in rows)
    return (
        ArrayBatches(*train, batch_size, shuffle=True),
        ArrayBatches(*validation, test_batch_size),
        ArrayBatches(*test, test_batch_size),
    )
