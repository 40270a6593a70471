"""BCCD, blood cells seen through a microscope: object detection that trains in minutes.

364 photographs with 4,888 boxes, collected by Cosmicad and Akshaylamba and put into the form of the PASCAL
challenge by Shenggan (MIT licence). They come with a split into 205 to train, 87 to validate and 72 to test.
"""

from __future__ import annotations

from ..core.registry import task
from . import _files
from .voc import HORIZONTAL, VERTICAL, DetectionTask, voc_task

CLASSES = ("RBC", "WBC", "Platelets")
NAMES = ("bccd.tar.gz", "BCCD")


@task
def bccd(
    height: int = 240,
    width: int = 320,
    batch_size: int = 8,
    test_batch_size: int = 16,
    augment: bool = True,
    limit: int | None = None,
) -> DetectionTask:
    """BCCD, red and white blood cells and platelets to be found, 205 + 87 + 72 images.

    Images ``(3, height, width)``, from 480x640; see the task ``voc`` for targets, loss and score. Red cells
    are 51 pixels wide at 240x320, white ones 94, platelets 20; an image has up to 30 of them. The two boxes
    without an area that the data have are left out.

    Args:
        height: of the images, in pixels.
        width: likewise.
        batch_size: training images a batch.
        test_batch_size: images a batch of validation and test.
        augment: mirror training images left to right and upside down, each with probability 1/2.
        limit: train on at most so many images.

    Raises:
        DataNotFound: the files are nowhere; they are not downloaded.
        InputError: a file is damaged, or ``limit`` leaves nothing to train on.
        MissingDependency: pillow is not installed.
    """
    path = _files.find("bccd", NAMES)
    if path is None:
        raise _files.not_found(
            "bccd",
            NAMES,
            "Get https://github.com/Shenggan/BCCD_Dataset, put its folder BCCD into a folder D/bccd, "
            "and set LILLIPUT_DATA=D.",
        )
    return voc_task(
        path,
        "BCCD",
        CLASSES,
        ("train", "val", "test"),
        (height, width),
        (batch_size, test_batch_size),
        (HORIZONTAL, VERTICAL) if augment else (),
        limit,
    )
