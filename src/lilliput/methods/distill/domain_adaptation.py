"""Teacher-student domain adaptation: the same samples, recorded twice, and no labels.

Paper: Large-Scale Domain Adaptation via Teacher-Student Learning (Li, Seltzer, Wang, Zhao, Gong;
INTERSPEECH 2017; arXiv 1708.05466)

A network that is good in the source domain (close microphone, clean images) teaches its own copy the
target domain (far microphone, noise) on parallel samples ``(x_src, x_tgt)``::

    L = -1/N sum_f sum_s P_T(s | x_src_f) log P_S(s | x_tgt_f)

The teacher looks at the view ``"source"`` of each batch, the student at its inputs, which are the target
domain. T is 1, there is no label and no hard term: what the student should say in the new domain is what
the teacher says in the old one.

Faithful: loss; the student starts as the teacher (``initialize``). Differs: the paper's outputs are senones
of a speech recognizer, here any classes.

Cost: the teacher's forward pass a step; nothing when its outputs are cached. When not to use it: without
parallel samples; and the student learns the teacher's mistakes too, so where the target domain has labels,
``soft_targets`` with ``view: source`` uses both.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.types import Term
from ...errors import InputError, ModelMismatch
from ...mechanisms.encodings import describe
from ._responses import ResponseMethod, log_mean, mean_cross_entropy


def adaptation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``-1/N sum P_T log P_S``, N the number of predictions (frames).

    Args:
        student: logits for the target domain, shape ``(..., classes)``.
        teacher: logits of its members for the source domain, ``(members, ..., classes)``.
    """
    return mean_cross_entropy(student, log_mean(F.log_softmax(teacher, dim=-1)))


@method
class DomainAdaptation(ResponseMethod):
    """Learn in a new domain what the teacher says of the same samples in its own.

    Attributes:
        teacher: ``"original"`` (the network before compression), ``"previous"``, the name of an earlier
            stage, a file, an architecture with weights, a module, or a list of these for an ensemble.
        view: what the teacher looks at, a name of ``Batch.views``: the source domain.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.
        initialize: start the student with the teacher's weights. False where the student is another
            network, or stems from the teacher already (pruned or quantized).
        weight: of the loss, for stages in which other methods add theirs; a number or
            ``{start: 4, end: 1}``.

    Example:
        >>> DomainAdaptation(teacher="original").view
        'source'
    """

    view: str | None = "source"
    initialize: bool = True
    weight: LossWeight = 1.0

    @classmethod
    def example(cls) -> Method:
        """A student of its own, in the teacher's domain: other views need a task that has them."""
        return cls(view=None, initialize=False)

    def attach(self, run: Run) -> None:
        """Find the teacher, and make the student its copy."""
        super().attach(run)
        if self.initialize:
            copy_weights(run.model, self._live.networks)

    def task_weight(self, run: Run) -> float:
        """No label is asked for."""
        return 0.0

    def loss(self, run: Run) -> dict[str, Term]:
        """The only term."""
        value = adaptation_loss(*self.answers(run))
        return {"domain_adaptation": Term(value, weight_at(self.weight, run.progress))}


def copy_weights(student: nn.Module, teachers: list[nn.Module]) -> None:
    """Give a student the parameters and buffers of its teacher.

    Args:
        student: changed in place.
        teachers: one network of the same architecture.

    Raises:
        InputError: there are several teachers, or the student's weights are encoded already.
        ModelMismatch: the teacher is another network.
    """
    way_out = "Set initialize to False to train the student from the weights that it has."
    if len(teachers) != 1:
        raise InputError(f"domain_adaptation: the student cannot start as an ensemble. {way_out}")
    if describe(student):
        raise InputError(
            "domain_adaptation: the student's weights are encoded already (masks, codebooks), by a "
            f"choice that was made for their present values. {way_out}"
        )
    try:
        student.load_state_dict(teachers[0].state_dict())
    except RuntimeError as error:
        raise ModelMismatch(
            f"domain_adaptation: the student cannot start with the teacher's weights: {error} {way_out}"
        ) from error
