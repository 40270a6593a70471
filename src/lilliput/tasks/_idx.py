"""MNIST and what is stored like it: four idx files, 28x28 grey, 10 classes.

An idx file is a header of big-endian 32-bit numbers (magic, then one length a dimension) and bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..core.task import Task
from . import _files
from ._augment import shift
from ._images import Images, Parts, hold_out, image_task

CLASSES = 10
SIDE = 28
MOST = 60_000
UNSIGNED_BYTE = 0x08
KIND = _files.Kind(
    "an idx file",
    "Delete it and get it anew; the next run downloads it where there is a network.",
)


@dataclass(frozen=True)
class IdxSet:
    """A data set in four idx files.

    Attributes:
        name: how reports call it.
        train: files of the training images and labels.
        test: files of the test images and labels.
        mean: mean of the training pixels, scaled to [0, 1].
        deviation: their standard deviation.
    """

    name: str
    train: tuple[_files.Remote, _files.Remote]
    test: tuple[_files.Remote, _files.Remote]
    mean: float
    deviation: float


def idx_task(
    data: IdxSet,
    batch_size: int,
    test_batch_size: int,
    validation: int,
    limit: int | None,
    augment: bool,
    without: Sequence[int] = (),
) -> Task:
    """The classification task of a data set in idx files."""
    black = -data.mean / data.deviation
    return image_task(
        data.name,
        *idx_parts(data, validation, limit, without),
        batch_size=batch_size,
        test_batch_size=test_batch_size,
        augment=functools.partial(shift, pixels=2, fill=black) if augment else None,
    )


def idx_parts(
    data: IdxSet, validation: int, limit: int | None, without: Sequence[int] = ()
) -> Parts:
    """The images of a data set in idx files, normalized: for training, validation and test."""
    train, held = hold_out(_load(data, data.train), validation, limit, without)
    return train, held, _load(data, data.test)


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """An idx file of bytes, plain or gzip.

    Args:
        path: the file; it is gzip where the name ends in ``.gz``.
        dimensions: how many it should have, 1 for labels and 3 for images.

    Raises:
        InputError: it is damaged, or another kind of file.
    """
    with KIND.readable(path), _files.opened(path) as stream:
        header = stream.read(4 * (1 + dimensions))
        shape = _shape(path, header, dimensions)
        body = stream.read(math.prod(shape) + 1)
    if len(body) != math.prod(shape):
        raise KIND.damaged(path, f"its header announces {shape}, but the length does not fit")
    return np.frombuffer(bytearray(body), dtype=np.uint8).reshape(shape)


def _shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    if header[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]) or len(header) % (1 + dimensions):
        raise KIND.damaged(
            path, f"its first bytes, {header[:4].hex()}, are not those of such a file"
        )
    shape = tuple(int(n) for n in np.frombuffer(header, dtype=">u4")[1:])
    if len(shape) != dimensions or shape[0] > MOST or shape[1:] not in ((), (SIDE, SIDE)):
        raise KIND.damaged(
            path, f"it announces {shape}; up to {MOST:,} of {SIDE}x{SIDE} are expected"
        )
    return shape


def _load(data: IdxSet, files: tuple[_files.Remote, _files.Remote]) -> Images:
    image_path, label_path = (_files.fetch(remote) for remote in files)
    pixels, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if len(pixels) != len(labels):
        raise KIND.damaged(
            label_path, f"{len(labels)} labels for the {len(pixels)} of {image_path}"
        )
    if labels.size and labels.max() >= CLASSES:
        raise KIND.damaged(label_path, f"a label is {labels.max()}, the largest should be 9")
    inputs = torch.from_numpy(pixels).unsqueeze(1).float().div_(255)
    inputs.sub_(data.mean).div_(data.deviation)
    return Images(inputs, torch.from_numpy(labels).long())
