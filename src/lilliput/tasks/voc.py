"""Object detection from a folder in the form of the PASCAL challenge: JPEGs, XML files and lists of names.

Paper: The Pascal Visual Object Classes (VOC) Challenge (Everingham, Van Gool, Williams, Winn, Zisserman;
International Journal of Computer Vision 2010; doi 10.1007/s11263-009-0275-4)

The form::

    JPEGImages/NAME.jpg
    Annotations/NAME.xml            object: name, difficult, bndbox: xmin, ymin, xmax, ymax
    ImageSets/Main/SPLIT.txt        a NAME a line

Boxes there count pixels from 1 and include the last one; here they are continuous, from 0, so
``xmin..xmax`` becomes ``xmin - 1 .. xmax``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from ..core.digests import mix
from ..core.registry import task
from ..core.task import Task
from ..core.types import Batch
from ..errors import DataNotFound, InputError, LilliputWarning, UnknownName
from ..mechanisms.detection import detection_loss
from . import _files
from ._arrays import ArrayBatches, check_limit
from ._average_precision import MeanAveragePrecision
from ._images import normalized

__all__ = [
    "BoxBatches",
    "DetectionTask",
    "MeanAveragePrecision",
    "VocImages",
    "read_voc",
    "voc",
    "voc_task",
]

HORIZONTAL, VERTICAL = -1, -2
_ARCHIVE = _files.Kind("a tar file")
_IMAGE, _ANNOTATION, _LIST = (
    _files.Kind(name, "Get it anew, or take it off the list.")
    for name in ("an image", "an annotation", "a list of images")
)


@dataclass
class DetectionTask(Task):
    """A task whose targets are boxes.

    Attributes:
        classes: their names; a target's class 1 is the first.
        dropped: boxes without an area, which were left out.
    """

    classes: tuple[str, ...] = ()
    dropped: int = 0


@task
def voc(
    folder: str,
    classes: Sequence[str] | None = None,
    train: str = "train",
    validation: str = "val",
    test: str | None = "test",
    height: int = 240,
    width: int = 320,
    batch_size: int = 8,
    test_batch_size: int = 16,
    augment: bool = True,
    limit: int | None = None,
) -> DetectionTask:
    """Object detection from a folder, or a tar file, in the form of the PASCAL challenge.

    Images are brought to one size, whatever their own, and normalized by ImageNet's mean and deviation.
    Targets are ``(boxes, 6)``: x1, y1, x2, y2 in pixels of that size, the class from 1, and 1 for a
    difficult one; rows of zeros fill up. The loss is that of Faster R-CNN, the score mean average precision
    at an overlap of 0.5.

    Args:
        folder: that holds ``JPEGImages``, ``Annotations`` and ``ImageSets``; or a tar file of it.
        classes: names of the objects to be found; others are left out. By default all that the three
            parts have, in the order of the alphabet.
        train: list of the training images, a file in ``ImageSets/Main``.
        validation: likewise.
        test: likewise; None where there is no such list.
        height: that all images get, in pixels.
        width: likewise.
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        augment: mirror half of the training images left to right.
        limit: train on at most so many images.

    Raises:
        DataNotFound: there is no such folder.
        InputError: a file is missing or damaged, or a number is out of range.
        UnknownName: no box has one of the classes.
        MissingDependency: pillow is not installed.

    Warns:
        LilliputWarning: boxes without an area were dropped.
    """
    made = voc_task(
        Path(folder).expanduser(),
        Path(folder).name,
        classes,
        (train, validation, test),
        (height, width),
        (batch_size, test_batch_size),
        (HORIZONTAL,) if augment else (),
        limit,
    )
    if made.dropped:
        warnings.warn(
            f"{folder}: {made.dropped} boxes have no area, or lie outside of their image, and were left out.",
            LilliputWarning,
            stacklevel=2,
        )
    return made


def voc_task(
    path: Path,
    name: str,
    classes: Sequence[str] | None,
    splits: tuple[str, str, str | None],
    size: tuple[int, int],
    batch_sizes: tuple[int, int],
    flips: Sequence[int],
    limit: int | None,
) -> DetectionTask:
    """A detection task from a folder or a tar file.

    Args:
        path: of the folder or the file.
        name: of the task.
        classes: names of the objects to be found; None for all.
        splits: lists of the images to train, validate and test on.
        size: height and width that all images get.
        batch_sizes: training images a batch, and images a batch of the others.
        flips: see :class:`BoxBatches`.
        limit: train on at most so many images.
    """
    check_limit(limit)
    if min(size) < 1:
        raise InputError(f"images of {size[0]}x{size[1]} pixels have no pixel: give 1 or more.")
    files = _Files(path)
    parts = [None if split is None else read_voc(files, split, size) for split in splits]
    names = _classes([part for part in parts if part is not None], classes, path)

    def batches(part: VocImages | None, size: int, **options: Any) -> Any:
        if part is None:
            return None
        return BoxBatches(part.pixels, part.target(names), size, prepare=normalized, **options)

    training = parts[0].first(limit) if parts[0] is not None else None
    return DetectionTask(
        train=batches(training, batch_sizes[0], shuffle=True, flips=flips),
        validation=batches(parts[1], batch_sizes[1]),
        test=batches(parts[2], batch_sizes[1]),
        loss=detection_loss,
        score=MeanAveragePrecision(len(names)),
        name=name,
        score_name="mean average precision at overlap 0.5, %",
        classes=tuple(names),
        dropped=sum(part.dropped for part in parts if part is not None),
    )


def _classes(parts: Sequence[VocImages], wanted: Sequence[str] | None, path: Path) -> Sequence[str]:
    known = sorted({label.name for part in parts for labels in part.labels for label in labels})
    if not known:
        raise InputError(f"{path} has no box of any object: there is nothing to detect.")
    for name in wanted or ():
        if name not in known:
            raise UnknownName("class of boxes", name, known, str(path))
    return known if wanted is None else list(wanted)


# -- batches ------------------------------------------------------------------------------------


class BoxBatches(ArrayBatches):
    """Batches of images with boxes, some of them mirrored.

    Args:
        inputs: images ``(samples, channels, height, width)``.
        target: ``(samples, boxes, 6)``; see :mod:`lilliput.mechanisms.detection`.
        batch_size: images a batch.
        flips: dims along which half of the images are mirrored, boxes included: -1 left to right,
            -2 upside down.
        options: of :class:`~lilliput.tasks._arrays.ArrayBatches`.
    """

    def __init__(
        self,
        inputs: Tensor,
        target: Tensor,
        batch_size: int,
        *,
        flips: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(inputs, target, batch_size, **options)
        self.flips = tuple(flips)

    @property
    def augmented(self) -> bool:
        """Whether an image differs from epoch to epoch."""
        return bool(self.flips) or super().augmented

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(mix("flips", self._seed))
        for batch in super().__iter__():
            images, boxes = batch.inputs, batch.target
            for dim in self.flips:
                which = torch.randint(2, (len(images),), generator=generator).bool()
                images, boxes = flipped(images, boxes, dim, which.to(images.device))
            yield Batch(images, boxes, batch.index, batch.views)


def flipped(images: Tensor, target: Tensor, dim: int, which: Tensor) -> tuple[Tensor, Tensor]:
    """Some images with their boxes, mirrored along a dim.

    Args:
        images: ``(batch, channels, height, width)``.
        target: ``(batch, boxes, 6)``.
        dim: -1 left to right, -2 upside down.
        which: bool ``(batch,)``.
    """
    low, high = (0, 2) if dim == HORIZONTAL else (1, 3)
    moved = target.clone()
    moved[..., low], moved[..., high] = (
        images.shape[dim] - target[..., high],
        images.shape[dim] - target[..., low],
    )
    moved = moved.where(target[..., 4:5] > 0, target)  # what only fills up stays zero
    return (
        torch.where(which[:, None, None, None], images.flip(dim), images),
        torch.where(which[:, None, None], moved, target),
    )


# -- files --------------------------------------------------------------------------------------


class Label(NamedTuple):
    """An object in an image."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class VocImages:
    """Images of one size with their objects.

    Attributes:
        names: of the images.
        pixels: bytes ``(images, 3, height, width)``.
        labels: of each image, its objects, in pixels of that size.
        dropped: boxes without an area, or outside of their image, which are not among the labels.
    """

    names: Sequence[str]
    pixels: Tensor
    labels: Sequence[Sequence[Label]]
    dropped: int

    def first(self, count: int | None) -> VocImages:
        """The first of them; None for all."""
        part = self.names[:count], self.pixels[:count], self.labels[:count]
        return VocImages(*part, self.dropped)

    def target(self, classes: Sequence[str]) -> Tensor:
        """Boxes of these classes, ``(images, boxes, 6)``, with rows of zeros where there are fewer."""
        rows = [
            [(*o.box, classes.index(o.name) + 1, o.difficult) for o in labels if o.name in classes]
            for labels in self.labels
        ]
        target = torch.zeros(len(rows), max(1, *map(len, rows), 0), 6)
        for number, own in enumerate(rows):
            if own:
                target[number, : len(own)] = torch.tensor(own)
        return target


class _Files:
    """The files of a folder or of a tar file, read by their names inside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            self._read: Callable[[str], bytes] = lambda name: (path / name).read_bytes()
        elif path.is_file():
            self._read = _unpacked(path).__getitem__
        else:
            raise DataNotFound(
                f"{path} does not exist: give a folder with ImageSets, or a tar file."
            )

    def place(self, name: str) -> str:
        """How errors call a file."""
        return f"{self.path}: {name}"

    def read(self, name: str, kind: _files.Kind) -> bytes:
        """The content of a file.

        Raises:
            InputError: it is missing or cannot be read.
        """
        with kind.readable(self.place(name)):
            try:
                return self._read(name)
            except (FileNotFoundError, KeyError) as error:
                raise kind.damaged(self.place(name), "it is missing") from error


def _unpacked(path: Path) -> dict[str, bytes]:
    """All files of a tar file, by their names below the folder that holds ``ImageSets``."""
    with _ARCHIVE.readable(path), _files.archive(path) as archive:
        found = {m.name: archive.extractfile(m) for m in archive.getmembers() if m.isfile()}
        content = {name: stream.read() for name, stream in found.items() if stream is not None}
    roots = {name.partition("ImageSets/Main/")[0] for name in content if "ImageSets/Main/" in name}
    if len(roots) != 1:
        raise InputError(f"{path} holds {len(roots)} folders with ImageSets/Main instead of one.")
    (root,) = roots
    return {n.removeprefix(root): data for n, data in content.items() if n.startswith(root)}


def read_voc(source: str | Path | _Files, split: str, size: tuple[int, int]) -> VocImages:
    """The images of one list, brought to one size, with their objects.

    Args:
        source: a folder that holds ``JPEGImages``, ``Annotations`` and ``ImageSets``, or a tar file of it.
        split: name of the list.
        size: height and width, in pixels.

    Raises:
        DataNotFound: there is no such folder.
        InputError: a file is missing or damaged; the message names it.
        MissingDependency: pillow is not installed.
    """
    files = source if isinstance(source, _Files) else _Files(Path(source))
    names = _names(files, f"ImageSets/Main/{split}.txt")
    pixels = torch.empty(len(names), 3, *size, dtype=torch.uint8)
    labels, dropped = [], 0
    for number, name in enumerate(names):
        pixels[number], scale = _image(files, f"JPEGImages/{name}.jpg", size)
        found = _objects(files, f"Annotations/{name}.xml", scale, size)
        labels.append([label for label in found if _has_area(label.box)])
        dropped += len(found) - len(labels[-1])
    return VocImages(names, pixels, labels, dropped)


def _names(files: _Files, name: str) -> list[str]:
    lines = files.read(name, _LIST).decode(errors="replace").splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise _LIST.damaged(files.place(name), "it names no image")
    return names


def _image(files: _Files, name: str, size: tuple[int, int]) -> tuple[Tensor, tuple[float, float]]:
    """Bytes ``(3, height, width)``, and the factors of width and height that made them."""
    with _IMAGE.picture(files.read(name, _IMAGE), files.place(name)) as image:
        scale = size[1] / image.width, size[0] / image.height
        image.draft("RGB", size[::-1])  # a JPEG can be decoded at half its size in half the time
        pixels = np.array(image.convert("RGB").resize(size[::-1], _files.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1), scale


def _objects(
    files: _Files, name: str, scale: tuple[float, float], size: tuple[int, int]
) -> list[Label]:
    """The objects of one image, inside it, in its new pixels."""
    with _ANNOTATION.readable(files.place(name)):
        found = ElementTree.fromstring(files.read(name, _ANNOTATION)).findall("object")
        return [_object(entry, scale, size) for entry in found]


def _object(entry: ElementTree.Element, scale: tuple[float, float], size: tuple[int, int]) -> Label:
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    low, high = ([_number(entry, f"{axis}{end}") for axis in "xy"] for end in ("min", "max"))
    if low[0] >= high[0] or low[1] >= high[1]:
        return Label(name, (0.0, 0.0, 0.0, 0.0), False)
    box = [low[0] - 1, low[1] - 1, *high]
    box = [min(max(0.0, b * scale[k % 2]), float(size[1 - k % 2])) for k, b in enumerate(box)]
    difficult = (entry.findtext("difficult") or "0").strip() == "1"
    return Label(name, (box[0], box[1], box[2], box[3]), difficult)


def _number(entry: ElementTree.Element, name: str) -> float:
    text = entry.findtext(f"bndbox/{name}")
    if text is None:
        raise ValueError(f"an object has no bndbox/{name}")
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"bndbox/{name} is {text}")
    return value


def _has_area(box: tuple[float, float, float, float]) -> bool:
    return box[0] < box[2] and box[1] < box[3]
