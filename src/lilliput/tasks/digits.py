"""Handwritten digits of 8x8 pixels from scikit-learn: real data that needs no download.

The 1,797 images come with the package scikit-learn. They have no official split: 300 stratified
ones are the test set, drawn with a fixed seed, so scores compare within Lilliput only. With so few,
one image is 0.33 points of accuracy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.optional import optional
from ..core.registry import task
from ..core.task import Task
from ..errors import InputError
from ._images import SPLIT_SEED, Images, image_task

# Mean and standard deviation of all pixels, scaled to [0, 1].
MEAN, DEVIATION = 0.3053, 0.3760
TEST = 300


@task
def digits(
    batch_size: int = 128,
    test_batch_size: int = 1000,
    validation: int = 300,
    limit: int | None = None,
) -> Task:
    """Handwritten digits, 8x8 grey, 10 classes; ships with scikit-learn.

    1,797 images ``(1, 8, 8)``, split with a fixed seed and stratified into 300 for test,
    ``validation``, and the rest for training; pixels scaled to [0, 1] and normalized.

    Args:
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        validation: images held out for validation. 0 trains on all; validation is then the test
            images and ``test`` is None, so that reports say that choices saw the reported images.
        limit: train on at most so many images.

    Raises:
        MissingDependency: scikit-learn is not installed.
        InputError: the counts leave nothing to train on.

    Example:
        >>> digits(batch_size=64).example_inputs().shape
        torch.Size([1, 1, 8, 8])
    """
    _check(validation, limit)
    images = _load()
    rest, test = _stratified(torch.arange(len(images.labels)), images.labels, TEST)
    train, held = _stratified(rest, images.labels, validation)
    return image_task(
        "digits",
        images.take(train[:limit]),
        images.take(held),
        images.take(test),
        batch_size=batch_size,
        test_batch_size=test_batch_size,
    )


def _check(validation: int, limit: int | None) -> None:
    if validation != 0 and not 10 <= validation <= 1400:
        raise InputError(
            f"validation={validation}: give 0, or 10 to 1400 of the 1,497 images beside the test "
            "set, so that every class is in both parts."
        )
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} leaves nothing to train on: give at least 1, or none.")


def _load() -> Images:
    data: Any = _sklearn("datasets").load_digits()
    pixels = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return Images((pixels - MEAN) / DEVIATION, torch.from_numpy(data.target).long())


def _stratified(numbers: Tensor, labels: Tensor, held: int) -> tuple[Tensor, Tensor]:
    if held == 0:
        return numbers, numbers[:0]
    kept, out = _sklearn("model_selection").train_test_split(
        numbers.numpy(), test_size=held, stratify=labels[numbers].numpy(), random_state=SPLIT_SEED
    )
    return torch.from_numpy(kept), torch.from_numpy(out)


def _sklearn(part: str) -> Any:
    return optional(f"sklearn.{part}", "scikit-learn", "data", "the task 'digits'")
