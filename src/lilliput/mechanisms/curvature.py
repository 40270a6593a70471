"""Second derivatives of a loss with respect to weights, and their inverses.

A Hessian is never differentiated twice: it is the mean of outer products of *vectors*, one or a few a
sample. Derivatives of the outputs, weighted by the loss's own curvature there, give the Gauss-Newton
matrix (what Hassibi & Stork 1993 use, exact where the network is linear in its weights); derivatives of the
loss give the empirical Fisher matrix; a layer's inputs give the Hessian of the squared error of its output.

The surprising rule: vectors are those of *effective* weights, whatever encodings lie beneath, in eval mode,
and each sample is differentiated by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from ..core.select import Weight
from ..core.task import Loss, answer, batch_size, evaluation
from ..core.types import Batch
from ..errors import InputError
from .solvers import matrix, visit_rows

#: Curvature of the loss at an output below this part of the largest counts as none.
_FLAT = 1e-9


def one_by_one(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first samples of the batches, each as a batch of one."""
    seen = 0
    for batch in batches:
        for number in range(min(batch_size(batch), samples - seen)):
            seen += 1
            yield Batch(_row(batch.inputs, number), _row(batch.target, number))


def output_vectors(
    model: nn.Module,
    weights: list[Weight],
    others: list[nn.Parameter],
    samples: Iterable[Batch],
    loss: Loss,
) -> Iterator[Tensor]:
    """Vectors whose mean outer product is the Gauss-Newton matrix of the loss.

    With J the derivative of a sample's outputs by the weights and S the second derivative of the loss
    by the outputs, they are the rows of ``sqrt(S) J``: for half a squared error simply J.

    Args:
        model: run in eval mode, and left as it is.
        weights: their effective values come first in a vector, one after the other.
        others: parameters that follow.
        samples: of :func:`one_by_one`, or whole batches, each of which then counts as one.
        loss: of the task, a mean over the batch.

    Yields:
        For each sample a tensor ``(directions, entries)``.
    """
    for output, target, values in _forward(model, weights, others, samples):
        yield _derivatives(output, values, _root(loss, output.detach(), target))


def loss_vectors(
    model: nn.Module,
    weights: list[Weight],
    others: list[nn.Parameter],
    samples: Iterable[Batch],
    loss: Loss,
) -> Iterator[Tensor]:
    """The gradient of each sample's loss, ``(1, entries)``; else as :func:`output_vectors`."""
    for output, target, values in _forward(model, weights, others, samples):
        known = output.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(known, target), known)
        yield _derivatives(output, values, slope.reshape(1, -1))


def diagonal(
    model: nn.Module, weights: list[Weight], samples: Iterable[Batch], loss: Loss
) -> list[Tensor]:
    """The diagonal of the Gauss-Newton matrix, a tensor in the shape of each weight."""
    total, count = torch.zeros(sum(w.value.numel() for w in weights), dtype=torch.float64), 0
    for found in output_vectors(model, weights, [], samples, loss):
        total += found.square().sum(0).double().cpu()
        count += 1
    return _shaped(total / max(count, 1), weights)


def second_moments(
    model: nn.Module, weights: list[Weight], batches: Iterable[Batch], loss: Loss
) -> list[Tensor]:
    """The root of the mean squared gradient of a batch, as Adam knows it, in the shape of each weight."""
    total, count = torch.zeros(sum(w.value.numel() for w in weights), dtype=torch.float64), 0
    for found in loss_vectors(model, weights, [], batches, loss):
        total += found[0].square().double().cpu()
        count += 1
    return _shaped((total / max(count, 1)).sqrt(), weights)


def _shaped(flat: Tensor, weights: list[Weight]) -> list[Tensor]:
    parts = flat.split([w.value.numel() for w in weights])
    return [part.view_as(w.value) for part, w in zip(parts, weights, strict=True)]


def input_hessians(
    model: nn.Module,
    layers: list[str],
    batches: Iterable[Batch],
    per_sample: int,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """For each layer the mean of ``x x^T`` over its inputs, one a group of channels, and how many there were.

    Half the squared error of a filter's output has this Hessian. A row of the filter is laid out with its
    input channels next to each other: ``(kernel positions, channels)``.

    Returns:
        Shape ``(groups, columns, columns)`` in double precision, and the number of inputs.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def use(name: str, met: Tensor) -> None:
        groups = getattr(model.get_submodule(name), "groups", 1)
        x = met.double().unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(2)
        sums[name] = sums.get(name, 0) + x.transpose(1, 2) @ x
        counts[name] += x.shape[1]

    visit_rows(model, layers, batches, per_sample, generator, use, once=True)
    return {name: total / counts[name] for name, total in sums.items()}, counts


def as_rows(layer: Any) -> Tensor:
    """A layer's weight ``(groups, filters of a group, columns)``, laid out as in :func:`input_hessians`."""
    rows: Tensor = matrix(layer).transpose(1, 2).flatten(1)
    return rows.view(getattr(layer, "groups", 1), -1, rows.shape[1])


def from_rows(layer: Any, rows: Tensor) -> Tensor:
    """The weight whose :func:`as_rows` these are."""
    shape, kernel = matrix(layer).shape, layer.weight.shape[2:]
    weight: Tensor = rows.flatten(0, 1).unflatten(1, (shape[2], shape[1])).transpose(1, 2)
    weight = weight.unflatten(2, tuple(kernel)) if kernel else weight.squeeze(2)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return weight.transpose(0, 1) if transposed else weight


def extended(inverse: Tensor, vectors: Tensor, total: int) -> Tensor:
    """The inverse of a Hessian to which the outer products of some vectors are added.

    Hassibi & Stork 1993, equation 8, for several vectors at once::

        (H + X^T X / P)^-1 = H^-1 - H^-1 X^T (P + X H^-1 X^T)^-1 X H^-1

    Args:
        inverse: ``(..., entries, entries)``.
        vectors: X, ``(..., vectors, entries)``.
        total: P, the number of samples over which the mean is taken.

    Example:
        >>> extended(torch.eye(2), torch.tensor([[1.0, 0.0]]), 1)
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """
    moved = vectors @ inverse
    middle = total * torch.eye(vectors.shape[-2]).to(inverse) + moved @ vectors.mT
    step: Tensor = moved.mT @ torch.linalg.solve(middle, moved)
    return inverse - step


def inverse_by_recursion(vectors: Iterable[Tensor], total: int, damping: float) -> Tensor:
    """The inverse of ``damping * I + the mean outer product`` without ever forming that.

    Args:
        vectors: each ``(..., vectors, entries)``; taken in one after the other.
        total: number of samples.
        damping: alpha, the Hessian at the beginning is ``alpha * I``.

    Raises:
        InputError: there are no vectors, or the result is not finite.
    """
    inverse: Tensor | None = None
    for found in vectors:
        if inverse is None:
            start = torch.eye(found.shape[-1], dtype=torch.float64, device=found.device) / damping
            inverse = start.expand(*found.shape[:-2], *start.shape).contiguous()
        inverse = extended(inverse, found.double(), total)
    if inverse is None or not inverse.isfinite().all():
        raise InputError(
            "the Hessian cannot be inverted: it is singular, or not finite. Raise damping, or give "
            "more samples."
        )
    return inverse


def _row(tree: Any, number: int) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t[number : number + 1], tree)


def _forward(
    model: nn.Module, weights: list[Weight], others: list[nn.Parameter], samples: Iterable[Batch]
) -> Iterator[tuple[Tensor, Any, list[Tensor]]]:
    """The output for each sample with what it depends on."""
    with evaluation(model), torch.enable_grad(), _differentiable([w.module for w in weights]):
        for sample in samples:
            with parametrize.cached():
                values = [*(w.value for w in weights), *others]
                output = answer(model, sample.inputs)
            if not isinstance(output, Tensor):
                raise InputError(
                    f"the model's output is a {type(output).__name__}: curvature at the outputs needs one "
                    "tensor. Measure it layer by layer instead."
                )
            yield output, sample.target, values


class _differentiable:
    """Let parameters that are frozen take part, and freeze them again afterwards."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.frozen = [p for m in modules for p in m.parameters() if not p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(parameter.is_floating_point())

    def __exit__(self, *error: Any) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(False)


def _root(loss: Loss, output: Tensor, target: Any) -> Tensor:
    """``sqrt(S)``, the rows that are not zero: S is the second derivative of the loss by one output."""
    second = hessian(lambda o: loss(o, target), output).reshape(output.numel(), -1).double()
    size, direction = torch.linalg.eigh((second + second.T) / 2)
    bent = size > _FLAT * size.abs().max()
    root: Tensor = (direction[:, bent] * size[bent].sqrt()).T
    return root.to(output)


def _derivatives(output: Tensor, values: list[Tensor], directions: Tensor) -> Tensor:
    found = [
        torch.autograd.grad(
            output, values, direction.reshape(output.shape), retain_graph=True, allow_unused=True
        )
        for direction in directions
    ]
    entries = sum(v.numel() for v in values)
    if not found:
        return output.new_zeros(0, entries)
    return torch.stack([_flat(gradients, values) for gradients in found])


def _flat(gradients: tuple[Tensor | None, ...], values: list[Tensor]) -> Tensor:
    return torch.cat([
        torch.zeros_like(v).flatten() if g is None else g.flatten()
        for g, v in zip(gradients, values, strict=True)
    ])  # fmt: skip
