"""What the image tasks share: splits, normalization, batches, loss and score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from ..core.task import Task, accuracy
from ..errors import InputError
from ._arrays import ArrayBatches, Augment, Prepare, check_limit

SPLIT_SEED = 0
#: The target of a sample whose label is not known.
UNLABELED = -1
# Of ImageNet's images, scaled to [0, 1]: what published networks were trained with.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Images(NamedTuple):
    """Images ``(N, channels, height, width)``, their labels, int64 ``(N,)``, and other views of them."""

    inputs: Tensor
    labels: Tensor
    views: Mapping[str, Tensor] | None = None

    def take(self, numbers: Tensor) -> Images:
        """Some of them, in the order of ``numbers``."""
        views = {name: view[numbers] for name, view in (self.views or {}).items()}
        return Images(self.inputs[numbers], self.labels[numbers], views or None)


#: Images to train on, to choose on and to report on.
Parts = tuple[Images, Images, Images]


def hold_out(
    images: Images, validation: int, limit: int | None, without: Sequence[int] = ()
) -> tuple[Images, Images]:
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
    check_limit(limit)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, held = order[: samples - validation], order[samples - validation :]
    return images.take(leave_out(train, images.labels, without)[:limit]), images.take(held)


def leave_out(numbers: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """The numbers of images that belong to none of the classes.

    Raises:
        InputError: there is no such class, or nothing would be left.
    """
    present = sorted(set(labels.tolist()))
    if strange := sorted(set(classes) - set(present)):
        raise InputError(
            f"without={list(classes)}: no image has the label {strange[0]!r}; the labels are {present}."
        )
    kept = numbers[~torch.isin(labels[numbers], torch.tensor(list(classes), dtype=torch.int64))]
    if not len(kept):
        raise InputError(f"without={list(classes)} leaves nothing to train on.")
    return kept


def unlabel(images: Images, labeled: int | None) -> Images:
    """The same images, of which only the first ``labeled`` keep their labels; None keeps all.

    Raises:
        InputError: the count is negative or larger than that of the images.
    """
    if labeled is None:
        return images
    if not 0 <= labeled <= len(images.labels):
        raise InputError(f"labeled={labeled} of {len(images.labels)} training images.")
    labels = images.labels.clone()
    labels[labeled:] = UNLABELED
    return images._replace(labels=labels)


def degraded(images: Images, view: str, change: Callable[[Tensor], Tensor]) -> Images:
    """The images after a change, with what they were before as a view."""
    return Images(change(images.inputs), images.labels, {view: images.inputs})


def noisy_parts(parts: Parts, deviation: float) -> Parts:
    """Images with noise, and without it as the view ``"source"``; no two parts have the same noise."""
    train, validation, test = (
        degraded(part, "source", partial(noisy, deviation=deviation, seed=seed))
        for seed, part in enumerate(parts, SPLIT_SEED)
    )
    return train, validation, test


def normalized(images: Tensor) -> Tensor:
    """Color images of bytes, scaled to [0, 1] and normalized by ImageNet's mean and deviation."""
    mean, deviation = MEAN.to(images.device), DEVIATION.to(images.device)
    return images.float().div_(255).sub_(mean).div_(deviation)


def average_pooled(inputs: Tensor, side: int) -> Tensor:
    """Images of ``side`` times ``side`` pixels, each the mean of the pixels that it covers.

    Raises:
        InputError: the side does not divide the images'.
    """
    if side < 1 or inputs.shape[-1] % side:
        raise InputError(f"side={side}: give a divisor of the images' {inputs.shape[-1]} pixels.")
    return adaptive_avg_pool2d(inputs, side)


def noisy(inputs: Tensor, deviation: float, seed: int) -> Tensor:
    """Images with Gaussian noise, independent for each pixel and the same at every call.

    Raises:
        InputError: the deviation is negative.
    """
    if deviation < 0:
        raise InputError("the noise has a negative standard deviation: give 0 or more.")
    generator = torch.Generator().manual_seed(seed)
    return inputs + deviation * torch.randn(inputs.shape, generator=generator)


def labeled_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the samples whose label is known; 0 where none is."""
    total = cross_entropy(output, target, ignore_index=UNLABELED, reduction="sum")
    return total / (target != UNLABELED).sum().clamp(min=1)


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

    def batches(images: Images, size: int, **options: Any) -> ArrayBatches:
        inputs, labels, views = images
        return ArrayBatches(inputs, labels, size, views=views, prepare=prepare, **options)

    chosen_on_test = len(validation.labels) == 0
    labeled = bool((train.labels != UNLABELED).all())
    return Task(
        train=batches(train, batch_size, shuffle=True, augment=augment),
        validation=batches(test if chosen_on_test else validation, test_batch_size),
        test=None if chosen_on_test else batches(test, test_batch_size),
        loss=cross_entropy if labeled else labeled_cross_entropy,
        score=accuracy,
        name=name,
        score_name="accuracy, %",
    )
