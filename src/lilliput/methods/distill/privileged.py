"""Generalized distillation: the teacher sees what the student will never see.

Paper: Unifying Distillation and Privileged Information (Lopez-Paz, Bottou, Schoelkopf, Vapnik; ICLR 2016;
arXiv 1511.03643)

A teacher learns from privileged inputs x* (the sharp image, the doctor's report), a student from the
regular ones x. Equations 4 and 5, with sigma the softmax and lambda the imitation::

    f_s = argmin 1/n sum_i [(1 - lambda) H(y_i, sigma(f(x_i))) + lambda H(s_i, sigma(f(x_i)))]
    s_i = sigma(f_t(x*_i) / T)

Only the teacher is divided by the temperature. With x* = x this is distillation; with samples that have no
label (target -1) it is semi-supervised: they count with their soft term only, the teacher knows more of
them than the labels.

Faithful: loss, semi-supervision. ``weight_by_temperature=True`` is the authors' code, which weights the soft
term by ``T**2 * lambda``. The task's batches bring x* as a view (``Batch.views``). Differs: nothing for
classification; both means are taken over the whole batch, labeled or not, as the sum over i says and as
the authors' code does. The paper's regression (SARCOS) is not here.

The surprising rule: not divided by T, the student learns probabilities as soft as the teacher's at T. With a
high T and ``imitation=1`` it is right and never sure.

Cost: the teacher's forward pass a step; nothing when its outputs are cached. When not to use it: where x*
says nothing about how x leads to y, nothing is gained; experiment 2 of the paper adds noise to x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.task import explain_mismatch
from ...core.types import Fraction, Positive, Term
from ...errors import ModelMismatch
from ._responses import ResponseMethod, log_mean, mean_cross_entropy

#: The target of a sample whose label is not known.
UNLABELED = -1


def privileged_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``H(sigma(f_t / T), sigma(f_s))``, the mean over all predictions.

    Args:
        student: logits, shape ``(..., classes)``.
        teacher: logits of its members, shape ``(members, ..., classes)``.
        temperature: T, of the teacher only.
    """
    target = log_mean(F.log_softmax(teacher / temperature, dim=-1))
    return mean_cross_entropy(student, target)


@method
class Privileged(ResponseMethod):
    """Learn from a teacher that sees more, and from the labels that there are.

    Attributes:
        teacher: ``"original"`` (the network before compression), ``"previous"``, the name of an earlier
            stage, a file, an architecture with weights, a module, or a list of these for an ensemble.
        view: what the teacher looks at, a name of ``Batch.views``; None for the student's inputs.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.
        imitation: lambda; the labels get the rest.
        temperature: T, of the teacher only.
        weight_by_temperature: weight the soft term by ``T**2 * lambda``, as the authors' code does.

    Example:
        >>> Privileged(teacher="teacher", imitation=0.6, temperature=20.0).view
        'privileged'
    """

    view: str | None = "privileged"
    imitation: Fraction = 0.5
    temperature: Positive = 1.0
    weight_by_temperature: bool = False

    @classmethod
    def example(cls) -> Method:
        """A teacher that sees the student's inputs: other views need a task that has them."""
        return cls(view=None, temperature=2.0)

    def task_weight(self, run: Run) -> float:
        """The task's loss is one of this method's own terms, for the samples with a label."""
        return 0.0

    def loss(self, run: Run) -> dict[str, Term]:
        """Both terms of equation 4."""
        own, taught = self.answers(run)
        soft = self.imitation * (self.temperature**2 if self.weight_by_temperature else 1.0)
        terms = {"imitation": Term(privileged_loss(own, taught, self.temperature), soft)}
        if self.imitation < 1.0:
            terms["labels"] = Term(self._hard(run), 1.0 - self.imitation)
        return terms

    def _hard(self, run: Run) -> Tensor:
        """The task's loss of the samples with a label, as a part of the mean over the batch."""
        target: Any = run.batch.target
        if not _is_one_class_a_sample(target):
            return _task_loss(run, run.output, target)
        rows = (target != UNLABELED).nonzero().flatten()
        if len(rows) == len(target):
            return _task_loss(run, run.output, target)
        if not len(rows):
            return torch.zeros((), device=target.device)
        if not isinstance(run.output, Tensor):
            raise ModelMismatch(
                f"privileged: some samples have no label ({UNLABELED}), and they can be taken out of a "
                f"tensor only, not of a {type(run.output).__name__}: let the network return its logits."
            )
        labeled = _task_loss(run, run.output[rows], target[rows])
        return labeled * (len(rows) / len(target))


def _is_one_class_a_sample(target: Any) -> bool:
    return isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()


def _task_loss(run: Run, output: Any, target: Any) -> Tensor:
    try:
        return run.task.loss(output, target)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise explain_mismatch("loss", output, target, error) from error
