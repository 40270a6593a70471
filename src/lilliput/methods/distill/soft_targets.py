"""Soft targets: a student learns the softened class probabilities of its teacher.

Paper: Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean; NIPS Deep Learning
Workshop 2014; arXiv 1503.02531)

Equation 1: ``q_i = exp(z_i / T) / sum_j exp(z_j / T)``. The loss is ``hard_weight * H(y, q at T=1)`` plus
``soft_weight * T**2 * KL(teacher at T || student at T)``; the factor ``T**2`` keeps the weight of the soft
targets when T changes, because their gradients shrink with ``1 / T**2``.

Faithful: loss, temperature, ensembles by the arithmetic or the geometric mean of the members' softened
distributions. Differs: the Kullback-Leibler divergence stands for the cross-entropy, which has the same
gradient and is zero when the student agrees.

Cost: the teacher's forward pass a step; nothing when its outputs are cached. When not to use it: with
random augmentation there is no cache; with two classes soft targets say little.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import gettempdir
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.types import Change, NonNegative, Positive
from ...errors import ModelMismatch
from ...mechanisms.teacher import Cached, Source, shared_teacher


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
    each = F.log_softmax(logits / temperature, dim=-1)
    return each.logsumexp(dim=0) - torch.log(torch.tensor(float(len(logits))))


@method
class SoftTargets(Method):
    """Learn from a teacher's softened outputs, beside the labels.

    Attributes:
        teacher: ``"original"`` (the network before compression), a file, an architecture with
            weights, a module, or a list of these for an ensemble.
        temperature: T.
        soft_weight: of the soft targets; the factor T**2 is applied beside it.
        hard_weight: of the task's own loss; 0 needs no labels.
        mean: how an ensemble's distributions are averaged.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.

    Example:
        >>> SoftTargets(teacher="original", temperature=4.0).hard_weight
        0.5
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    teacher: Any = "original"
    temperature: Positive = 4.0
    soft_weight: NonNegative = 0.5
    hard_weight: NonNegative = 0.5
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    cache: bool | str = False

    _source: Source = PrivateAttr()

    def attach(self, run: Run) -> None:
        """Find the teacher, and record its outputs if they are to be cached."""
        live = shared_teacher(run, self.teacher)
        self._source = live
        if self.cache:
            self._source = Cached(self._cache_file(run), live, run.task.train, run.device)

    def task_weight(self, run: Run) -> float:
        """The weight of the hard targets."""
        return self.hard_weight

    def loss(self, run: Run) -> dict[str, Tensor]:
        """The soft targets' term."""
        logits = self._source.outputs(run.batch)
        if logits.shape[1:] != run.output.shape:
            raise ModelMismatch(
                f"soft_targets: the teacher's outputs have the shape {tuple(logits.shape[1:])}, the "
                f"student's {tuple(run.output.shape)}. Both need the same classes."
            )
        target = soften(logits, self.temperature, self.mean)
        value = soft_target_loss(run.output, target, self.temperature)
        return {"soft_targets": self.soft_weight * value}

    def finish(self, run: Run) -> list[Change]:
        """The teacher must be what it was; the model's change shows in its score."""
        self._source.check()
        return []

    def _cache_file(self, run: Run) -> Path:
        if isinstance(self.cache, str):
            return Path(self.cache)
        folder = run.directory if run.directory is not None else Path(gettempdir())
        return folder / f"teacher-{run.stage}.f16"
