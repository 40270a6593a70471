"""What all papers share whose student learns its teacher's outputs."""

from __future__ import annotations

from pathlib import Path
from tempfile import gettempdir
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from ...core.method import Method
from ...core.run import Run
from ...core.types import Change
from ...errors import ModelMismatch
from ...mechanisms.teacher import Cached, Live, Source, logits_of, shared_teacher


class ResponseMethod(Method):
    """Compares the student's outputs with those of its teacher in the same step.

    Attributes:
        teacher: ``"original"`` (the network before compression), ``"previous"``, the name of an earlier
            stage, a file, an architecture with weights, a module, or a list of these for an ensemble.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False
    softmax: ClassVar[bool] = True  # whether the method compares probabilities of classes

    teacher: Any = "original"
    view: str | None = None
    class_dim: int = -1
    cache: bool | str = False

    _live: Live = PrivateAttr()
    _source: Source = PrivateAttr()

    def attach(self, run: Run) -> None:
        """Find the teacher, and record its outputs if they are to be cached."""
        self._live = shared_teacher(run, self.teacher, self.view)
        self._source = self._live
        if self.cache:
            self._source = Cached(self._cache_file(run), self._live, run.task.train, run.device)

    def answers(self, run: Run) -> tuple[Tensor, Tensor]:
        """The outputs of this step, classes last: the student's and those of the teacher's members.

        Returns:
            Logits ``(..., classes)`` and ``(members, ..., classes)``.

        Raises:
            ModelMismatch: they do not fit each other.
        """
        taught, own = self._source.outputs(run.batch), logits_of(run.output, "the student")
        if taught.shape[1:] != own.shape:
            raise ModelMismatch(
                f"{self.method_name()}: the teacher's outputs have the shape {tuple(taught.shape[1:])}, "
                f"the student's {tuple(own.shape)}. Both need the same classes."
            )
        return self.classes_last(own, 0), self.classes_last(taught, 1)

    def classes_last(self, outputs: Tensor, before: int) -> Tensor:
        """The same outputs with the classes in the last dim.

        Args:
            outputs: of a network, or of several.
            before: dims in front of those of one network's outputs.

        Raises:
            ModelMismatch: there is no such dim, or one class, of which a softmax says nothing.
        """
        dim = self.class_dim if self.class_dim < 0 else self.class_dim + before
        if not -outputs.ndim + before <= dim < outputs.ndim:
            raise ModelMismatch(
                f"{self.method_name()}: class_dim={self.class_dim}, and the outputs have "
                f"{outputs.ndim - before} dims, counted from 0."
            )
        if self.softmax:
            require_classes(outputs, dim, self.method_name(), before)
        if outputs.dtype in (torch.float16, torch.bfloat16):
            outputs = outputs.float()  # sums over classes need the precision
        return outputs if dim in (-1, outputs.ndim - 1) else outputs.movedim(dim, -1)

    def finish(self, run: Run) -> list[Change]:
        """The teacher must be what it was; the model's change shows in its score."""
        self._source.check()
        return []

    def _cache_file(self, run: Run) -> Path:
        if isinstance(self.cache, str):
            return Path(self.cache)
        folder = run.directory if run.directory is not None else Path(gettempdir())
        seen = "" if self.view is None else f"-{self.view}"
        return folder / f"teacher-{run.stage}{seen}.f16"


def require_classes(outputs: Tensor, class_dim: int, by: str, before: int = 0) -> None:
    """Raise ModelMismatch where a softmax over the classes would be 1 whatever the network says.

    Args:
        outputs: of a network, or of several.
        class_dim: the dim that holds the classes.
        by: the method's name.
        before: dims in front of those of one network's outputs.
    """
    if outputs.ndim - before < 2 or outputs.shape[class_dim] < 2:
        raise ModelMismatch(
            f"{by}: the outputs have the shape {tuple(outputs.shape[before:])}, which is one number for each "
            "prediction. Its softmax is always 1, so nothing would be learned: give the network two "
            "outputs, or use the method logits."
        )


def mean_cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """``H(p, q) = -sum_k p_k log q_k``, the mean over all predictions.

    Args:
        student: logits of q, shape ``(..., classes)``.
        target: log-probabilities of p, same shape.
    """
    return -(target.exp() * F.log_softmax(student, dim=-1)).sum(dim=-1).mean()


def log_mean(log_probabilities: Tensor) -> Tensor:
    """Logarithm of the members' mean probabilities, from ``(members, ...)`` to ``(...)``."""
    members = torch.tensor(float(len(log_probabilities)), device=log_probabilities.device)
    return log_probabilities.logsumexp(dim=0) - torch.log(members)
