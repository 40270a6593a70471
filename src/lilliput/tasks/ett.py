"""ETT, electricity transformer temperature: hourly loads with daily and weekly periods.

Paper: Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting (Zhou, Zhang,
Peng, Zhang, Li, Xiong, Zhang; AAAI 2021; arXiv 2012.07436)
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..core.registry import task
from ..core.task import Task
from ..errors import InputError, UnknownName
from . import _files
from ._arrays import ArrayBatches, standardized

SERIES = ("h1", "h2")
FEATURES = 7
# Twelve months to train, four to validate, four to test, of 30 days: the paper's split.
MONTH = 30 * 24
TRAIN, VALIDATION, TEST = 12 * MONTH, 16 * MONTH, 20 * MONTH
# Targets start behind the longest window whatever the window is, so that all tasks train on the same.
LONGEST = 2 * MONTH
KIND = _files.Kind(f"ETT, {TEST:,} hours of {FEATURES} series behind a header and a date")


@task
def ett(
    series: str = "h1",
    window: int = 24,
    horizon: int = 24,
    batch_size: int = 128,
    test_batch_size: int = 1000,
) -> Task:
    """ETT, hourly load and oil temperature of a transformer, 7 series, to be forecast.

    Inputs ``(window, 7)``, target ``(horizon, 7)``, the hours that follow; each series is standardized by
    the mean and deviation of its training hours, or only shifted to 0 where it is constant in them. The loss
    is the mean squared error, the score minus that, so that higher is better.

    A target starts at each hour from which all of it lies in one part, but the first 1,440 hours, the longest
    window, only begin windows. So tasks with other windows train on the same targets and are scored on the
    same ones; those with another horizon are not. Windows reach back into the part before.

    Args:
        series: ``"h1"`` or ``"h2"``, two transformers.
        window: hours that the model sees: 24 is a day, 168 a week.
        horizon: hours that it forecasts.
        batch_size: training windows a batch.
        test_batch_size: windows a batch of validation and test.

    Raises:
        DataNotFound: the files are nowhere; they are not downloaded.
        InputError: a file is damaged, or the window does not fit the series.
    """
    if series not in SERIES:
        raise UnknownName("series of ett", series, SERIES)
    if not (1 <= window <= LONGEST and 1 <= horizon <= MONTH):
        raise InputError(
            f"window={window}, horizon={horizon}: give a window of 1 to {LONGEST} hours and a "
            f"horizon of 1 to {MONTH}."
        )
    values = _read(_find(series))
    values = standardized(values, values[:TRAIN])

    def windows(first: int, last: int) -> tuple[Tensor, Tensor]:
        inputs = _every(values[first - window : last - horizon], window)
        return inputs, _every(values[first:last], horizon)

    return Task(
        train=ArrayBatches(*windows(LONGEST, TRAIN), batch_size, shuffle=True),
        validation=ArrayBatches(*windows(TRAIN, VALIDATION), test_batch_size),
        test=ArrayBatches(*windows(VALIDATION, TEST), test_batch_size),
        loss=mse_loss,
        score=negative_error,
        name=f"ETT{series}, {window} hours",
        score_name="minus mean squared error",
    )


def negative_error(output: Tensor, target: Tensor) -> Tensor:
    """Minus the mean squared error of each sample, shape ``(batch,)``."""
    return -(output - target).square().flatten(1).mean(1)


def _every(values: Tensor, length: int) -> Tensor:
    """All stretches of a length, ``(stretches, length, series)``; a view."""
    return values.unfold(0, length, 1).transpose(1, 2)


def _find(series: str) -> Path:
    names = [f"ETT{series}.csv.gz", f"ETT{series}.csv"]
    found = _files.find("ett", names)
    if found is None:
        raise _files.not_found(
            "ett", names, "Put the file into a folder D/ett and set LILLIPUT_DATA=D."
        )
    return found


def _read(path: Path) -> Tensor:
    with KIND.readable(path):
        _, *rows = csv.reader(_files.text(path).splitlines())
        values = np.array([row[1:] for row in rows], dtype=np.float32)
    if values.ndim != 2 or values.shape[1] != FEATURES or len(values) < TEST:
        raise KIND.damaged(path, f"it holds {values.shape} numbers")
    if not np.isfinite(values).all():
        raise KIND.damaged(path, "a number is missing")
    return torch.from_numpy(values)
