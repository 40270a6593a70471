"""Handwritten digits of 8x8 pixels from scikit-learn: real data that needs no download.

Like MNIST they come also as pairs of a good and a poor picture, for teachers that see more.

The 1,797 images come with the package scikit-learn. They have no official split: 300 stratified
ones are the test set, drawn with a fixed seed, so scores compare within Lilliput only. With so few,
one image is 0.33 points of accuracy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.optional import optional
from ..core.registry import task
from ..core.task import Task
from ..errors import InputError
from ._arrays import check_limit
from ._augment import shift
from ._images import (
    SPLIT_SEED,
    Images,
    Parts,
    average_pooled,
    degraded,
    image_task,
    leave_out,
    noisy_parts,
    unlabel,
)

# Mean and standard deviation of all pixels, scaled to [0, 1]: two numbers that hardly differ from those of
# the training images alone, and do not depend on which images these are.
MEAN, DEVIATION = 0.3053, 0.3760
TEST = 300


@task
def digits(
    batch_size: int = 128,
    test_batch_size: int = 1000,
    validation: int = 300,
    limit: int | None = None,
    augment: bool = False,
    without: Sequence[int] = (),
) -> Task:
    """Handwritten digits, 8x8 grey, 10 classes; ships with scikit-learn.

    1,797 images ``(1, 8, 8)``, split with a fixed seed and stratified into 300 for test,
    ``validation``, and the rest for training; pixels scaled to [0, 1], then normalized by mean 0.3053 and
    standard deviation 0.3760 of the pixels of all 1,797 images, those of the test among them.

    Args:
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        validation: images held out for validation. 0 trains on all; validation is then the test
            images and ``test`` is None, so that reports say that choices saw the reported images.
        limit: train on at most so many images.
        augment: shift training images by up to 1 pixel in both directions.
        without: classes that are left out of the training images, and of these only.

    Raises:
        MissingDependency: scikit-learn is not installed.
        InputError: the counts leave nothing to train on.

    Example:
        >>> digits(batch_size=64).example_inputs().shape
        torch.Size([1, 1, 8, 8])
    """
    black = -MEAN / DEVIATION
    return image_task(
        "digits",
        *_parts(validation, limit, without),
        batch_size=batch_size,
        test_batch_size=test_batch_size,
        augment=functools.partial(shift, pixels=1, fill=black) if augment else None,
    )


@task
def digits_privileged(
    samples: int | None = 300,
    labeled: int | None = None,
    side: int = 4,
    batch_size: int = 128,
    test_batch_size: int = 1000,
    validation: int = 300,
) -> Task:
    """Handwritten digits in 4x4 pixels, 10 classes; a teacher sees the 8x8 image as the view "privileged".

    Images ``(1, side, side)`` are means of the normalized pixels of ``digits``. The training images are
    those of ``digits`` with the same ``limit``.

    Args:
        samples: training images; None for all.
        labeled: how many of them keep their label; the others' target is -1. None for all.
        side: pixels of a side, a divisor of 8.
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        validation: as for ``digits``.

    Raises:
        MissingDependency: scikit-learn is not installed.
        InputError: a count or the side does not fit.

    Example:
        >>> batch = next(iter(digits_privileged(batch_size=2).train))
        >>> batch.inputs.shape, batch.views["privileged"].shape
        (torch.Size([2, 1, 4, 4]), torch.Size([2, 1, 8, 8]))
    """
    train, *scored = (
        degraded(part, "privileged", lambda inputs: average_pooled(inputs, side))
        for part in _parts(validation, samples)
    )
    return image_task(
        f"digits in {side}x{side} pixels",
        unlabel(train, labeled),
        *scored,
        batch_size=batch_size,
        test_batch_size=test_batch_size,
    )


@task
def digits_noisy(
    noise: float = 0.4,
    limit: int | None = None,
    batch_size: int = 128,
    test_batch_size: int = 1000,
    validation: int = 300,
) -> Task:
    """Handwritten digits under Gaussian noise, 8x8; a teacher sees the clean image as the view "source".

    Each image has its own noise, the same in every epoch, as two recordings of one scene have. Training,
    validation and test images are noisy.

    Args:
        noise: standard deviation, where black is 0 and white is 1.
        limit: train on at most so many images.
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        validation: as for ``digits``.

    Raises:
        MissingDependency: scikit-learn is not installed.
        InputError: a count or the noise is negative.

    Example:
        >>> batch = next(iter(digits_noisy(noise=0.0).train))
        >>> torch.equal(batch.inputs, batch.views["source"])
        True
    """
    parts = noisy_parts(_parts(validation, limit), noise / DEVIATION)
    return image_task(
        "noisy digits", *parts, batch_size=batch_size, test_batch_size=test_batch_size
    )


def _parts(validation: int, limit: int | None, without: Sequence[int] = ()) -> Parts:
    """Images for training, validation and test, normalized."""
    _check(validation, limit)
    images = _load()
    rest, test = _stratified(torch.arange(len(images.labels)), images.labels, TEST)
    train, held = _stratified(rest, images.labels, validation)
    train = leave_out(train, images.labels, without)[:limit]
    return images.take(train), images.take(held), images.take(test)


def _check(validation: int, limit: int | None) -> None:
    if validation != 0 and not 10 <= validation <= 1400:
        raise InputError(
            f"validation={validation}: give 0, or 10 to 1400 of the 1,497 images beside the test "
            "set, so that every class is in both parts."
        )
    check_limit(limit)


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
