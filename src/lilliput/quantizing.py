"""One call for those who just want integers: a trained network, some inputs, no training loop, no recipe.

The surprising rule: the network that comes back computes what integers would, in real numbers, and is no
faster. :func:`lilliput.deploy.export` makes the file that a runtime executes in integers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .core import registry
from .core.run import Run
from .core.select import example_device
from .core.task import Task, answer, evaluation
from .core.types import Batch, Change


@dataclass(frozen=True, repr=False)
class Quantized:
    """A network of integers.

    Attributes:
        model: a copy, in eval mode; :func:`lilliput.save` and :func:`lilliput.deploy.export` keep its
            integers.
        changes: for each layer its bits; or why it stays in float.
    """

    model: nn.Module
    changes: list[Change]

    def __repr__(self) -> str:
        """One line: how many layers are integers."""
        layers = [c for c in self.changes if c.what == "bits"]
        integers = sum(c.after != c.before for c in layers)
        return f"Quantized({integers} of {len(layers)} layers are integers)"

    def summary(self) -> str:
        """The layers as lines of text."""
        width = max((len(c.where) for c in self.changes), default=0)
        return "\n".join(f"{c.where:<{width}}  {c.after!s:>3}  {c.note}" for c in self.changes)


def quantize(model: nn.Module, inputs: Iterable[Any], **settings: Any) -> Quantized:
    """Make weights and activations of a copy integers, without training.

    Args:
        model: any module; it stays as it is.
        inputs: of the model, some hundred samples in batches: tensors, tuples of positional arguments or
            dicts of keyword arguments. Never those on which you will measure.
        **settings: of the method ``post_training``: ``bits``, ``rounding``, ``calibration`` and others. With
            ``mean_bits`` a layer's price is how far its rounding moves the outputs, for there are no labels.

    Returns:
        The network, and what was done.

    Raises:
        NothingMatched: no layer can become integers.
        InputError: a setting is unknown or out of range; a weight is quantized already; activations are not
            finite, or always the same.
        EmptyData: there are no inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> quantize(net, [torch.randn(64, 8)])
        Quantized(2 of 2 layers are integers)
    """
    method: Any = registry.load("method", "post_training")(**settings)
    copied = copy.deepcopy(model).eval()
    batches = [Batch(x, None) for x in inputs]
    if method.mean_bits is not None:
        batches = _with_outputs(copied, batches)
    run = Run(
        model=copied,
        task=Task(batches, batches, None, _distance, _distance, name="some inputs"),
        device=example_device(model),
        original=model,
        methods=[method],
    )
    method.attach(run)
    return Quantized(copied, method.finish(run))


@torch.no_grad()
def _with_outputs(model: nn.Module, batches: list[Batch]) -> list[Batch]:
    """What the network answers in real numbers: without labels, a layer's price is how far it moves that."""
    with evaluation(model):
        return [Batch(b.inputs, answer(model, b.inputs)) for b in batches]


def _distance(output: Any, target: Any) -> Tensor:
    """The mean squared distance of all numbers that the network gives, relative to their mean square."""
    pairs = zip(_numbers(output), _numbers(target), strict=True)
    apart = [(o - t).square().mean() / t.square().mean().clamp(min=1e-12) for o, t in pairs]
    return torch.stack(apart).mean()


def _numbers(output: Any) -> list[Tensor]:
    found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    return [t.float() for t in found if t.is_floating_point()]
