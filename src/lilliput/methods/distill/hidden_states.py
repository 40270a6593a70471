"""Hidden states: at each step of a sequence the student's state resembles its teacher's.

Paper: TinyBERT: Distilling BERT for Natural Language Understanding (Jiao, Yin, Shang, Jiang, Chen, Li, Wang,
Liu; Findings of EMNLP 2020; arXiv 1909.10351)

The loss is ``MSE(H_S W_h, H_T)``. H_S ``(steps, d)`` and H_T ``(steps, d')`` are the hidden states of student
and teacher over a sequence; the matrix W_h, ``d x d'``, is learned and brings the one into the space of the
other; the mean is over all numbers. The paper compares layers of transformers. The outputs h_t of a recurrent
layer are hidden states in the same sense, and are what this file was made for.

One sequence may be longer than the other: a student that reads weeks learns from a network that was trained
on days. ``align: end`` then compares the steps that both have at the end, where sequences meet the present.

Faithful: the loss and the matrix, without a bias and also where the widths agree (``adapter: none`` leaves it
out there). Differs: the layers' pairs are named, not spread evenly.

Cost: the teacher's forward pass a step. When not to use it: where the teacher's steps do not mean the same as
the student's, as with another sampling rate or tokenizer.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.types import Term
from ...errors import ModelMismatch
from ...mechanisms.adapters import Shape
from ._features import FeatureMethod


def hidden_state_loss(own: Tensor, taught: Tensor) -> Tensor:
    """``MSE(H_S W_h, H_T)``: the mean over the batch, all steps and all numbers of a state.

    Args:
        own: the student's states after the adapter, ``(batch, steps, width)``.
        taught: the teacher's, same shape.
    """
    return F.mse_loss(own, taught)


def last_steps(states: Tensor, steps: int, dim: int) -> Tensor:
    """The last steps of a sequence of states.

    Example:
        >>> last_steps(torch.arange(4.0).view(1, 4, 1), 2, 1).flatten().tolist()
        [2.0, 3.0]
    """
    return states.narrow(dim, states.shape[dim] - steps, steps)


@method
class HiddenStates(FeatureMethod):
    """Learn the hidden states that the teacher has at each step of a sequence.

    Attributes:
        teacher: one network; see :meth:`~lilliput.core.run.Run.find_network`.
        pairs: place in the student -> place in the teacher, whose outputs are the states, such as a recurrent
            layer; a list where both have the same names.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        weight: of the loss, a number or ``{start: 1, end: 0}``.
        hard_weight: of the task's own loss, likewise.
        adapter: ``"linear"`` learns W_h; ``"none"`` compares the states as they are, and then anything of one
            shape can be compared, such as the maps of a convolution block and of what takes its place.
        align: ``"equal"`` asks for sequences of the same length; ``"end"`` compares their last steps.
        step_dim: the dim of the states that counts the steps; 0 for recurrent layers without ``batch_first``.

    Example:
        >>> HiddenStates(pairs=["lstm"], teacher="previous").adapter
        'linear'
    """

    weight: LossWeight = 1.0
    hard_weight: LossWeight = 1.0
    adapter: Literal["linear", "none"] = "linear"
    align: Literal["equal", "end"] = "equal"
    step_dim: Literal[0, 1] = 1

    _adapters: list[nn.Module] = PrivateAttr()

    @classmethod
    def example(cls) -> HiddenStates:
        """The states of a transformer's encoder."""
        return cls(pairs=["encoder"])

    def attach(self, run: Run) -> None:
        """Find the teacher, and let a matrix for each pair of places train with the student."""
        super().attach(run)
        self._adapters = [
            run.extra(f"{run.key_of(self)}.{number}", self._matrix(own, taught))
            for number, (own, taught) in enumerate(self.shapes(run))
        ]

    def task_weight(self, run: Run) -> float:
        """The weight of the task's own loss."""
        return weight_at(self.hard_weight, run.progress)

    def loss(self, run: Run) -> dict[str, Term]:
        """The mean over the pairs."""
        losses = [
            hidden_state_loss(*self._aligned(adapt(own), taught))
            for adapt, (own, taught) in zip(self._adapters, self.features(run), strict=True)
        ]
        value = sum(losses[1:], losses[0]) / len(losses)
        return {"hidden_states": Term(value, weight_at(self.weight, run.progress))}

    def _matrix(self, own: Shape, taught: Shape) -> nn.Module:
        """W_h for one pair, after a look at both shapes."""
        told = f"hidden_states: the student's states are {own}, the teacher's {taught}"
        if own == taught and self.adapter == "none":
            return nn.Identity()
        if len(own) != 3 or len(taught) != 3:
            raise ModelMismatch(f"{told}: name places that hand over (batch, steps, width).")
        if own[self.step_dim] != taught[self.step_dim] and self.align == "equal":
            raise ModelMismatch(
                f"{told}: the sequences differ in length. Set align to 'end' to compare their last steps."
            )
        if self.adapter == "linear":
            return nn.Linear(own[-1], taught[-1], bias=False)
        if own[-1] != taught[-1]:
            raise ModelMismatch(f"{told}: states of other widths need adapter: linear.")
        return nn.Identity()

    def _aligned(self, own: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
        """Both at the steps that they have in common."""
        steps = min(own.shape[self.step_dim], taught.shape[self.step_dim])
        return last_steps(own, steps, self.step_dim), last_steps(taught, steps, self.step_dim)
