"""Own labels: what a network is surest of becomes the label, for samples without one or for all.

Paper: Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks (Lee;
ICML Workshop on Challenges in Representation Learning 2013)

The loss is ``1/n sum L(y, f(x)) + alpha(t) * 1/n' sum L(y', f(x'))``. The first sum is over the n samples of
a batch with a label, the second one over the n' without; their label is the class that the network itself
gives the largest probability, ``y' = argmax_i f_i(x')``. The weight alpha starts at 0 and rises on a straight
line, for at first these labels are mostly wrong: ``weight: {start: 0, end: 3, over: 0.5}``.

Faithful, with ``teacher: self``: the labels are those of the network of this very step. By default they are
those of its earlier generation, the network at the end of the previous stage, which then need no ramp; it may
label all samples (``which: all``), and only those of which it is sure (``threshold``). The task's own loss
sees the samples with labels alone; it must leave out the others, as torch's cross-entropy does for -100.

Cost: the earlier generation's forward pass a step; none with ``teacher: self``. When not to use it: where
soft targets can be had, for a hard label of a wrong class says nothing of the right one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.types import Change, Fraction, Term
from ...errors import ModelMismatch, NothingMatched
from ...mechanisms.teacher import logits_of
from ._responses import ResponseMethod, log_mean


def own_labels(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest class of each prediction, and its probability.

    Args:
        logits: ``(members, samples, classes)``; the members' probabilities are averaged.

    Example:
        >>> label, sure = own_labels(torch.tensor([[[0.0, 2.0]]]))
        >>> label.tolist(), round(float(sure), 2)
        ([1], 0.88)
    """
    sure, label = log_mean(F.log_softmax(logits, dim=-1)).max(dim=-1)
    return label, sure.exp()


def chosen_cross_entropy(student: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the cross-entropy over the chosen samples; 0 where there are none.

    Args:
        student: logits, ``(samples, classes)``.
        labels: int64 ``(samples,)``.
        chosen: bool ``(samples,)``.
    """
    losses = F.cross_entropy(student, labels, reduction="none")
    return (losses * chosen).sum() / chosen.sum().clamp(min=1)


@method
class SelfLabels(ResponseMethod):
    """Learn the classes that the network's earlier generation finds likeliest, as if they were labels.

    Attributes:
        teacher: who labels: ``"previous"``, the name of an earlier stage, a file, an architecture with
            weights, a module, a list of these; or ``"self"``, the network of this very step.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.
        which: the samples that get own labels: ``"all"``, or the ``"unlabeled"`` ones.
        unlabeled: the target that stands for no label.
        threshold: the least probability of the likeliest class.
        weight: of this loss, a number or ``{start: 0, end: 3, over: 0.5}``.
        hard_weight: of the task's own loss, likewise; 0 does without labels.

    Example:
        >>> SelfLabels(which="unlabeled", threshold=0.9).teacher
        'previous'
    """

    teacher: Any = "previous"
    which: Literal["all", "unlabeled"] = "all"
    unlabeled: int = -100
    threshold: Fraction = 0.0
    weight: LossWeight = 1.0
    hard_weight: LossWeight = 1.0

    def attach(self, run: Run) -> None:
        """Find who labels."""
        if self.teacher != "self":
            super().attach(run)
        self.memory(run)["chosen"] = 0

    def task_weight(self, run: Run) -> float:
        """The weight of the labels; 0 for a batch without any."""
        weight = weight_at(self.hard_weight, run.progress)
        return weight if weight == 0 or bool(self._labeled(run).any()) else 0.0

    def loss(self, run: Run) -> dict[str, Term]:
        """The term of the own labels."""
        own, taught = self._answers(run)
        labels, sure = own_labels(taught)
        chosen = sure >= self.threshold
        if self.which == "unlabeled":
            chosen = chosen & ~self._labeled(run).reshape(-1)
        self.memory(run)["chosen"] += int(chosen.sum())
        run.log("self_labels/share", chosen.float().mean())
        value = chosen_cross_entropy(own, labels, chosen)
        return {"self_labels": Term(value, weight_at(self.weight, run.progress))}

    def finish(self, run: Run) -> list[Change]:
        """The teacher must be what it was, and it must have labeled something.

        Raises:
            NothingMatched: not one sample was given a label.
        """
        if run.step and not self.memory(run)["chosen"]:
            without = f" without a label (target {self.unlabeled})" if self.which != "all" else ""
            raise NothingMatched(
                f"self_labels: no sample{without} had a class of probability {self.threshold} or more in the "
                "whole stage. Lower the threshold, or look at which samples are meant."
            )
        return [] if self.teacher == "self" else super().finish(run)

    def _answers(self, run: Run) -> tuple[Tensor, Tensor]:
        """Logits ``(samples, classes)`` of the student and ``(members, samples, classes)``."""
        if self.teacher == "self":
            own = self.classes_last(logits_of(run.output, "the student"), 0).flatten(0, -2)
            return own, own.detach().unsqueeze(0)
        student, taught = self.answers(run)
        return student.flatten(0, -2), taught.flatten(1, -2)

    def _labeled(self, run: Run) -> Tensor:
        target = run.batch.target
        if self.which == "all":
            return torch.ones(1, dtype=torch.bool)
        if not isinstance(target, Tensor) or target.is_floating_point():
            raise ModelMismatch(
                "self_labels: which='unlabeled' looks for targets that stand for no label, so the targets "
                f"must be class numbers, not {type(target).__name__}."
            )
        return target != self.unlabeled
