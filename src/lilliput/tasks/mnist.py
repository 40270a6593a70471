"""MNIST, handwritten digits of 28x28 pixels, also as pairs of a good and a poor picture.

Paper: Gradient-Based Learning Applied to Document Recognition (LeCun, Bottou, Bengio, Haffner;
Proceedings of the IEEE 1998; doi 10.1109/5.726791)
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.registry import task
from ..core.task import Task
from ._files import Remote
from ._idx import IdxSet, idx_parts, idx_task
from ._images import average_pooled, degraded, image_task, noisy_parts, unlabel


def _remote(name: str, md5: str) -> Remote:
    return Remote("mnist", f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz", md5)


MNIST = IdxSet(
    name="MNIST",
    train=(
        _remote("train-images-idx3-ubyte", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        _remote("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432"),
    ),
    test=(
        _remote("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3"),
        _remote("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    mean=0.1307,
    deviation=0.3081,
)


@task
def mnist(
    batch_size: int = 128,
    test_batch_size: int = 1000,
    validation: int = 5000,
    limit: int | None = None,
    augment: bool = False,
    without: Sequence[int] = (),
) -> Task:
    """MNIST, handwritten digits, 28x28 grey, 10 classes, 60,000 + 10,000 images.

    Images ``(1, 28, 28)``, scaled to [0, 1], then normalized by mean 0.1307 and standard deviation
    0.3081 of the training pixels.

    Args:
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        validation: training images held out for validation, always the same ones. 0 trains on all;
            validation is then the test images and ``test`` is None, so that reports say that
            choices saw the reported images.
        limit: train on at most so many images.
        augment: shift training images by up to 2 pixels in both directions.
        without: classes that are left out of the training images, and of these only.

    Raises:
        DataNotFound: the files are nowhere and cannot be downloaded.
        InputError: a file is damaged, or the counts leave nothing to train on.
    """
    return idx_task(MNIST, batch_size, test_batch_size, validation, limit, augment, without)


@task
def mnist_privileged(
    samples: int | None = 500,
    labeled: int | None = None,
    side: int = 7,
    batch_size: int = 128,
    test_batch_size: int = 1000,
    validation: int = 5000,
) -> Task:
    """MNIST in 7x7 pixels, 10 classes; a teacher sees the 28x28 image as the view "privileged".

    The task of Lopez-Paz et al. 2016, section 5, experiment 5. Images ``(1, side, side)`` are means of the
    normalized pixels of ``mnist``. The training images are those of ``mnist`` with the same ``limit``.

    Args:
        samples: training images; None for all.
        labeled: how many of them keep their label; the others' target is -1. None for all.
        side: pixels of a side, a divisor of 28.
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        validation: as for ``mnist``.

    Raises:
        DataNotFound: the files are nowhere and cannot be downloaded.
        InputError: a file is damaged, or a count or the side does not fit.
    """
    train, *scored = (
        degraded(part, "privileged", lambda inputs: average_pooled(inputs, side))
        for part in idx_parts(MNIST, validation, samples)
    )
    return image_task(
        f"MNIST in {side}x{side} pixels",
        unlabel(train, labeled),
        *scored,
        batch_size=batch_size,
        test_batch_size=test_batch_size,
    )


@task
def mnist_noisy(
    noise: float = 0.5,
    limit: int | None = None,
    batch_size: int = 128,
    test_batch_size: int = 1000,
    validation: int = 5000,
) -> Task:
    """MNIST under Gaussian noise, 28x28, 10 classes; a teacher sees the clean image as the view "source".

    Each image has its own noise, the same in every epoch, as two recordings of one scene have. Training,
    validation and test images are noisy.

    Args:
        noise: standard deviation, where black is 0 and white is 1.
        limit: train on at most so many images.
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        validation: as for ``mnist``.

    Raises:
        DataNotFound: the files are nowhere and cannot be downloaded.
        InputError: a file is damaged, or a count or the noise is negative.
    """
    parts = noisy_parts(idx_parts(MNIST, validation, limit), noise / MNIST.deviation)
    return image_task("noisy MNIST", *parts, batch_size=batch_size, test_batch_size=test_batch_size)
