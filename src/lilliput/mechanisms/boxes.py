"""Boxes in images: overlap, shifts from anchors, suppression, and features of a fixed size from inside a box.

A box is ``(x1, y1, x2, y2)`` in pixels, continuous coordinates, x to the right, y down; an image of width w
reaches from 0 to w. Everything works on whole batches, in plain torch, and the shape of what is returned
follows from the shapes that are given, never from values.

Papers: Rich feature hierarchies for accurate object detection (Girshick et al. 2014) for the shifts; Mask
R-CNN (He et al. 2017) for RoIAlign.

The surprising rule: RoIAlign is a pair of matrix products. Bilinear interpolation is separable, so a box's
samples are ``rows @ map @ columns`` with two small matrices of weights. On a processor that is faster than
``grid_sample``, and it works in torch's deterministic mode on a GPU; it costs more where maps are large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: A shift may enlarge a box by this factor at most, so that an untrained network gives finite boxes.
LARGEST = math.log(1000.0 / 16)


def areas(boxes: Tensor) -> Tensor:
    """Areas of boxes ``(..., 4)``, in square pixels; 0 where a box is turned inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each box with each other one; 0 for boxes without an area.

    Args:
        boxes: ``(..., n, 4)``.
        others: ``(..., m, 4)``.

    Returns:
        ``(..., n, m)``, from 0 to 1.

    Example:
        >>> iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 1, 2]]))
        tensor([[0.5000]])
    """
    left = torch.maximum(boxes[..., :, None, :2], others[..., None, :, :2])
    right = torch.minimum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    common = (right - left).clamp(min=0).prod(-1)
    union = areas(boxes)[..., :, None] + areas(others)[..., None, :] - common
    return common / union.clamp(min=torch.finfo(union.dtype).tiny)


def encode(boxes: Tensor, anchors: Tensor, deviation: Sequence[float] = (1.0, 1.0)) -> Tensor:
    """The shifts that turn anchors into boxes: ``(dx / w, dy / h, log w'/w, log h'/h)``.

    Args:
        boxes: ``(..., 4)``, with an area.
        anchors: ``(..., 4)``, with an area.
        deviation: what the shifts of centers and of sizes are divided by, so that they are about 1.
    """
    center, size = _centered(boxes)
    own_center, own_size = _centered(anchors)
    moved = (center - own_center) / own_size / deviation[0]
    return torch.cat([moved, (size / own_size).log() / deviation[1]], -1)


def decode(shifts: Tensor, anchors: Tensor, deviation: Sequence[float] = (1.0, 1.0)) -> Tensor:
    """The boxes that shifts make of anchors, the inverse of :func:`encode`.

    Args:
        shifts: ``(..., 4)``.
        anchors: ``(..., 4)``.
        deviation: as it was for :func:`encode`.

    Example:
        >>> decode(torch.tensor([0.5, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 4.0, 2.0]))
        tensor([2., 0., 6., 2.])
    """
    center, size = _centered(anchors)
    center = center + shifts[..., :2] * deviation[0] * size
    size = size * (shifts[..., 2:] * deviation[1]).clamp(max=LARGEST).exp()
    return torch.cat([center - size / 2, center + size / 2], -1)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """The parts of boxes ``(..., 4)`` inside an image."""
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def anchor_shapes(sizes: Sequence[float], ratios: Sequence[float]) -> list[list[float]]:
    """Boxes around 0 with the areas ``size**2`` and the given ratios of height to width.

    Example:
        >>> anchor_shapes([8], [1, 4])
        [[-4.0, -4.0, 4.0, 4.0], [-2.0, -8.0, 2.0, 8.0]]
    """
    halves = [(s / r**0.5 / 2, s * r**0.5 / 2) for s in sizes for r in ratios]
    return [[-x, -y, x, y] for x, y in halves]


def anchor_grid(shapes: Tensor, rows: int, columns: int, stride: float) -> Tensor:
    """Each shape around the center of each cell of a map.

    Args:
        shapes: ``(shapes, 4)``, around 0.
        rows: of the map.
        columns: of the map.
        stride: pixels from one cell to the next.

    Returns:
        ``(rows * columns * shapes, 4)``: row after row, and in a cell shape after shape.
    """
    y = (torch.arange(rows, device=shapes.device) + 0.5) * stride
    x = (torch.arange(columns, device=shapes.device) + 0.5) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    return (torch.stack([x, y, x, y], -1)[:, :, None] + shapes).reshape(-1, 4)


def suppress(boxes: Tensor, overlap: float, labels: Tensor | None = None) -> Tensor:
    """Non-maximum suppression: a box goes if one before it stays and overlaps with it.

    The greedy rule is a fixed point: a box stays exactly if no box before it both stays and overlaps.
    Applied to all boxes at once and repeated, the rule has settled the first n boxes after n rounds,
    mostly all of them after a few; it is done when a round changes nothing.

    Args:
        boxes: ``(..., n, 4)``, the best first.
        overlap: intersection over union above which one of two goes.
        labels: ``(..., n)``; boxes with different labels leave each other alone.

    Returns:
        Which boxes stay, bool ``(..., n)``.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [2, 0, 12, 10]])
        >>> suppress(boxes, 0.7)
        tensor([ True, False,  True])
    """
    rivals = iou(boxes, boxes) > overlap
    if labels is not None:
        rivals = rivals & (labels[..., :, None] == labels[..., None, :])
    rivals = rivals.triu(1)
    stay = torch.ones_like(rivals[..., 0, :])
    while True:
        before, stay = stay, ~(stay[..., :, None] & rivals).any(-2)
        if stay.is_meta or torch.equal(before, stay):  # on the meta device only shapes count
            return stay


def align(
    maps: Tensor, boxes: Tensor, cells: int, stride: float, samples: int = 2, *, half: bool = True
) -> Tensor:
    """RoIAlign: the mean of bilinear samples in each cell of each box.

    A sample's place is never rounded. One beyond the map by more than a cell counts as 0, one beyond its
    outermost centers takes their value.

    Args:
        maps: ``(batch, channels, rows, columns)``.
        boxes: ``(batch, boxes, 4)``, in pixels of the image; they get no gradient.
        cells: rows, and columns, into which a box is divided.
        stride: pixels of the image from one entry of the map to the next.
        samples: in a row, and in a column, of a cell.
        half: whether an entry's center lies half a stride inside; False for networks trained without.

    Returns:
        ``(batch, boxes, channels, cells, cells)``.

    Example:
        >>> ramp = torch.arange(8.0).expand(1, 1, 8, 8)
        >>> align(ramp, torch.tensor([[[2.0, 2, 6, 6]]]), cells=2, stride=1)[0, 0, 0]
        tensor([[2.5000, 4.5000],
                [2.5000, 4.5000]])
    """
    places = boxes.detach() / stride - (0.5 if half else 0.0)
    across, down = (
        _weights(places[..., axis], places[..., axis + 2], cells, samples, maps.shape[3 - axis])
        for axis in (0, 1)
    )
    rows = torch.einsum("bnyh,bchw->bnycw", down.to(maps.dtype), maps)
    return torch.einsum("bnycw,bnxw->bncyx", rows, across.to(maps.dtype))


def _weights(low: Tensor, high: Tensor, cells: int, samples: int, length: int) -> Tensor:
    """What each entry along one axis contributes to each cell, ``(..., cells, length)``."""
    count = cells * samples
    steps = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
    places = low[..., None] + (high - low)[..., None] * steps
    inside = (places >= -1) & (places <= length)
    entries = torch.arange(length, device=low.device, dtype=low.dtype)
    distance = (places.clamp(0, length - 1)[..., None] - entries).abs()
    weights = (1 - distance).clamp(min=0) * inside[..., None]
    mean: Tensor = weights.unflatten(-2, (cells, samples)).mean(-2)
    return mean


def _centered(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centers and sizes, both ``(..., 2)``."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + size / 2, size
