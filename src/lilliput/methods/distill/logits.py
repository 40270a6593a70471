"""Logit regression: a student learns the numbers that its teacher puts into the softmax.

Paper: Do Deep Nets Really Need to be Deep? (Ba, Caruana; NIPS 2014; arXiv 1312.6184)

The loss is ``1 / (2 N) * sum_n ||z_s(x_n) - z_t(x_n)||**2`` over the N samples of a batch, z the logits: a
sum over the classes, and no label anywhere, so that the transfer set needs none. Wide shallow students
learn it slowly; the paper puts a linear bottleneck in front of the wide layer, W = U V, which is the
option ``bottleneck`` of the architecture ``mlp``.

``standardize`` divides the differences of each class by the standard deviation of the teacher's logit of
that class over the training set, which is what standardizing the targets means to the loss: the mean
cancels out, and the student still gives logits.

Faithful: loss, bottleneck, an ensemble teaches with the mean of its members' logits. Differs: labels can be
learned beside it (``hard_weight``), which the paper does not do.

The surprising rule: the value grows with the square of the teacher's logits, which are 10 and more where the
teacher is sure. It needs a smaller learning rate than cross-entropy, or ``standardize``.

Cost: the teacher's forward pass a step; nothing when its outputs are cached. When not to use it: a student
too small to follow the exact logits wastes itself on those of hopeless classes; soft targets of a low
temperature leave them out.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.task import move, read
from ...core.types import Term
from ...errors import InputError
from ._responses import ResponseMethod


def logit_loss(student: Tensor, teacher: Tensor, deviation: Tensor | None = None) -> Tensor:
    """``1 / (2 N) * sum ||z_s - z_t||**2``, N the number of predictions.

    Args:
        student: logits, shape ``(..., classes)``.
        teacher: the same.
        deviation: shape ``(classes,)``; what the difference of each class is divided by.
    """
    difference = student - teacher
    if deviation is not None:
        difference = difference / deviation
    return 0.5 * difference.square().sum(dim=-1).mean()


@method
class Logits(ResponseMethod):
    """Regress the teacher's logits, without labels.

    Attributes:
        teacher: ``"original"`` (the network before compression), ``"previous"``, the name of an earlier
            stage, a file, an architecture with weights, a module, or a list of these for an ensemble.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.
        weight: of the regression, a number or ``{start: 4, end: 1}``.
        hard_weight: of the task's own loss, likewise.
        standardize: see the module's docstring; the teacher looks at the whole training set first.

    Example:
        >>> Logits(teacher="original").hard_weight
        0.0
    """

    softmax: ClassVar[bool] = False

    weight: LossWeight = 1.0
    hard_weight: LossWeight = 0.0
    standardize: bool = False

    def attach(self, run: Run) -> None:
        """Find the teacher, and how far its logits spread."""
        super().attach(run)
        if self.standardize:
            # Remembered, because sums in the order of another epoch would differ in the last bit.
            self.memory(run)["deviation"] = self._deviation(run)

    def task_weight(self, run: Run) -> float:
        """The weight of the labels."""
        return weight_at(self.hard_weight, run.progress)

    def loss(self, run: Run) -> dict[str, Term]:
        """The regression's term."""
        own, taught = self.answers(run)
        deviation = self.memory(run)["deviation"].to(own.device) if self.standardize else None
        value = logit_loss(own, taught.mean(dim=0), deviation)
        return {"logits": Term(value, weight_at(self.weight, run.progress))}

    def _deviation(self, run: Run) -> Tensor:
        """Standard deviation of the teacher's logit of each class over the training set."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for item in read(run.task.train, "the training batches"):
            outputs = self._source.outputs(move(item, run.device))
            logits = self.classes_last(outputs, 1).mean(dim=0).flatten(0, -2).double().cpu()
            count, total = count + len(logits), total + logits.sum(dim=0)
            squares = squares + logits.square().sum(dim=0)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0.0).sqrt()
        constant = (deviation <= 1e-6 * mean.abs()).nonzero().flatten().tolist()
        if constant:
            raise InputError(
                f"logits: the teacher gives the classes {constant} the same logit for every training "
                "sample: there is nothing to standardize by. Leave standardize out."
            )
        return deviation.float()
