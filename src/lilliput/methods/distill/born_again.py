"""Born-again networks: a network learns from its own earlier generation, starting over from fresh weights.

Paper: Born Again Neural Networks (Furlanello, Lipton, Tschannen, Itti, Anandkumar; ICML 2018; arXiv
1805.04770)

Generation k, of the same architecture as generation k - 1, starts from new random weights and minimizes
``L(y, f_k(x)) + L(f_{k-1}(x), f_k(x))``: the labels, and the output of the generation before, both at
temperature 1. Without the first term (``hard_weight: 0``) it learns from the earlier generation alone. Each
stage of a recipe is a generation; the ensemble of all is ``soft_targets`` with the list of their names.

What does the teacher's output say beside the label? Two treatments of it answer that:

- ``confidence``: the teacher only weighs the samples, by its largest probability (CWTM):
  ``sum_s max_i p_is / sum_u max_i p_iu * L(y_s, f(x_s))``. The target is the label.
- ``permuted``: of the teacher's probabilities the largest stays, the others are dealt out anew, for each
  sample and step (DKPP): what classes look alike is lost, how sure the teacher is is not.

Faithful: equal architectures, fresh weights, loss, generations, both treatments. Differs: divergence for
cross-entropy, which has the same gradient; weights of both terms and a temperature may be set.

Cost: the earlier generation's forward pass a step, and a whole training a generation. When not to use it:
where a smaller network is wanted, since all generations are equally large.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from ...core.digests import mix
from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.types import Change, Positive, Term
from ...errors import ModelMismatch
from ...mechanisms.encodings import bake, describe
from ...mechanisms.initializing import draw_fresh_weights, refuse_encoded
from ._responses import ResponseMethod
from .soft_targets import soft_target_loss, soften


def confidence_weighted_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels, each sample weighted by the teacher's largest probability.

    Args:
        student: logits, ``(samples, classes)``.
        teacher: log-probabilities, same shape.
        labels: int64 ``(samples,)``.
    """
    confidence = teacher.exp().amax(dim=1)
    losses = F.cross_entropy(student, labels, reduction="none")
    return (confidence / confidence.sum() * losses).sum()


def permuted(log_probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """The largest probability at its place, the others dealt out anew, for each sample by itself.

    Args:
        log_probabilities: ``(samples, classes)``.
        generator: of the permutations; on the processor, so that every device sees the same.

    Example:
        >>> p = torch.tensor([[0.7, 0.2, 0.06, 0.04]]).log()
        >>> q = permuted(p, torch.Generator().manual_seed(1)).exp()
        >>> round(float(q[0, 0]), 2), [round(v, 2) for v in sorted(q[0].tolist())]
        (0.7, [0.04, 0.06, 0.2, 0.7])
    """
    samples, classes = log_probabilities.shape
    largest = log_probabilities.argmax(dim=1, keepdim=True)
    random = torch.rand(samples, classes, generator=generator).to(log_probabilities.device)
    # In both orders the largest one is the first; the others meet at random.
    fixed = torch.zeros_like(random).scatter_(1, largest, -1.0)
    places = (fixed + torch.arange(classes, device=random.device) / classes).argsort(dim=1)
    dealt = random.scatter(1, largest, -1.0).argsort(dim=1)
    values = log_probabilities.gather(1, dealt)
    return torch.empty_like(values).scatter_(1, places, values)


@method
class BornAgain(ResponseMethod):
    """Start over from fresh weights, with the network's own earlier generation as teacher.

    Attributes:
        teacher: the earlier generation: ``"previous"``, the name of an earlier stage, a file, an architecture
            with weights, a module, or a list of these for an ensemble.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.
        targets: ``"soft"``, the teacher's probabilities; ``"confidence"`` or ``"permuted"``, see the module's
            docstring.
        soft_weight: of the teacher's term, a number or ``{start: 4, end: 1}``.
        hard_weight: of the task's own loss, likewise; 0 learns from the teacher alone.
        temperature: T of soft and permuted targets; the factor T**2 is applied beside the weight.
        reset: draw fresh weights; set it to false in a stage that brings its own network.

    Example:
        >>> BornAgain().teacher
        'previous'
    """

    initializes: ClassVar[bool] = True

    teacher: Any = "previous"
    targets: Literal["soft", "confidence", "permuted"] = "soft"
    soft_weight: LossWeight = 1.0
    hard_weight: LossWeight = 1.0
    temperature: Positive = 1.0
    reset: bool = True

    _told: list[Change] = PrivateAttr(default_factory=list)

    def attach(self, run: Run) -> None:
        """Find the earlier generation, then forget what it has learned.

        Raises:
            InputError: weights are encoded by a method that stands before this one, or a module cannot draw
                fresh weights.
        """
        super().attach(run)
        self._told = [self._start_over(run)] if self.reset else []

    def task_weight(self, run: Run) -> float:
        """The weight of the labels."""
        return weight_at(self.hard_weight, run.progress)

    def loss(self, run: Run) -> dict[str, Term]:
        """The teacher's term."""
        return {"born_again": Term(self._value(run), weight_at(self.soft_weight, run.progress))}

    def finish(self, run: Run) -> list[Change]:
        """The teacher must be what it was; the fresh start is told."""
        return [*super().finish(run), *self._told]

    def _value(self, run: Run) -> Tensor:
        own, taught = self.answers(run)
        own, taught = own.flatten(0, -2), taught.flatten(1, -2)
        if self.targets == "confidence":
            labels = _labels(run.batch.target, own)
            return confidence_weighted_loss(own, soften(taught, 1.0, "arithmetic"), labels)
        target = soften(taught, self.temperature, "arithmetic")
        if self.targets == "permuted":
            target = permuted(target, run.generator("born_again"))
        return soft_target_loss(own, target, self.temperature)

    def _start_over(self, run: Run) -> Change:
        place = next(n for n, other in enumerate(run.methods) if other is self)
        if any(other.changes_model for other in run.methods[:place]):
            refuse_encoded(run.model, "born_again")
        encoded = describe(run.model)
        bake(run.model)
        draw_fresh_weights(run.model, mix(run.seed, run.stage, "born again"))
        note = f"encodings taken off: {', '.join(encoded)}" if encoded else ""
        name = type(run.model).__name__
        return Change(name, "weights", "trained", "drawn anew", self.method_name(), note)


def _labels(target: Any, student: Tensor) -> Tensor:
    if (
        not isinstance(target, Tensor)
        or target.is_floating_point()
        or target.numel() != len(student)
    ):
        raise ModelMismatch(
            "born_again: targets='confidence' weighs cross-entropy, so it needs a class number for each "
            "prediction as the target."
        )
    return target.reshape(-1)
