"""Soft targets: a student learns the softened class probabilities of its teacher.

Paper: Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean; NIPS Deep Learning
Workshop 2014; arXiv 1503.02531)

Equation 1: ``q_i = exp(z_i / T) / sum_j exp(z_j / T)``. The loss is ``hard_weight * H(y, q at T=1)`` plus
``soft_weight * T**2 * KL(teacher at T || student at T)``; the factor ``T**2`` keeps the weight of the soft
targets when T changes, because their gradients shrink with ``1 / T**2``. Equations 2 to 4: where T is high
and the logits of each sample have the mean 0, the gradient is ``(z_s - z_t) / classes``, that of the
squared distance of the logits (see ``logits``).

Faithful: loss, temperature, ensembles by the arithmetic or the geometric mean of the members' softened
distributions. Differs: the Kullback-Leibler divergence stands for the cross-entropy, which has the same
gradient and is zero when the student agrees. Both weights may move while the stage trains.

The paper's other two ideas have files of their own: ``class_bias`` for classes that the transfer set
lacks, :mod:`~lilliput.methods.distill.specialists` for ensembles of specialists.

Cost: the teacher's forward pass a step; nothing when its outputs are cached. When not to use it: with
random augmentation there is no cache; with two classes soft targets say little.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.types import Positive, Term
from ._responses import ResponseMethod, log_mean


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T**2 * KL(teacher || student)`` at temperature T, the mean over all predictions.

    Args:
        student: logits, shape ``(..., classes)``.
        teacher: log-probabilities at temperature T, same shape.
        temperature: T.
    """
    own = F.log_softmax(student.reshape(-1, student.shape[-1]) / temperature, dim=-1)
    target = teacher.reshape(own.shape)
    return F.kl_div(own, target, reduction="batchmean", log_target=True) * temperature**2


def soften(logits: Tensor, temperature: float, mean: Literal["arithmetic", "geometric"]) -> Tensor:
    """Log-probabilities at a temperature of a teacher or an ensemble.

    Args:
        logits: shape ``(members, ..., classes)``.
        temperature: T.
        mean: of the members' distributions.
    """
    if len(logits) == 1:
        return F.log_softmax(logits[0] / temperature, dim=-1)
    if mean == "geometric":
        return F.log_softmax(logits.mean(dim=0) / temperature, dim=-1)
    return log_mean(F.log_softmax(logits / temperature, dim=-1))


@method
class SoftTargets(ResponseMethod):
    """Learn from a teacher's softened outputs, beside the labels.

    Attributes:
        teacher: ``"original"`` (the network before compression), ``"previous"``, the name of an earlier
            stage, a file, an architecture with weights, a module, or a list of these for an ensemble.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.
        temperature: T.
        soft_weight: of the soft targets, a number or ``{start: 4, end: 1}``; the factor T**2 is applied
            beside it.
        hard_weight: of the task's own loss, likewise; 0 needs no labels.
        mean: how an ensemble's distributions are averaged.

    Example:
        >>> SoftTargets(teacher="original", temperature=4.0).hard_weight
        0.5
    """

    temperature: Positive = 4.0
    soft_weight: LossWeight = 0.5
    hard_weight: LossWeight = 0.5
    mean: Literal["arithmetic", "geometric"] = "arithmetic"

    def task_weight(self, run: Run) -> float:
        """The weight of the hard targets."""
        return weight_at(self.hard_weight, run.progress)

    def loss(self, run: Run) -> dict[str, Term]:
        """The soft targets' term."""
        own, taught = self.answers(run)
        target = soften(taught, self.temperature, self.mean)
        value = soft_target_loss(own, target, self.temperature)
        return {"soft_targets": Term(value, weight_at(self.soft_weight, run.progress))}
