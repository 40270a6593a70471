"""Two-stage detectors: what they answer while they train, and what they must answer.

A detector of this kind first proposes boxes (from anchors, each with an objectness and a shift), then judges
each proposal (class scores, and a shift a class). :class:`TwoStage` says what such a network can be asked
for, so that losses and methods work with Lilliput's own detector, with torchvision's, and with yours.

Papers: Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks (Ren et al. 2015);
Fast R-CNN (Girshick 2015).

A *target* is a tensor ``(batch, boxes, 6)``: x1, y1, x2, y2, the class counted from 1, and whether the box is
difficult, which excuses it from training and scoring. Rows of zeros fill up where an image has fewer boxes.

The surprising rule: in training all proposals are judged, and the loss then draws those that count. So a loss
needs nothing but output and target, the draws come from torch's seeded generator, and shapes are fixed.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ModelMismatch
from .boxes import clip, decode, encode, iou, suppress

#: What the second stage's shifts are divided by, as in Fast R-CNN; the first stage's are left as they are.
DEVIATION = (0.1, 0.2)
#: Where the absolute error takes over from the squared one in the first stage's loss; 1 in the second's.
BETA = 1 / 9


class Proposed(NamedTuple):
    """What a detector's first stage answers.

    Attributes:
        maps: features that the second stage looks at, in whatever form it likes.
        anchors: ``(anchors, 4)``.
        objectness: logits, ``(batch, anchors)``.
        shifts: of the anchors, ``(batch, anchors, 4)``.
        boxes: the proposals, ``(batch, proposals, 4)``, the best first and without a gradient.
    """

    maps: Any
    anchors: Tensor
    objectness: Tensor
    shifts: Tensor
    boxes: Tensor


class Judged(NamedTuple):
    """What a detector's second stage answers.

    Attributes:
        logits: ``(batch, proposals, 1 + classes)``; class 0 is the background.
        shifts: ``(batch, proposals, classes, 4)``, divided by :data:`DEVIATION`.
    """

    logits: Tensor
    shifts: Tensor


class Parts(NamedTuple):
    """What a two-stage detector answers in train mode."""

    proposed: Proposed
    judged: Judged


@runtime_checkable
class TwoStage(Protocol):
    """A network that detects in two stages; ``forward(images)`` gives :class:`Parts` in train mode."""

    def propose(self, images: Tensor) -> Proposed:
        """The first stage, on images ``(batch, channels, height, width)``."""

    def judge(self, maps: Any, boxes: Tensor) -> Judged:
        """The second stage, on any boxes ``(batch, boxes, 4)``."""


class Sample(NamedTuple):
    """Boxes of a batch that were drawn to count in a loss, n of them.

    Attributes:
        rows: their numbers among all boxes of the batch, ``(n,)``.
        classes: what each should be, 0 for background, ``(n,)``.
        shifts: what would turn each into its target's box, ``(n, 4)``; 0 for background.
    """

    rows: Tensor
    classes: Tensor
    shifts: Tensor

    @property
    def positive(self) -> Tensor:
        """Which of them have an object, bool ``(n,)``."""
        return self.classes > 0

    def of(self, values: Tensor) -> Tensor:
        """The rows of ``(batch, boxes, ...)`` that were drawn, ``(n, ...)``."""
        return values.flatten(0, 1)[self.rows]


# -- what is found ------------------------------------------------------------------------------


def promising(
    anchors: Tensor,
    objectness: Tensor,
    shifts: Tensor,
    size: tuple[int, int],
    before: int,
    after: int,
    overlap: float = 0.7,
) -> Tensor:
    """The proposals of a first stage: its most promising boxes, without those that say the same.

    Args:
        anchors: ``(anchors, 4)``.
        objectness: logits, ``(batch, anchors)``.
        shifts: ``(batch, anchors, 4)``.
        size: height and width of the images.
        before: anchors with the highest objectness that are looked at; never fewer than ``after``.
        after: proposals. Where fewer outlast the suppression, suppressed ones fill up behind them.
        overlap: intersection over union above which the less promising of two boxes is suppressed.

    Returns:
        ``(batch, after, 4)``, without a gradient.
    """
    best = objectness.detach().topk(min(max(before, after), len(anchors)), dim=1).indices
    boxes = clip(decode(_take(shifts.detach(), best), anchors[best]), *size)
    stay = suppress(boxes, overlap)
    # Those that stay come first, and each part keeps its order.
    place = torch.arange(stay.shape[1], device=stay.device) + stay.shape[1] * ~stay
    first = place.topk(min(after, stay.shape[1]), dim=1, largest=False).indices
    return _take(boxes, first)


def detections(
    parts: Parts,
    size: tuple[int, int],
    most: int = 100,
    least: float = 0.01,
    overlap: float = 0.5,
    before: int = 400,
) -> Tensor:
    """The objects that a detector sees.

    Args:
        parts: the answers of both stages.
        size: height and width of the images.
        most: objects of an image.
        least: scores below it are nothing.
        overlap: intersection over union above which the less probable of two boxes of a class goes.
        before: candidates, pairs of a proposal and a class, that are looked at; never fewer than ``most``.

    Returns:
        ``(batch, most, 6)``: box, probability and class (from 1) of each, the most probable first; rows of
        zeros where there are fewer.
    """
    logits, shifts = parts.judged
    scores = logits.softmax(-1)[..., 1:]
    boxes = clip(decode(shifts, parts.proposed.boxes[:, :, None], DEVIATION), *size).flatten(1, 2)
    labels = torch.arange(1, scores.shape[2] + 1, device=scores.device).expand_as(scores).flatten(1)
    scores, best = scores.flatten(1).topk(min(max(before, most), labels.shape[1]), dim=1)
    boxes, labels = _take(boxes, best), labels.gather(1, best)
    seen = suppress(boxes, overlap, labels) & (scores >= least)
    scores, order = (scores * seen).topk(min(most, seen.shape[1]), dim=1)
    rows = torch.cat([boxes, scores.new_zeros(*boxes.shape[:2], 1), labels[..., None]], -1)
    found = _take(rows, order)
    found = torch.cat([found[..., :4], scores[..., None], found[..., 5:]], -1) * (
        scores[..., None] > 0
    )
    return F.pad(found, (0, 0, 0, most - found.shape[1]))


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """The rows of ``(batch, n, width)`` with the numbers ``(batch, m)``."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))


# -- what should be found -----------------------------------------------------------------------


def draw_anchors(
    proposed: Proposed,
    target: Tensor,
    count: int = 256,
    positive: float = 0.5,
    generator: torch.Generator | None = None,
) -> Sample:
    """Anchors for the first stage's loss, as in Faster R-CNN, section 3.1.2.

    An anchor is positive where it overlaps with a box by 0.7 or more, or more than any other anchor does;
    negative where it overlaps with none by 0.3. The class of a positive one is 1.

    Args:
        proposed: the first stage's answers.
        target: see the module's docstring.
        count: anchors of an image.
        positive: fraction of them that may be positive.
        generator: on the processor; by default torch's own.
    """
    anchors = proposed.anchors.expand(len(target), -1, -1)
    overlaps = _overlaps(anchors, target)
    highest, which = overlaps.max(2)
    best = (overlaps == overlaps.amax(1, keepdim=True)) & (overlaps > 0)
    good = (highest >= 0.7) | best.any(2)
    bad = (highest < 0.3) & ~good
    sample = _draw(anchors, target, which, good, bad, count, positive, (1.0, 1.0), generator)
    return sample._replace(classes=sample.positive.long())


def draw_proposals(
    boxes: Tensor,
    target: Tensor,
    count: int = 64,
    positive: float = 0.25,
    generator: torch.Generator | None = None,
) -> Sample:
    """Proposals for the second stage's loss, as in Fast R-CNN, section 2.3.

    A proposal belongs to the box with which it overlaps most, by 0.5 at least; else it is background.

    Args:
        boxes: the proposals, ``(batch, proposals, 4)``.
        target: see the module's docstring.
        count: proposals of an image.
        positive: fraction of them that may have an object.
        generator: on the processor; by default torch's own.
    """
    highest, which = _overlaps(boxes, target).max(2)
    good = highest >= 0.5
    return _draw(boxes, target, which, good, ~good, count, positive, DEVIATION, generator)


def _overlaps(boxes: Tensor, target: Tensor) -> Tensor:
    """Intersection over union with the targets' boxes, -1 with those that do not count."""
    counts = (target[..., 4] > 0) & (target[..., 5] == 0)
    return torch.where(counts[:, None], iou(boxes, target[..., :4]), -1.0)


def _draw(
    boxes: Tensor,
    target: Tensor,
    which: Tensor,
    good: Tensor,
    bad: Tensor,
    count: int,
    positive: float,
    deviation: tuple[float, float],
    generator: torch.Generator | None,
) -> Sample:
    """At most ``positive * count`` good boxes an image, and bad ones to fill it up."""
    keys = torch.rand(good.shape, generator=generator).to(boxes.device)
    chosen = _random(good, int(positive * count), keys)
    chosen = chosen | _random(bad, count - chosen.sum(1, keepdim=True), keys)
    rows = chosen.flatten().nonzero()[:, 0]
    meant = _take(target, which).flatten(0, 1)[rows]
    has_object = good.flatten()[rows]
    shifts = encode(meant[:, :4], boxes.flatten(0, 1)[rows], deviation)
    shifts = shifts.where(has_object[:, None], 0.0)  # of background it may be infinite
    return Sample(rows, meant[:, 4].long() * has_object, shifts)


def _random(candidates: Tensor, most: int | Tensor, keys: Tensor) -> Tensor:
    """At most so many of the candidates of each row, those with the highest keys."""
    order = keys.masked_fill(~candidates, -1.0).argsort(1, descending=True)
    return candidates & (order.argsort(1) < most)


# -- losses -------------------------------------------------------------------------------------


def two_classes(objectness: Tensor) -> Tensor:
    """Objectness logits ``(...)`` as logits ``(..., 2)`` of background and object."""
    return torch.stack([torch.zeros_like(objectness), objectness], -1)


def of_class(shifts: Tensor, classes: Tensor) -> Tensor:
    """Of the shifts ``(n, classes, 4)`` of all classes those of one class each, ``(n, 4)``."""
    place = (classes - 1).clamp(min=0)[:, None, None].expand(-1, 1, 4)
    return shifts.gather(1, place)[:, 0]


def regression_loss(shifts: Tensor, sample: Sample, beta: float = 1.0) -> Tensor:
    """Smooth L1 of the shifts of boxes with an object, summed, over the number of all boxes drawn.

    Args:
        shifts: ``(n, 4)``.
        sample: what they should be.
        beta: the error at which squared becomes absolute.
    """
    errors = F.smooth_l1_loss(shifts, sample.shifts, beta=beta, reduction="none").sum(1)
    return (errors * sample.positive).sum() / max(1, len(errors))


def classification_loss(logits: Tensor, sample: Sample) -> Tensor:
    """Cross-entropy, the mean over the boxes that were drawn.

    Args:
        logits: ``(n, 1 + classes)``.
        sample: what they should say.
    """
    return F.cross_entropy(logits, sample.classes, reduction="sum") / max(1, len(logits))


def detection_loss(
    output: Parts, target: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """The loss of Faster R-CNN: classes and shifts, of both stages, each with the weight 1.

    Args:
        output: of a two-stage detector in train mode.
        target: see the module's docstring.
        generator: of the draws, on the processor; by default torch's own, which a run seeds.

    Raises:
        ModelMismatch: the output is another one.
    """
    proposed, judged = parts_of(output)
    anchors = draw_anchors(proposed, target, generator=generator)
    regions = draw_proposals(proposed.boxes, target, generator=generator)
    shifts = of_class(regions.of(judged.shifts), regions.classes)
    return (
        classification_loss(two_classes(anchors.of(proposed.objectness)), anchors)
        + regression_loss(anchors.of(proposed.shifts), anchors, BETA)
        + classification_loss(regions.of(judged.logits), regions)
        + regression_loss(shifts, regions)
    )


def parts_of(output: Any) -> Parts:
    """The output of a two-stage detector in train mode.

    Raises:
        ModelMismatch: it is something else.
    """
    if isinstance(output, Parts):
        return output
    raise ModelMismatch(
        f"a two-stage detector in train mode answers with Parts(proposed, judged), and here is a "
        f"{type(output).__name__}. Is the model in eval mode, or is it no detector of this kind?"
    )
