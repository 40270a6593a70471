"""Mean average precision of detections, by the rules of the PASCAL visual object classes challenge.

Paper: The Pascal Visual Object Classes (VOC) Challenge (Everingham, Van Gool, Williams, Winn, Zisserman;
International Journal of Computer Vision 2010; doi 10.1007/s11263-009-0275-4)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..mechanisms.boxes import iou


class MeanAveragePrecision:
    """The mean over the classes of the area under precision against recall, in percent.

    A detection is right if, of the boxes of its class in its image, the one with which it overlaps most is
    overlapped enough and was not claimed by a more probable detection. Detections of difficult boxes
    count neither way. Classes without a box are left out of the mean.

    The area is that under the precision's envelope, as the challenge has it since 2010; with ``points=11``
    it is the mean of the envelope at recalls 0, 0.1, ..., 1, as before. Boxes are continuous here: the
    challenge's code adds a pixel to width and height.

    Args:
        classes: how many there are, the background not counted.
        overlap: intersection over union that is enough.
        points: see above.

    Example:
        >>> metric = MeanAveragePrecision(classes=2)
        >>> box = [0.0, 0.0, 8.0, 8.0]
        >>> seen = torch.tensor([[[*box, 0.9, 1.0], [20.0, 20, 28, 28, 0.8, 2]]])
        >>> metric.update(seen, torch.tensor([[[*box, 1.0, 0.0], [*box, 2.0, 0.0]]]))
        >>> metric.compute(), metric.per_class()
        (50.0, [100.0, 0.0])
    """

    def __init__(self, classes: int, overlap: float = 0.5, points: int | None = None) -> None:
        if classes < 1 or not 0 < overlap < 1 or (points is not None and points < 2):
            raise InputError(
                f"MeanAveragePrecision: classes={classes}, overlap={overlap}, points={points}: give at "
                "least 1 class, an overlap between 0 and 1, and 2 points or none."
            )
        self.classes, self.overlap, self.points = classes, overlap, points
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._seen: list[Tensor] = []
        self._boxes = torch.zeros(self.classes + 1, dtype=torch.long)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            output: ``(batch, detections, 6)``: box, probability, class from 1; class 0 is none.
            target: ``(batch, boxes, 6)``: box, class from 1 (0 is none), and whether it is difficult.

        Raises:
            ValueError: these are no such tensors.
        """
        _check(output, target)
        # A row of zeros is no box, and spares the maxima below from looking for one among none.
        output, target = (
            F.pad(rows.detach().float().cpu(), (0, 0, 0, 1)) for rows in (output, target)
        )
        right, excused = _judge(output, target, self.overlap)
        counted = (output[..., 5] > 0) & ~excused
        told = torch.stack([output[..., 4], output[..., 5], right.float()], -1)
        self._seen.append(told[counted])
        labels = target[..., 4][target[..., 5] == 0].long()
        self._boxes += labels.bincount(minlength=self.classes + 1)[: self.classes + 1]

    def per_class(self) -> list[float | None]:
        """The average precision of each class, in percent; None for one without a box."""
        seen = torch.cat(self._seen) if self._seen else torch.zeros(0, 3)
        found = []
        for number in range(1, self.classes + 1):
            score, _, right = seen[seen[:, 1] == number].unbind(1)
            order = score.argsort(dim=0, descending=True, stable=True)
            boxes = int(self._boxes[number])
            area = average_precision(right[order], boxes, self.points) if boxes else None
            found.append(None if area is None else 100.0 * area)
        return found

    def compute(self) -> float:
        """The mean of the classes that have boxes, in percent.

        Raises:
            InputError: there is no box at all.
        """
        known = [area for area in self.per_class() if area is not None]
        if not known:
            raise InputError(
                "mean average precision: the targets have no box, so nothing can be found. Check the "
                "split, and the classes' numbers (from 1)."
            )
        return sum(known) / len(known)


def average_precision(right: Tensor, boxes: int, points: int | None = None) -> float:
    """The area under precision against recall, from 0 to 1.

    Args:
        right: 1 for a right detection, else 0, the most probable first, ``(detections,)``.
        boxes: how many there were to find.
        points: recalls at which the precision is averaged; None for the whole area.
    """
    hits = right.double().cumsum(0)
    recall, precision = hits / boxes, hits / torch.arange(1, len(hits) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    if points is None:
        return float((recall.diff(prepend=recall.new_zeros(1)) * envelope).sum())
    wanted = torch.arange(points, dtype=torch.double) / (points - 1)
    # A hair below: 3/10 as a sum may lie above 0.3 as a quotient.
    reached = recall[None] >= wanted[:, None] - 1e-9
    return float((reached * envelope).amax(1).mean()) if len(hits) else 0.0


def _judge(output: Tensor, target: Tensor, overlap: float) -> tuple[Tensor, Tensor]:
    """Which detections are right, and which claim a difficult box, both bool ``(batch, detections)``."""
    same = (output[..., 5][..., None] == target[:, None, :, 4]) & (target[:, None, :, 4] > 0)
    overlaps = torch.where(same, iou(output[..., :4], target[..., :4]), -1.0)
    highest, which = overlaps.max(2)
    enough = highest >= overlap
    claims = enough[..., None] & (which[..., None] == torch.arange(target.shape[1]))
    order = output[..., 4].argsort(dim=1, descending=True, stable=True)
    place = order.argsort(1)[..., None].where(claims, output.shape[1])
    right = (claims & (place == place.amin(1, keepdim=True))).any(2)
    difficult = (target[..., 5] > 0).gather(1, which) & enough
    return right & ~difficult, difficult


def _check(output: Tensor, target: Tensor) -> None:
    for what, tensor in {"detections": output, "targets": target}.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 3 or tensor.shape[2] != 6:
            shape = tuple(getattr(tensor, "shape", ())) or type(tensor).__name__
            raise ValueError(f"{what} should have the shape (batch, boxes, 6), not {shape}")
