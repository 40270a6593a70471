"""Detection: a two-stage object detector learns from a larger one in both stages and from its features.

Paper: Learning Efficient Object Detection Models with Knowledge Distillation (Chen, Choi, Yu, Han,
Chandraker; NIPS 2017)

The loss (section 3.1) is ``L_RPN + L_RCN + gamma * L_hint``. Of each stage, over the N boxes that were drawn
for it: ``1/N sum L_cls + lambda / N sum L_reg``, with

- section 3.2: ``L_cls = mu * L_hard + (1 - mu) * L_soft``, cross-entropies to the truth and to the teacher.
  ``L_soft = - sum_c w_c P_t(c) log P_s(c)``: as most boxes are background, to take an object for background
  and the reverse are other mistakes than to confuse objects, so ``w_0 = 1.5``, and 1 for all objects. The
  temperature is 1: detection is so hard that softer targets are noise.
- section 3.3: ``L_reg = L_sL1(R_s, y) + nu * L_b``, where ``L_b = ||R_s - y||^2`` if
  ``||R_s - y||^2 + m > ||R_t - y||^2``, and else 0: a teacher's shifts can be wrong, so it is no target but a
  bound. A student that is better than its teacher by the margin m is left alone.
- section 3.4: ``L_hint = ||V - Z||^2`` of the teacher's feature Z and the student's V behind a 1x1
  convolution, which is there even where the shapes agree.

The teacher's second stage judges the *student's* proposals: its own would be others, and other in number.

Faithful: all of the above, in both stages, ``mu = nu = gamma = 0.5``, ``lambda = 1``. Differs: the hint is
the mean over the feature's numbers, for a sum would weigh by the image's size; maps of different sizes are
interpolated, where the paper pads; m is 0 unless it is given. In the first stage, the classes are
background and object. How boxes are drawn is the detector's matter, see :mod:`lilliput.mechanisms.detection`.

Cost: the teacher's backbone and both its stages a step. When not to use it: the teacher needs the student's
classes; without the student's anchors it teaches the second stage only (``first_stage=False``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.types import Batch, Fraction, NonNegative, Positive, Term
from ...errors import ModelMismatch
from ...mechanisms.detection import (
    BETA,
    Parts,
    Sample,
    TwoStage,
    classification_loss,
    draw_anchors,
    draw_proposals,
    of_class,
    parts_of,
    regression_loss,
    two_classes,
)
from ...mechanisms.teacher import seen_by
from ._features import FeatureMethod


def soft_loss(
    student: Tensor, teacher: Tensor, background: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """L_soft of section 3.2: cross-entropy to the teacher, weighted by class, the mean over the boxes.

    Args:
        student: logits, ``(n, 1 + classes)``; class 0 is the background.
        teacher: logits of the same shape.
        background: the weight w_0; all other classes have 1.
        temperature: T; both distributions are softened by it.
    """
    weights = student.new_ones(student.shape[1])
    weights[0] = background
    target = F.softmax(teacher / temperature, -1)
    own = F.log_softmax(student / temperature, -1)
    return -(weights * target * own).sum() / max(1, len(student))


def bounded_loss(student: Tensor, teacher: Tensor, sample: Sample, margin: float = 0.0) -> Tensor:
    """L_b of section 3.3: squared error where the student is not better than its teacher by a margin.

    Args:
        student: shifts, ``(n, 4)``.
        teacher: shifts of the same boxes.
        sample: what they should be; background has no shifts and counts 0.
        margin: m.

    Returns:
        The sum over the boxes, divided by n.
    """
    own = (student - sample.shifts).square().sum(1)
    taught = (teacher - sample.shifts).square().sum(1)
    counts = sample.positive & (own + margin > taught)
    return own.where(counts, 0.0).sum() / max(1, len(own))


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_hint of section 3.4: the squared distance of two features, the mean over their numbers."""
    return F.mse_loss(student, teacher)


@method
class Detection(FeatureMethod):
    """Teach a two-stage detector classes, boxes and features.

    The task's own loss is not asked: its part for the classes has another weight, mu, than that for boxes.

    Attributes:
        teacher: one two-stage detector; see :meth:`~lilliput.core.run.Run.find_network`.
        pairs: place in the student -> place in the teacher, whose features are compared.
        view: which view of the images the teacher looks at; it must have their size.
        hard_weight: mu, of the true classes; the teacher's have the rest.
        background_weight: w_0 in the teacher's part of the classes.
        temperature: T of that part.
        regression_weight: lambda, of the boxes.
        bounded_weight: nu, of the boxes' part that the teacher bounds, relative to the true boxes' part.
        margin: m, in squared shifts: by how much the student must be better to be left alone.
        hint_weight: gamma, of the features; a number or ``{start: 1, end: 0}``. 0 leaves them out.
        first_stage: whether the first stage learns from the teacher too; it then needs the same anchors.

    Example:
        >>> Detection(teacher="previous", background_weight=2.0).hard_weight
        0.5
    """

    example_task: ClassVar[str] = "detection"

    pairs: dict[str, str] = Field(default_factory=lambda: {"backbone": "backbone"})
    hard_weight: Fraction = 0.5
    background_weight: NonNegative = 1.5
    temperature: Positive = 1.0
    regression_weight: NonNegative = 1.0
    bounded_weight: NonNegative = 0.5
    margin: NonNegative = 0.0
    hint_weight: LossWeight = 0.5
    first_stage: bool = True

    _adapters: list[nn.Module] = PrivateAttr(default_factory=list)

    @classmethod
    def example(cls) -> Detection:
        """One whose features keep their channels, whatever is cut beside it."""
        return cls(pairs={"rpn.shifts": "rpn.shifts"})

    def check(self, model: nn.Module) -> None:
        """The student must detect in two stages."""
        _two_stages(model, "student")

    def attach(self, run: Run) -> None:
        """Find the teacher, and build an adapter for each pair of places."""
        self.check(run.model)
        super().attach(run)
        _two_stages(self._teacher.networks[0], "teacher")
        self._adapters = self.adapters(run, "conv1x1") if self.hint_weight else []

    def task_weight(self, run: Run) -> float:
        """The task's loss is a part of this method's."""
        return 0.0

    def loss(self, run: Run) -> dict[str, Term]:
        """The terms of section 3.1."""
        own, target = parts_of(run.output), run.batch.target
        taught = self._answers(run.batch, own)
        anchors = draw_anchors(own.proposed, target)
        regions = draw_proposals(own.proposed.boxes, target)
        return {
            **self._first(own, taught, anchors),
            **self._second(own, taught, regions),
            **self._hint(run),
        }

    @torch.no_grad()
    def _answers(self, batch: Batch, own: Parts) -> Parts:
        """The teacher's first stage, and its second one on the student's proposals."""
        teacher: Any = self._teacher.networks[0]
        proposed = teacher.propose(seen_by(batch, self.view))
        judged = teacher.judge(proposed.maps, own.proposed.boxes)
        if judged.logits.shape != own.judged.logits.shape:
            raise ModelMismatch(
                f"detection: the teacher knows {judged.logits.shape[2] - 1} classes, the student "
                f"{own.judged.logits.shape[2] - 1}. Both need the same."
            )
        return Parts(proposed, judged)

    def _first(self, own: Parts, taught: Parts, drawn: Sample) -> dict[str, Term]:
        logits, shifts = (drawn.of(x) for x in (own.proposed.objectness, own.proposed.shifts))
        if not self.first_stage:
            return {
                "rpn_hard": Term(classification_loss(two_classes(logits), drawn)),
                "rpn_boxes": Term(regression_loss(shifts, drawn, BETA), self.regression_weight),
            }
        _same_anchors(own.proposed.anchors, taught.proposed.anchors)
        told, meant = (drawn.of(x) for x in (taught.proposed.objectness, taught.proposed.shifts))
        return self._stage(
            "rpn", two_classes(logits), two_classes(told), shifts, meant, drawn, BETA
        )

    def _second(self, own: Parts, taught: Parts, drawn: Sample) -> dict[str, Term]:
        logits, told = (drawn.of(x.judged.logits) for x in (own, taught))
        shifts, meant = (of_class(drawn.of(x.judged.shifts), drawn.classes) for x in (own, taught))
        return self._stage("rcn", logits, told, shifts, meant, drawn, 1.0)

    def _stage(
        self,
        name: str,
        logits: Tensor,
        told: Tensor,
        shifts: Tensor,
        meant: Tensor,
        drawn: Sample,
        beta: float,
    ) -> dict[str, Term]:
        """The four terms of one stage, from what student and teacher say of the boxes that were drawn."""
        soft = soft_loss(logits, told, self.background_weight, self.temperature)
        bounded = bounded_loss(shifts, meant, drawn, self.margin)
        regression = self.regression_weight
        return {
            f"{name}_hard": Term(classification_loss(logits, drawn), self.hard_weight),
            f"{name}_soft": Term(soft, 1.0 - self.hard_weight),
            f"{name}_boxes": Term(regression_loss(shifts, drawn, beta), regression),
            f"{name}_bounded": Term(bounded, regression * self.bounded_weight),
        }

    def _hint(self, run: Run) -> dict[str, Term]:
        pairs = self._read()
        if not self._adapters:
            return {}
        self.require_same_width([own for own, _ in pairs])
        losses = [
            hint_loss(adapter(own), taught)
            for adapter, (own, taught) in zip(self._adapters, pairs, strict=True)
        ]
        return {"hint": Term(torch.stack(losses).sum(), weight_at(self.hint_weight, run.progress))}


def _two_stages(network: nn.Module, who: str) -> None:
    if not isinstance(network, TwoStage):
        raise ModelMismatch(
            f"detection: the {who}, a {type(network).__name__}, is no two-stage detector: it lacks propose() "
            "and judge(). Use the architecture 'detector', put a Faster R-CNN of torchvision into "
            "TorchvisionDetector, or give your network these two (lilliput.mechanisms.detection.TwoStage)."
        )


def _same_anchors(own: Tensor, taught: Tensor) -> None:
    if own.shape != taught.shape or not torch.allclose(own, taught, atol=1e-3):
        raise ModelMismatch(
            f"detection: the teacher has {len(taught)} anchors and the student {len(own)}, or they lie "
            "elsewhere, so that the first stages cannot be compared. Give both the same sizes, ratios and "
            "stride, or set first_stage: false."
        )
