"""A compact two-stage object detector in plain torch.

Paper: Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks (Ren, He, Girshick, Sun;
NIPS 2015; arXiv 1506.01497)

A convolutional backbone makes one map, an eighth of the image's height and width. The first stage says at
each anchor whether there is an object, and how the anchor must be shifted; its best boxes, after
suppression, are the proposals. The second stage looks at the map inside each proposal (RoIAlign), says its
class, and shifts it once more.

Faithful: both stages, their parametrization, suppression, and initialization. Differs: a small backbone with
batch normalization that learns from nothing; RoIAlign for RoI pooling; fewer proposals; in training all
proposals are judged and the true boxes are not put among them (see :mod:`lilliput.mechanisms.detection`).

No compiled operator is needed, and every shape follows from the input's, so that the network can be traced
and its channels be cut. To teach it with a detector of torchvision, see
:mod:`lilliput.architectures.torchvision_detector`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.registry import architecture
from ..errors import InputError
from ..mechanisms.boxes import align, anchor_grid, anchor_shapes
from ..mechanisms.detection import Judged, Parts, Proposed, detections, promising
from ._initialize import he_normal

STRIDE = 8
#: Rows and columns into which a proposal is divided.
CELLS = 7


@architecture
def detector(
    width: int = 16,
    classes: int = 3,
    sizes: Sequence[float] = (20, 50, 94),
    ratios: Sequence[float] = (1.0,),
    proposals: int = 96,
    found: int = 60,
) -> nn.Module:
    """A two-stage detector for images of a few hundred pixels a side, 548,463 parameters.

    Input ``(batch, 3, height, width)``. In eval mode the output is the objects, ``(batch, found, 6)``: box,
    probability and class (counted from 1), the most probable first, zeros where there are fewer. In
    train mode it is the answers of both stages, :class:`~lilliput.mechanisms.detection.Parts`.

    Args:
        width: channels of the first convolution; the map has four times as many.
        classes: of objects, the background not counted.
        sizes: sides of the square anchors, in pixels; the defaults fit the task ``bccd``.
        ratios: of an anchor's height to its width, at the same area.
        proposals: boxes of an image that the second stage looks at.
        found: objects of an image, at most.

    Raises:
        InputError: a count or a size is not positive.

    Example:
        >>> net = detector(width=4).eval()
        >>> net(torch.zeros(2, 3, 64, 96)).shape
        torch.Size([2, 60, 6])
    """
    if min(width, classes, proposals, found, *sizes, *ratios, len(sizes), len(ratios)) <= 0:
        raise InputError(
            f"detector: width={width}, classes={classes}, sizes={list(sizes)}, ratios={list(ratios)}, "
            f"proposals={proposals}, found={found}: everything must be positive, and at least one "
            "size and one ratio be given."
        )
    shapes = anchor_shapes(sizes, ratios)
    return Detector(width, classes, shapes, Limits(proposals=proposals, found=found))


class Limits(NamedTuple):
    """How many boxes of an image a detector looks at.

    Attributes:
        before: anchors before suppression.
        proposals: after it.
        found: objects.
        least: a smaller probability is no object.
    """

    before: int = 500
    proposals: int = 96
    found: int = 60
    least: float = 0.01


class TwoStageNetwork(nn.Module):
    """A network that proposes and judges, with what follows from that."""

    limits: Limits

    def propose(self, images: Tensor) -> Proposed:
        """The first stage, on images ``(batch, 3, height, width)``."""
        raise NotImplementedError

    def judge(self, maps: Any, boxes: Tensor) -> Judged:
        """The second stage, on any boxes ``(batch, boxes, 4)``."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Parts | Tensor:
        """In train mode the answers of both stages, in eval mode the objects ``(batch, found, 6)``."""
        proposed = self.propose(images)
        parts = Parts(proposed, self.judge(proposed.maps, proposed.boxes))
        if self.training:
            return parts
        height, width = images.shape[2:]
        return detections(parts, (height, width), self.limits.found, self.limits.least)

    def _proposed(
        self, images: Tensor, maps: Any, anchors: Tensor, objectness: Tensor, shifts: Tensor
    ) -> Proposed:
        height, width = images.shape[2:]
        before, after, *_ = self.limits
        boxes = promising(anchors, objectness, shifts, (height, width), before, after)
        return Proposed(maps, anchors, objectness, shifts, boxes)


class Detector(TwoStageNetwork):
    """Lilliput's own; :func:`detector` builds it.

    Args:
        width: channels of the first convolution.
        classes: of objects.
        shapes: of the anchors, boxes around 0.
        limits: see there.
    """

    shapes: Tensor

    def __init__(
        self, width: int, classes: int, shapes: Sequence[Sequence[float]], limits: Limits
    ) -> None:
        super().__init__()
        self.limits = limits
        self.backbone = _backbone(width)
        self.rpn = _FirstStage(4 * width, len(shapes))
        self.head = _SecondStage(4 * width, 8 * width, classes)
        self.register_buffer("shapes", torch.tensor(shapes), persistent=False)

    def propose(self, images: Tensor) -> Proposed:
        """The first stage, on images ``(batch, 3, height, width)``."""
        maps = self.backbone(images)
        objectness, shifts = self.rpn(maps)
        rows, columns = maps.shape[2:]
        anchors = anchor_grid(self.shapes, rows, columns, STRIDE)
        return self._proposed(images, maps, anchors, objectness, shifts)

    def judge(self, maps: Tensor, boxes: Tensor) -> Judged:
        """The second stage, on any boxes ``(batch, boxes, 4)``."""
        judged: Judged = self.head(align(maps, boxes, CELLS, STRIDE))
        return judged


class _FirstStage(nn.Module):
    """Objectness ``(batch, anchors)`` and shifts ``(batch, anchors, 4)`` from a map."""

    def __init__(self, channels: int, anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.objectness = nn.Conv2d(channels, anchors, 1)
        self.shifts = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in (self.conv, self.objectness, self.shifts):
            _small(layer, 0.01)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.relu(self.conv(maps))
        objectness = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)
        shifts = self.shifts(hidden).permute(0, 2, 3, 1).flatten(1)
        # Boxes of hundreds of pixels need more digits than 16 bits have.
        return objectness.float(), shifts.float().unflatten(1, (-1, 4))


class _SecondStage(nn.Module):
    """Classes and shifts from what :func:`align` cuts out, ``(batch, boxes, channels, cells, cells)``."""

    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels * CELLS**2, hidden)
        self.relu = nn.ReLU()
        self.classes = nn.Linear(hidden, 1 + classes)
        self.shifts = nn.Linear(hidden, 4 * classes)
        he_normal(self.fc)
        _small(self.classes, 0.01)
        _small(self.shifts, 0.001)

    def forward(self, regions: Tensor) -> Judged:
        hidden = self.relu(self.fc(regions.flatten(2)))
        return Judged(
            self.classes(hidden).float(), self.shifts(hidden).float().unflatten(2, (-1, 4))
        )


def _backbone(width: int) -> nn.Sequential:
    """Six convolutions, of which three halve height and width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    plan = [(1, 2), (2, 2), (2, 1), (4, 2), (4, 1), (4, 1)]  # factor of the width, stride
    before = 3
    for number, (factor, stride) in enumerate(plan, 1):
        after = factor * width
        layers[f"conv{number}"] = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(after)
        layers[f"relu{number}"] = nn.ReLU()
        before = after
    return nn.Sequential(layers).apply(he_normal)


def _small(layer: nn.Conv2d | nn.Linear, deviation: float) -> None:
    """Weights around 0, as in the paper: an untrained stage says of everything the same."""
    nn.init.normal_(layer.weight, std=deviation)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
