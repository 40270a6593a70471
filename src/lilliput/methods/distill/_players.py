"""What all papers share whose networks train side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ...core.run import Run
from ...core.task import answer, evaluation, explain_mismatch
from ...core.types import Batch
from ...errors import InputError, ModelMismatch
from ...mechanisms.encodings import bake
from ...mechanisms.initializing import draw_fresh_weights
from ...mechanisms.teacher import logits_of
from ._responses import require_classes


def trainable(network: nn.Module) -> nn.Module:
    """Put a network that was found into train mode; one that was frozen as a whole learns again.

    Args:
        network: handed over; where only a part of it is frozen, that part stays so.
    """
    if not any(p.requires_grad for p in network.parameters()):
        network.requires_grad_(True)
    return network.train()


def fresh_copy(network: nn.Module, seed: int, by: str, instead: str) -> nn.Module:
    """A network of the same class and widths, without encodings, with other random weights.

    Args:
        network: stays as it is.
        seed: of the weights.
        by: the method's name.
        instead: what its user can do if this fails.

    Raises:
        InputError: a module with parameters cannot draw them anew; it is named.
    """
    copied = bake(copy.deepcopy(network))
    try:
        draw_fresh_weights(copied, seed)
    except InputError as error:
        reason = str(error).partition(". ")[0].partition(": ")[2]
        raise InputError(
            f"{by}: a copy with fresh weights cannot be made, for {reason}. Give it one, or {instead}."
        ) from error
    return copied.requires_grad_(True).train()


def bare(network: nn.Module) -> nn.Module:
    """The network inside a wrapper for several processes, whose hooks expect a backward pass each time."""
    return network.module if isinstance(network, DistributedDataParallel) else network


@contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """Let gradients pass through a network and none reach its parameters."""
    inside = bare(network)
    free = [p for p in inside.parameters() if p.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield inside
    finally:
        for parameter in free:
            parameter.requires_grad_(True)


@contextmanager
def still_statistics(network: nn.Module) -> Iterator[None]:
    """Let batch normalization use the batch's statistics and leave its running ones alone."""
    norms = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def newest_logits(network: nn.Module, batch: Batch) -> Tensor:
    """What a network that has just moved says of the batch now, without a trace in it.

    It is in train mode, as it was when it learned: its dropout draws anew.
    """
    inside = bare(network)
    with torch.no_grad(), still_statistics(inside):
        return logits_of(answer(inside, batch.inputs), "the network")


def task_loss(run: Run, output: Any) -> Tensor:
    """The task's loss of another network's output for the present batch.

    Raises:
        ModelMismatch: the output does not fit the loss.
    """
    try:
        return run.task.loss(output, run.batch.target)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise explain_mismatch("loss", output, run.batch.target, error) from error


def require_same_classes(own: Tensor, other: Tensor, by: str, who: str) -> None:
    """Raise ModelMismatch where two networks' outputs cannot be compared.

    Args:
        own: outputs of the student.
        other: outputs of the other network.
        by: the method's name.
        who: what the other network is, for the message.
    """
    if own.shape != other.shape:
        raise ModelMismatch(
            f"{by}: the outputs of {who} have the shape {tuple(other.shape)}, the student's "
            f"{tuple(own.shape)}. Both need the same classes: give the other network as many outputs."
        )


def require_class_dim(logits: Tensor, class_dim: int, by: str) -> None:
    """Raise ModelMismatch where the outputs have no such dim."""
    if not -logits.ndim <= class_dim < logits.ndim:
        raise ModelMismatch(
            f"{by}: class_dim={class_dim}, and the outputs have {logits.ndim} dims, counted from 0."
        )


def log_probabilities(logits: Tensor, class_dim: int, by: str) -> Tensor:
    """The logarithm of the softmax over the classes, as 32-bit floats at least.

    Raises:
        ModelMismatch: there is no such dim, or one class.
    """
    require_class_dim(logits, class_dim, by)
    require_classes(logits, class_dim, by)
    return F.log_softmax(precise(logits), dim=class_dim)


def precise(logits: Tensor) -> Tensor:
    """Logits as 32-bit floats at least: sums over classes need the precision."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def class_labels(run: Run, predictions: int, by: str, classes: int | None = None) -> Tensor:
    """The class numbers of the present batch, int64 ``(predictions,)``.

    Args:
        run: whose batch it is.
        predictions: of the network for the batch.
        by: the method's name.
        classes: how many there are; None where other numbers may stand for no label.

    Raises:
        ModelMismatch: the targets are something else.
        InputError: a number is not one of the classes.
    """
    target = run.batch.target
    if (
        not isinstance(target, Tensor)
        or target.is_floating_point()
        or target.numel() != predictions
    ):
        shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ModelMismatch(
            f"{by} needs one class number for each of the {predictions} predictions of a batch, and the "
            f"target is {shape}: use it for classification, or leave it out."
        )
    labels = target.reshape(-1).long()
    if classes is not None and bool(((labels < 0) | (labels >= classes)).any()):
        raise InputError(
            f"{by} needs a label for every sample, 0 to {classes - 1}, and those of a batch are "
            f"{int(labels.min())} to {int(labels.max())}: leave samples without a label out."
        )
    return labels


def output_width(run: Run, class_dim: int = -1) -> int:
    """How many classes the student tells apart, from one forward pass."""
    batch = next(run.calibration(1))
    with evaluation(run.model), torch.no_grad():
        logits = logits_of(answer(run.model, batch.inputs), "the student")
    require_class_dim(logits, class_dim, "the student")
    return logits.shape[class_dim]
