"""CIFAR-10, photographs of 32x32 pixels in 10 classes.

The data are read from the official *binary* version or from copies without pickle, which could run
code. A lossy JPEG copy gives other scores than the original, so its task has another name and its
figures never stand beside published ones. Published networks were trained on all 50,000 training
images: of such a network the validation score is a training score.

Paper: Learning Multiple Layers of Features from Tiny Images (Krizhevsky; University of Toronto
2009; https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.registry import task
from ..core.task import Task
from ..errors import UnknownName
from . import _files
from ._augment import mirror, shift
from ._images import Images, hold_out, image_task, normalized

Bytes = npt.NDArray[np.uint8]

KIND = _files.Kind("CIFAR-10")
SIDE, PIXELS, CLASSES = 32, 3 * 32 * 32, 10
PER_FILE = 10_000
BINARY = _files.Remote(
    "cifar10",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
    "The unpacked folder cifar-10-batches-bin will do as well.",
)
UNPACKED = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
JPEG_FILES = ("cifar10_jpeg_train.npz", "cifar10_jpeg_test.npz")


@task
def cifar10(
    source: str = "auto",
    batch_size: int = 128,
    test_batch_size: int = 1000,
    validation: int | None = None,
    limit: int | None = None,
    augment: bool = False,
) -> Task:
    """CIFAR-10, photographs, 32x32 color, 10 classes, 50,000 + 10,000 images.

    Images ``(3, 32, 32)`` are kept as bytes, a quarter of the memory; a batch is scaled to [0, 1]
    and normalized by mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225).

    Args:
        source: ``"binary"``, the official data, downloaded if need be; ``"jpeg"``, a lossy copy of
            all images; ``"lossless"``, 7,044 official training images and the first 1,000 of the
            test set; ``"auto"``, binary where it is found, else jpeg where it is found, else
            binary downloaded.
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        validation: training images held out for validation, always the same ones; None is a tenth
            of them, 5,000 of 50,000. 0 trains on all; validation is then the test images and
            ``test`` is None, so that reports say that choices saw the reported images.
        limit: train on at most so many images.
        augment: shift training images by up to 4 pixels in both directions over black, and mirror
            them with probability 1/2, as He et al. (CVPR 2016) do.

    Raises:
        DataNotFound: the files are nowhere and cannot be downloaded.
        InputError: a file is damaged, or the counts leave nothing to train on.
        MissingDependency: pooch for a download, or pillow for JPEG or PNG, is not installed.
        UnknownName: no such source.
    """
    name, load = _SOURCES[_choose(source)]
    train, test = load()
    held_out = len(train.labels) // 10 if validation is None else validation
    return image_task(
        name,
        *hold_out(train, held_out, limit),
        test,
        batch_size=batch_size,
        test_batch_size=test_batch_size,
        augment=_augment if augment else None,
        prepare=normalized,
    )


def _choose(source: str) -> str:
    if source not in ("auto", *_SOURCES):
        raise UnknownName("source of cifar10", source, ("auto", *_SOURCES))
    if source != "auto":
        return source
    has_jpeg = all(_files.find("cifar10-jpeg", [name]) for name in JPEG_FILES)
    return "jpeg" if has_jpeg and not _find_binary() else "binary"


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    return mirror(shift(images, generator, pixels=4), generator)


def _images(pixels: Bytes, labels: Bytes, path: Path) -> Images:
    if labels.size and labels.max() >= CLASSES:
        raise KIND.damaged(path, f"a label is {labels.max()}, the largest should be 9")
    return Images(
        torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64))
    )


def _find_binary() -> Path | None:
    return _files.find(BINARY.folder, [UNPACKED, BINARY.name])


def _load_binary() -> tuple[Images, Images]:
    path = _find_binary() or _files.download(BINARY)
    with KIND.readable(path):
        return _records(path, TRAIN_FILES), _records(path, TEST_FILES)


def _records(path: Path, names: tuple[str, ...]) -> Images:
    """Records of one label byte and 3,072 pixel bytes, a plane each for red, green and blue."""
    wanted = len(names) * PER_FILE * (1 + PIXELS)
    raw = b"".join(_contents(path, names))
    if len(raw) != wanted:
        why = f"{', '.join(names)} have {len(raw):,} bytes instead of {wanted:,}"
        raise KIND.damaged(path, why)
    records = np.frombuffer(bytearray(raw), dtype=np.uint8).reshape(-1, 1 + PIXELS)
    return _images(records[:, 1:].reshape(-1, 3, SIDE, SIDE), records[:, 0], path)


def _contents(path: Path, names: tuple[str, ...]) -> list[bytes]:
    if path.is_dir():
        return [(path / name).read_bytes() for name in names]
    with _files.archive(path) as archive:
        streams = [archive.extractfile(f"{UNPACKED}/{name}") for name in names]
        return [stream.read() for stream in streams if stream is not None]


def _load_jpeg() -> tuple[Images, Images]:
    train, test = (_decode_all(_local("cifar10-jpeg", name)) for name in JPEG_FILES)
    return train, test


def _decode_all(path: Path) -> Images:
    """An npz file with the JPEG bytes one after the other, their offsets, and the labels."""
    data, offset, label = _read_npz(path, ("jpeg", "offset", "label"))
    if offset.shape != (len(label) + 1,) or offset[-1] > len(data) or (np.diff(offset) < 0).any():
        raise KIND.damaged(path, "offsets, labels and bytes do not fit together")
    raw, bounds = data.tobytes(), offset.tolist()
    pixels = np.empty((len(label), SIDE, SIDE, 3), dtype=np.uint8)
    for number in range(len(label)):
        pixels[number] = _decode(raw[bounds[number] : bounds[number + 1]], (SIDE, SIDE), path)
    return _images(pixels.transpose(0, 3, 1, 2), label, path)


def _load_lossless() -> tuple[Images, Images]:
    folder = "cifar10-lossless"
    labels = _local(folder, "cifar10_labels_official_order.npz")
    train_labels, test_labels = _read_npz(labels, ("train", "test"))
    more = _local(folder, "cifar10_train_batch2-5_first761.npz")
    more_images, more_labels = _read_npz(more, ("image", "label"))
    strips = [_strip(_local(folder, f"cifar10_batch_{number}.png")) for number in range(4)]
    train = np.concatenate([*strips, more_images])
    all_labels = np.concatenate([train_labels[:4000], more_labels])
    test = _strip(_local(folder, "cifar10_batch_50.png"))
    return (
        _images(train.transpose(0, 3, 1, 2), all_labels, more),
        _images(test.transpose(0, 3, 1, 2), test_labels[: len(test)], labels),
    )


def _strip(path: Path) -> Bytes:
    """A PNG image whose rows are 1,000 images of 32x32 pixels."""
    return _decode(path, (SIDE * SIDE, 1000), path).reshape(-1, SIDE, SIDE, 3)


def _decode(source: Path | bytes, size: tuple[int, int], path: Path) -> Bytes:
    with KIND.picture(source, path) as image:
        if image.size != size:
            why = f"an image has {image.size} pixels instead of {size}"
            raise KIND.damaged(path, why)
        return np.asarray(image.convert("RGB"))


def _local(folder: str, name: str) -> Path:
    advice = f"This copy cannot be downloaded: put it into D/{folder} and set LILLIPUT_DATA=D, or "
    found = _files.find(folder, [name])
    if found is None:
        raise _files.not_found(folder, [name], advice + "take source='binary'.")
    return found


def _read_npz(path: Path, keys: tuple[str, ...]) -> list[npt.NDArray[Any]]:
    with KIND.readable(path), np.load(path, allow_pickle=False) as archive:
        return [archive[key] for key in keys]


_SOURCES: dict[str, tuple[str, Callable[[], tuple[Images, Images]]]] = {
    "binary": ("CIFAR-10", _load_binary),
    "jpeg": ("CIFAR-10 (JPEG)", _load_jpeg),
    "lossless": ("CIFAR-10 (7,044 + 1,000 images)", _load_lossless),
}
