"""What a model must do: batches, a loss and a score.

Choices are made on ``validation``; ``test`` is for the figure that is reported. A batch is
``(inputs, target)``, ``(inputs, target, index)`` or a :class:`~lilliput.core.types.Batch`; the inputs
are a tensor, a tuple of positional arguments, or a dict of keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import EmptyData, InputError, ModelMismatch
from .types import Batch

Loss = Callable[[Any, Any], Tensor]


@runtime_checkable
class Metric(Protocol):
    """A score over a whole data set, for example a torchmetrics metric."""

    def reset(self) -> None:
        """Forget all batches."""

    def update(self, output: Any, target: Any) -> None:
        """Take in one batch."""

    def compute(self) -> Any:
        """The score of all batches since the last reset; higher is better."""


Score = Callable[[Any, Any], Tensor] | Metric


@dataclass
class Task:
    """Batches, loss and score.

    Attributes:
        train: iterable of batches; read once an epoch, so not a generator.
        validation: iterable of batches on which choices are made.
        test: iterable of batches for the reported figure; ``None`` reports the validation score and
            says so.
        loss: ``loss(output, target)``, a scalar tensor to minimize.
        score: ``score(output, target)``, one number a sample or the batch's mean, higher is better;
            or an object with ``reset``, ``update`` and ``compute``, such as a torchmetrics metric.
        name: how reports call it.
        score_name: what the score is, with its unit.

    Example:
        >>> inputs, labels = torch.randn(64, 8), torch.arange(64) % 2
        >>> batches = [(inputs, labels)]
        >>> task = Task(batches, batches, batches, loss=nn.functional.cross_entropy, score=accuracy)
        >>> 0 <= evaluate(nn.Linear(8, 2), task.test, task.score) <= 100
        True
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any] | None
    loss: Loss
    score: Score
    name: str = "task"
    score_name: str = "score"

    @property
    def reported(self) -> Iterable[Any]:
        """The batches of the reported figure."""
        return self.validation if self.test is None else self.test

    def placed(self, device: torch.device) -> Task:
        """The same task, with the data on the device where its batches know how to move."""

        def place(batches: Any) -> Any:
            movable = device.type != "cpu" and callable(getattr(batches, "to", None))
            return batches.to(device) if movable else batches

        train, validation, test = map(place, (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)

    def example_inputs(self) -> Any:
        """The inputs of one validation batch, cut to its first sample, on the processor."""
        batch = next(read(self.validation, "the validation batches"))
        return pytree.tree_map(lambda t: t[:1].cpu() if isinstance(t, Tensor) else t, batch.inputs)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Percent of samples whose largest logit is the label's; 100 or 0 a sample, shape ``(batch,)``."""
    return (output.argmax(dim=-1) == target).float() * 100.0


def as_batch(item: Any) -> Batch:
    """Bring what an iterable yields into the one form.

    Raises:
        InputError: it is neither a pair, a triple nor a ``Batch``.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, tuple | list) and len(item) in (2, 3):
        return Batch(*item)
    raise InputError(
        f"a batch should be (inputs, target) or (inputs, target, index), not {type(item).__name__}"
        f"{f' of length {len(item)}' if hasattr(item, '__len__') else ''}. Wrap the iterable so that "
        "it yields such pairs."
    )


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on the device."""

    def to(x: Any) -> Any:
        if isinstance(x, Tensor):  # nearly always: a step should not pay for a tree walk
            return x.to(device, non_blocking=True)
        return None if x is None else pytree.tree_map_only(Tensor, to, x)

    return Batch(to(batch.inputs), to(batch.target), to(batch.index), to(batch.views))


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Run the model on one batch's inputs: a tensor, positional arguments or keywords."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def read(batches: Iterable[Any], what: str) -> Iterator[Batch]:
    """Iterate over batches in the one form.

    Raises:
        EmptyData: there is none.
    """
    empty = True
    for item in batches:
        empty = False
        yield as_batch(item)
    if empty:
        hint = (
            " A generator can be read only once: give a list, a DataLoader, or an object whose "
            "__iter__ starts anew."
            if isinstance(batches, Iterator)
            else ""
        )
        raise EmptyData(f"{what} are empty: the iterable yields no batch.{hint}")


def answer(model: Callable[..., Any], inputs: Any) -> Any:
    """Run the model on a task's inputs, with a clear error where it cannot take them.

    Raises:
        ModelMismatch: the model fails on them.
    """
    try:
        return call(model, inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        advice = _LONELY if "Expected more than 1 value per channel" in str(error) else ""
        raise ModelMismatch(f"the model cannot take the task's inputs: {error}{advice}") from error


#: A batch of one sample has no statistics of its own; torch refuses it.
_LONELY = (
    ". In training, batch normalization needs at least two samples a batch: choose another batch_size, so "
    "that no single sample is left over for the last one; a DataLoader of your own can leave it out "
    "(drop_last=True)."
)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Any], score: Score, device: torch.device | None = None
) -> float:
    """The score of the model over the batches, in eval mode; the training flags are put back.

    Raises:
        EmptyData: there is no batch.
        ModelMismatch: the model does not take the inputs, or the score does not take the output.
    """
    with evaluation(model):
        if isinstance(score, Metric):
            return _evaluate_metric(model, batches, score, device)
        total, count = 0.0, 0
        for batch in read(batches, "the batches to evaluate on"):
            values = _score(model, batch if device is None else move(batch, device), score)
            size = values.numel() if values.ndim else batch_size(batch)
            total += float(values.sum() if values.ndim else values * size)
            count += size
        return total / count


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every submodule back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batch_size(batch: Batch) -> int:
    """How many samples the batch has: the first dimension of its first tensor."""
    leaves = [x for x in pytree.tree_leaves((batch.inputs, batch.target)) if isinstance(x, Tensor)]
    return leaves[0].shape[0] if leaves and leaves[0].ndim else 1


def explain_mismatch(stage: str, output: Any, target: Any, error: Exception) -> ModelMismatch:
    """The error for an output that a loss or a score cannot take, with the shapes of both."""

    def shape(x: Any) -> str:
        return f"shape {tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__

    return ModelMismatch(
        f"the {stage} cannot take the model's output ({shape(output)}) with the target "
        f"({shape(target)}): {error}. Check that the last layer's width fits the task."
    )


def _score(model: nn.Module, batch: Batch, score: Any) -> Tensor:
    output = answer(model, batch.inputs)
    try:
        return torch.as_tensor(score(output, batch.target)).float()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise explain_mismatch("score", output, batch.target, error) from error


def _evaluate_metric(
    model: nn.Module, batches: Iterable[Any], score: Metric, device: torch.device | None
) -> float:
    score.reset()
    for batch in read(batches, "the batches to evaluate on"):
        moved = batch if device is None else move(batch, device)
        output = answer(model, moved.inputs)
        try:
            score.update(output, moved.target)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise explain_mismatch("score", output, moved.target, error) from error
    return float(score.compute())
