"""The bias of classes that a student has met too rarely, corrected afterwards.

Paper: Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean; NIPS Deep Learning
Workshop 2014; arXiv 1503.02531)

Section 3: a student that learned from a transfer set without a single 3 knows from the soft targets how a 3
looks, and hardly ever says so, because the bias of that class is much too low. One number o, added to the
biases of the classes S in the last layer, repairs most of it. With o the probability of S is
``sigmoid(d + o)``, where ``d = log sum_S exp(z) - log sum_rest exp(z)``.

Faithful: the correction. The paper takes the o with the best accuracy on the *test* set (3.5 for the missing
3s, -7.6 where only 7s and 8s were there); here it is the best on the *validation* set, found exactly.
Differs: ``frequency`` needs no labels; it takes the o with which the mean probability of S is the frequency
at which S occurs. ``by`` sets o.

Cost: two passes over the validation batches. When not to use it: where the training classes have the
frequencies of the test set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from scipy.optimize import brentq
from torch import Tensor, nn

from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.task import answer, evaluation, move, read
from ...core.types import Change
from ...errors import InputError, ModelMismatch
from ...mechanisms.taps import find_module

#: A share of the samples, neither none nor all.
Share = Annotated[float, Field(gt=0.0, lt=1.0)]


def offset_for_frequency(logits: Tensor, classes: Sequence[int], frequency: float) -> float:
    """The o for which ``mean sigmoid(d + o)``, the mean probability of the classes, is ``frequency``.

    Args:
        logits: shape ``(samples, classes)``.
        classes: S.
        frequency: wanted, between 0 and 1.
    """
    inside, outside = _split(logits.double(), classes)
    odds = inside.logsumexp(dim=1) - outside.logsumexp(dim=1)

    def missed(offset: float) -> float:
        return float(torch.sigmoid(odds + offset).mean()) - frequency

    wanted = math.log(frequency / (1.0 - frequency))
    # With the first of these no sample's probability lies above the wanted one, with the last none below.
    lowest, highest = wanted - float(odds.max()) - 1e-6, wanted - float(odds.min()) + 1e-6
    return float(brentq(missed, lowest, highest, xtol=1e-9))


def offset_for_accuracy(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> float:
    """The o with which most samples are classified correctly; of several the one nearest to 0.

    A sample goes to S where o exceeds its margin, the best logit of the rest over the best of S. Between
    two margins nothing changes, so one pass over the sorted margins sees every o.

    Args:
        logits: shape ``(samples, classes)``.
        labels: int64 ``(samples,)``.
        classes: S.
    """
    inside, outside = _split(logits.double(), classes)
    best_in, best_out = inside.max(dim=1), outside.max(dim=1)
    members = torch.tensor(list(classes), device=logits.device)
    others = _others(logits.shape[1], classes).to(logits.device)
    right_in = members[best_in.indices] == labels
    right_out = others[best_out.indices] == labels
    margins, order = (best_out.values - best_in.values).sort()
    gained = (right_in.long() - right_out.long())[order].cumsum(dim=0)
    return _nearest_to_zero(margins.cpu(), torch.cat([gained.new_zeros(1), gained]).cpu())


def _nearest_to_zero(margins: Tensor, gained: Tensor) -> float:
    """Of all intervals between sorted margins with the largest gain, the offset nearest to 0."""
    edge = torch.full((1,), math.inf, dtype=margins.dtype)
    lower, upper = torch.cat([-edge, margins]), torch.cat([margins, edge])
    gained = gained.masked_fill(lower == upper, int(gained.min()) - 1)  # margins that coincide
    best = gained == gained.max()
    # An offset inside each interval, not on its ends, where two classes would tie.
    room = ((upper - lower) / 2).clamp(max=1e-3)
    offsets = torch.zeros_like(lower).clamp(lower + room, upper - room)[best]
    return float(offsets[offsets.abs().argmin()])


def correct_bias(
    model: nn.Module,
    classes: Sequence[int],
    batches: Iterable[Any],
    *,
    layer: str | None = None,
    by: float | None = None,
    frequency: float | None = None,
    device: torch.device | None = None,
) -> float:
    """Add one offset to the biases of some classes.

    Args:
        model: a classifier with outputs ``(batch, classes)``; its bias is changed in place.
        classes: which.
        batches: to find the offset on; they need labels unless ``by`` or ``frequency`` is given.
        layer: whose bias it is, by default the last linear one; its outputs must be the logits.
        by: the offset, instead of looking for it.
        frequency: how often the classes occur, instead of labels.
        device: where the model is.

    Returns:
        The offset.

    Raises:
        ModelMismatch: the layer's bias is not that of the logits.
        InputError: there are no such classes, or both ``by`` and ``frequency`` are given.

    Example:
        >>> model, x = nn.Linear(2, 3), torch.randn(64, 2)
        >>> offset = correct_bias(model, [0], [(x, None)], frequency=0.9)
        >>> round(model(x).softmax(1)[:, 0].mean().item(), 6)
        0.9
    """
    if by is not None and frequency is not None:
        raise InputError("correct_bias: give either by or frequency, and not both.")
    logits, labels = _logits(model, batches, device)
    bias = _bias_of(model, layer, logits.shape[1])
    _check_classes(classes, logits.shape[1])
    if by is None:
        by = _find_offset(logits, labels, classes, frequency)
    with torch.no_grad():
        bias[list(classes)] += by
    again, _ = _logits(model, batches, device)
    expected = logits.clone()
    expected[:, list(classes)] += by
    if not torch.allclose(again, expected, rtol=1e-4, atol=1e-4):
        with torch.no_grad():
            bias[list(classes)] -= by
        raise ModelMismatch(
            f"correct_bias: the logits did not move with the bias of {layer or 'the last linear layer'}: "
            "something lies behind it. Name the layer whose outputs are the logits."
        )
    return by


@method
class ClassBias(Method):
    """Correct the bias of classes that the transfer set lacked, when the stage ends.

    Attributes:
        classes: whose bias.
        layer: the layer whose outputs are the logits; by default the last linear one.
        by: the offset; without it, it is the best one on the validation batches.
        frequency: how often the classes occur, to find the offset without labels.

    Example:
        >>> ClassBias(classes=[3]).by is None
        True
    """

    family: ClassVar[str] = "distill"

    classes: list[int] = Field(min_length=1)
    layer: str | None = None
    by: float | None = None
    frequency: Share | None = None

    @classmethod
    def example(cls) -> Method:
        """An offset that is given."""
        return cls(classes=[0], by=0.5)

    @model_validator(mode="after")
    def _one_way(self) -> ClassBias:
        if self.by is not None and self.frequency is not None:
            raise ValueError("give either by or frequency, and not both")
        return self

    def finish(self, run: Run) -> list[Change]:
        """Find the offset and add it."""
        batches = run.task.validation
        offset = correct_bias(
            run.model,
            self.classes,
            batches,
            layer=self.layer,
            by=self.by,
            frequency=self.frequency,
            device=run.device,
        )
        where = f"{self.layer or _last_linear(run.model)}.bias{self.classes}"
        return [Change(where, "offset", 0.0, offset, self.method_name())]


@torch.no_grad()
def _logits(
    model: nn.Module, batches: Iterable[Any], device: torch.device | None
) -> tuple[Tensor, Tensor | None]:
    """Outputs and labels of all batches."""
    logits, labels = [], []
    with evaluation(model):
        for item in read(batches, "the batches to correct the bias on"):
            batch = item if device is None else move(item, device)
            logits.append(answer(model, batch.inputs))
            labels.append(batch.target)
    if any(not isinstance(z, Tensor) or z.ndim != 2 for z in logits):
        raise ModelMismatch("correct_bias: the outputs should be one row of logits a sample.")
    known = all(isinstance(y, Tensor) for y in labels)
    return torch.cat(logits), torch.cat(labels) if known else None


def _find_offset(
    logits: Tensor, labels: Tensor | None, classes: Sequence[int], frequency: float | None
) -> float:
    if frequency is not None:
        return offset_for_frequency(logits, classes, frequency)
    if labels is None:
        raise InputError(
            "correct_bias: the batches have no labels to find the offset by: give the classes' frequency, "
            "or the offset (by)."
        )
    return offset_for_accuracy(logits, labels, classes)


def _bias_of(model: nn.Module, layer: str | None, outputs: int) -> nn.Parameter:
    name = _last_linear(model) if layer is None else layer
    bias = getattr(find_module(model, name), "bias", None)
    if not isinstance(bias, nn.Parameter) or bias.shape != (outputs,):
        shape = tuple(bias.shape) if isinstance(bias, Tensor) else "no"
        raise ModelMismatch(
            f"correct_bias: {name!r} has {shape} bias, and the model {outputs} logits. Name the layer whose "
            "outputs are the logits."
        )
    return bias


def _last_linear(model: nn.Module) -> str:
    named: dict[str, nn.Module] = dict(model.named_modules())
    names = [name for name, module in named.items() if isinstance(module, nn.Linear)]
    if not names:
        raise ModelMismatch(
            "correct_bias: the model has no linear layer: name the one that is meant."
        )
    return names[-1]


def _check_classes(classes: Sequence[int], outputs: int) -> None:
    wrong = [c for c in classes if not 0 <= c < outputs]
    if wrong or not 0 < len(set(classes)) < outputs or len(set(classes)) < len(classes):
        raise InputError(
            f"classes={list(classes)}: give some of 0 to {outputs - 1}, each once, and not all of them."
        )


def _others(outputs: int, classes: Sequence[int]) -> Tensor:
    return torch.tensor([c for c in range(outputs) if c not in set(classes)])


def _split(logits: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The columns of the classes, and the others."""
    return logits[:, list(classes)], logits[:, _others(logits.shape[1], classes)]
