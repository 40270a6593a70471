"""Transparent students: what a network has learned, as curves that can be drawn, or as decision trees.

Paper: Transparent Model Distillation (Tan, Caruana, Hooker, Gordo; arXiv preprint 2018; arXiv 1801.08640)

Paper: Distill-and-Compare: Auditing Black-Box Models Using Transparent Model Distillation (Tan, Caruana,
Hooker, Lou; AIES 2018; arXiv 1710.06169)

The student S minimizes the squared error to its teacher's scores t, logits of a classifier or predictions of
a regressor: ``mean over samples of (t(x) - S(x))**2``. It is of one of two kinds, which the stage's own
network (``model:``) chooses and dimensions:

- ``additive``, a GA2M: ``S(x) = b + sum_i f_i(x_i) + sum_(i, j) f_ij(x_i, x_j)``, boosted by the package
  interpret; with several outputs one such function for each, over common pairs;
- ``tree_ensemble``, gradient-boosted trees, by scikit-learn.

The fitted student is copied into the network's tables, which compute what the library computes to 1e-5
(checked), so that its file, its evaluation and later stages are those of any network.

:func:`compare` is the second paper's audit: a student of the teacher's scores beside the same kind of model
of true outcomes. Where a feature's curves differ, the teacher uses it otherwise than the outcomes ask for;
where the errors of both models are correlated, the data lack a feature that the teacher has seen.

Faithful: students, loss, comparison, test. Not confirmed, because only the abstracts were at hand: the
number of bins, pairs, trees and rounds (settings of the network and the libraries here), the squared error
on *logits*, and how scores are brought to the scale of the outcomes (see :func:`compare`). Differs: the
explainable boosting machine is the present implementation of the paper's GA2M by one of its authors' groups.
The first paper found results "not yet conclusive": GA2Ms promising for classifiers, trees for regressors.

Cost: one pass of the teacher over the training data, and the boosting, on the processor. When not to use it:
on pixels or tokens, whose single values say nothing; where curves are to be trusted as causes.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ...architectures.additive import Additive
from ...architectures.tree_ensemble import TreeEnsemble, tree_ensemble
from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.task import answer, evaluation, move, read
from ...core.types import Batch, Change, Positive
from ...errors import InputError, LilliputWarning, ModelMismatch, RunError
from ...mechanisms.initializing import refuse_encoded
from ...mechanisms.teacher import Live, shared_teacher
from ._audit import Audit, Difference, compare
from ._boosting import Array, Boosting, Fitted, fit_additive, fit_trees

__all__ = ["Audit", "Difference", "Transparent", "compare"]

_AGREEMENT = 1e-5
_REMEDY = {
    "infinite": "Clip them.",
    "missing": "Trees have no bin for them: fill them in, or take an additive student.",
}


def log_odds(logits: Tensor) -> Tensor:
    """Logits less their mean over the classes, which changes no probability.

    Squared error would else be spent on a number that a softmax does not see.

    Args:
        logits: ``(..., classes)``.

    Example:
        >>> log_odds(torch.tensor([[3.0, 5.0]]))
        tensor([[-1.,  1.]])
    """
    return logits - logits.mean(-1, keepdim=True)


def explained(student: Tensor, teacher: Tensor) -> float:
    """Percentage of the variance of the teacher's scores that the student explains, over all outputs.

    Example:
        >>> explained(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
        50.0
    """
    missed = (student - teacher).double().square().sum()
    spread = (teacher - teacher.mean(0)).double().square().sum()
    return float(100 * (1 - missed / spread))


@method
class Transparent(Method):
    """Fit an additive model or boosted trees on a teacher's scores.

    Put it into a stage without epochs that brings its own network, ``model: {architecture: additive, ...}``
    or ``tree_ensemble``. With epochs the fitted tables are trained further.

    Attributes:
        teacher: a network, or a list of these, whose mean outputs are fitted; see
            :meth:`~lilliput.core.run.Run.find_network`.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        scores: ``"outputs"`` as they are, or ``"log_odds"``, a classifier's logits less their mean.
        samples: training samples to fit on, at least; None for all.
        learning_rate: of each round of boosting; None for the library's default.
        rounds: of an additive student's boosting, at most; None for the library's default. Trees have as many
            as the network has trees.
        bags: additive students that are averaged.

    Example:
        >>> Transparent(scores="log_odds").teacher
        'original'
    """

    family: ClassVar[str] = "distill"
    initializes: ClassVar[bool] = True

    teacher: Any = "original"
    view: str | None = None
    scores: Literal["outputs", "log_odds"] = "outputs"
    samples: int | None = Field(default=None, ge=2)
    learning_rate: Positive | None = None
    rounds: int | None = Field(default=None, ge=1)
    bags: int = Field(default=8, ge=1)

    @classmethod
    def example_network(cls, features: int, outputs: int) -> nn.Module:
        """Trees, which need no further package."""
        return tree_ensemble(features, outputs, trees=4, depth=2)

    def check(self, model: nn.Module) -> None:
        """The stage's network must be one of the two kinds."""
        _student(model)

    def attach(self, run: Run) -> None:
        """Ask the teacher for all samples, fit, fill the network and compare it with what was fitted.

        Raises:
            InputError: the stage's network is of another kind, its weights are encoded already, or the
                samples cannot be used.
            ModelMismatch: teacher and student have different outputs.
            MissingDependency: an additive student without the package interpret.
        """
        student = _student(run.model)
        refuse_encoded(student, "transparent")
        teacher = shared_teacher(run, self.teacher, self.view)
        features, scores = self._samples(run, teacher, student.outputs)
        check_features(features, missing_allowed=isinstance(student, Additive))
        how = Boosting(self.learning_rate, self.rounds, self.bags, run.seed)
        fitted = _fit(student, features, scores, how)
        apart = disagreement(student, features, fitted.predictions)
        teacher.check()
        self.memory(run).update(importances=list(fitted.importances.items()), apart=apart)

    def finish(self, run: Run) -> list[Change]:
        """How much of the teacher the student explains, and what each term contributes."""
        memory, name = self.memory(run), self.method_name()
        teacher = shared_teacher(run, self.teacher, self.view)
        batches = [move(b, run.device) for b in read(run.task.validation, "the validation batches")]
        with evaluation(run.model), torch.no_grad():
            own = torch.cat([answer(run.model, b.inputs) for b in batches])
        fidelity = explained(own, torch.cat([self._scores(teacher, b) for b in batches]))
        what = "variance of the teacher's scores that is explained, validation, %"
        note = f"copied to {memory['apart']:.1e} of what the library predicts"
        changes = [Change("student", what, 0.0, fidelity, name, note)]
        for term, value in memory["importances"]:
            changes.append(Change(term, "importance", 0.0, value, name))
        return changes

    def _scores(self, teacher: Live, batch: Batch) -> Tensor:
        """What the student is to say to a batch, ``(batch, outputs)``."""
        outputs = teacher.outputs(batch).float().mean(0)
        outputs = outputs.unsqueeze(1) if outputs.ndim == 1 else outputs
        if self.scores == "outputs":
            return outputs
        if outputs.shape[-1] < 2:
            raise ModelMismatch(
                "transparent: the teacher has one output, and less its mean over the classes that is 0 for "
                "every sample: set scores: outputs."
            )
        return log_odds(outputs)

    def _samples(self, run: Run, teacher: Live, outputs: int) -> tuple[Array, Array]:
        """Features and scores of the training samples, ``(samples, features)``, ``(samples, outputs)``."""
        features, scores = [], []
        for batch in run.calibration(self.samples or 2**62):
            if not isinstance(batch.inputs, Tensor):
                raise InputError(
                    "transparent: a sample should be one tensor of numbers, and the batches' inputs are "
                    f"{type(batch.inputs).__name__}."
                )
            features.append(batch.inputs.flatten(1).float().cpu())
            scores.append(self._scores(teacher, batch).cpu())
        wanted = torch.cat(scores)
        if wanted.shape[1:] != (outputs,):
            raise ModelMismatch(
                f"transparent: the teacher's outputs have the shape {tuple(wanted.shape[1:])} a sample and "
                f"the student has {outputs} outputs: build it with as many as the teacher has."
            )
        if not wanted.isfinite().all():
            lost = int((~wanted.isfinite()).any(1).sum())
            raise InputError(
                f"transparent: the teacher's outputs for {lost} of {len(wanted)} samples are not finite. "
                "Does it see missing values? Let it look at a view of the samples that has none (view: ...)."
            )
        return torch.cat(features).double().numpy(), wanted.double().numpy()


def check_features(features: Array, *, missing_allowed: bool) -> None:
    """Refuse features that a student cannot take; warn of one that says nothing.

    Args:
        features: ``(samples, features)``.
        missing_allowed: whether NaN has a bin of its own.

    Raises:
        InputError: one is infinite, or missing without a bin for that.
    """
    for what, found in (("infinite", np.isinf(features)), ("missing", np.isnan(features))):
        if found.any() and not (what == "missing" and missing_allowed):
            columns = ", ".join(map(str, np.flatnonzero(found.any(0))[:10]))
            raise InputError(
                f"transparent: {int(found.any(1).sum())} samples have {what} values, in the features "
                f"{columns}. {_REMEDY[what]}"
            )
    constant = [f for f, column in enumerate(features.T) if len(np.unique(column)) == 1]
    if constant:
        warnings.warn(
            f"transparent: the features {', '.join(map(str, constant[:10]))} are the same in all "
            f"{len(features)} samples: the student cannot use them.",
            LilliputWarning,
            stacklevel=2,
        )


@torch.no_grad()
def disagreement(student: nn.Module, features: Array, predictions: Array) -> float:
    """The largest difference between the network and the library that it was copied from.

    Args:
        student: filled.
        features: ``(samples, features)``.
        predictions: the library's, ``(samples, outputs)``.

    Returns:
        The difference over the largest prediction, or over 1 where all are smaller.

    Raises:
        RunError: it is above 1e-5.
    """
    device = next(student.parameters()).device
    own = student(torch.from_numpy(features).float().to(device)).cpu().double().numpy()
    apart = float(np.abs(own - predictions).max() / max(1.0, np.abs(predictions).max()))
    if not apart <= _AGREEMENT:
        raise RunError(
            f"transparent: the network computes other values than the fitted student, by {apart:.1e} of "
            "the largest prediction. The library's form has changed: this is a bug in Lilliput; an older "
            "version of the library may help."
        )
    return apart


def _student(model: nn.Module) -> Additive | TreeEnsemble:
    if not isinstance(model, Additive | TreeEnsemble):
        raise InputError(
            "transparent fits a student of its own kind, and the stage's network is a "
            f"{type(model).__name__}: give the stage model: {{architecture: additive, features: ..., "
            "outputs: ...}, or tree_ensemble."
        )
    return model


def _fit(student: Additive | TreeEnsemble, features: Array, scores: Array, how: Boosting) -> Fitted:
    if features.shape[1] != student.features:
        raise ModelMismatch(
            f"transparent: the samples have {features.shape[1]} features and the student has "
            f"{student.features}: build it with as many."
        )
    if isinstance(student, Additive):
        return fit_additive(student, features, scores, how)
    return fit_trees(student, features, scores, how)
