"""What the image classification tasks share: splits, batches, loss and score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.task import Task, accuracy
from ..errors import InputError
from ._arrays import ArrayBatches, Augment, Prepare

SPLIT_SEED = 0


class Images(NamedTuple):
    """Images ``(N, channels, height, width)`` and their labels, int64 ``(N,)``."""

    inputs: Tensor
    labels: Tensor

    def take(self, numbers: Tensor) -> Images:
        """Some of them, in the order of ``numbers``."""
        return Images(self.inputs[numbers], self.labels[numbers])


def hold_out(images: Images, validation: int, limit: int | None) -> tuple[Images, Images]:
    """Cut training images into those to train on and those to validate on.

    The validation images are the end of one fixed permutation and the training images its
    beginning, so that they do not depend on ``limit``, nor on the seed of a run.

    Raises:
        InputError: nothing would be left to train on, or a count is negative.
    """
    samples = len(images.labels)
    if not 0 <= validation < samples:
        raise InputError(
            f"validation={validation} of {samples} training images: give 0 to {samples - 1}."
        )
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} leaves nothing to train on: give at least 1, or none.")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, held = order[: samples - validation], order[samples - validation :]
    return images.take(train[:limit]), images.take(held)


def image_task(
    name: str,
    train: Images,
    validation: Images,
    test: Images,
    *,
    batch_size: int,
    test_batch_size: int,
    augment: Augment | None = None,
    prepare: Prepare | None = None,
) -> Task:
    """A classification task with cross-entropy as loss and percent correct as score.

    Without validation images, the test images are what choices are made on; ``test`` is then None,
    so that reports say so.
    """

    def scored(images: Images) -> ArrayBatches:
        return ArrayBatches(images.inputs, images.labels, test_batch_size, prepare=prepare)

    chosen_on_test = len(validation.labels) == 0
    return Task(
        train=ArrayBatches(*train, batch_size, shuffle=True, augment=augment, prepare=prepare),
        validation=scored(test if chosen_on_test else validation),
        test=None if chosen_on_test else scored(test),
        loss=cross_entropy,
        score=accuracy,
        name=name,
        score_name="accuracy, %",
    )
