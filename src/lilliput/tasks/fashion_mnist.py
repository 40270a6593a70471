"""Fashion-MNIST, pictures of clothes in MNIST's form.

Paper: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms (Xiao,
Rasul, Vollgraf; arXiv 2017; arXiv 1708.07747)
"""

from __future__ import annotations

from ..core.registry import task
from ..core.task import Task
from ._files import Remote
from ._idx import IdxSet, idx_task

_HOME = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_DEBIAN = "On Debian, the package dataset-fashion-mnist brings it too."


def _remote(name: str, md5: str) -> Remote:
    return Remote("fashion-mnist", f"{_HOME}/{name}.gz", md5, _DEBIAN)


FASHION_MNIST = IdxSet(
    name="Fashion-MNIST",
    train=(
        _remote("train-images-idx3-ubyte", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        _remote("train-labels-idx1-ubyte", "25c81989df183df01b3e8a0aad5dffbe"),
    ),
    test=(
        _remote("t10k-images-idx3-ubyte", "bef4ecab320f06d8554ea6380940ec79"),
        _remote("t10k-labels-idx1-ubyte", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    mean=0.2860,
    deviation=0.3530,
)


@task
def fashion_mnist(
    batch_size: int = 128,
    test_batch_size: int = 1000,
    validation: int = 5000,
    limit: int | None = None,
    augment: bool = False,
) -> Task:
    """Fashion-MNIST, pictures of clothes, 28x28 grey, 10 classes, 60,000 + 10,000 images.

    Images ``(1, 28, 28)``, scaled to [0, 1], then normalized by mean 0.2860 and standard deviation
    0.3530 of the training pixels.

    Args:
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        validation: training images held out for validation, always the same ones. 0 trains on all;
            validation is then the test images and ``test`` is None, so that reports say that
            choices saw the reported images.
        limit: train on at most so many images.
        augment: shift training images by up to 2 pixels in both directions.

    Raises:
        DataNotFound: the files are nowhere and cannot be downloaded.
        InputError: a file is damaged, or the counts leave nothing to train on.
    """
    return idx_task(FASHION_MNIST, batch_size, test_batch_size, validation, limit, augment)
