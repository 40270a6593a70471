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

from .core import registry
from .core.run import Run
from .core.select import example_device
from .core.task import Task
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
        **settings: of the method ``post_training``: ``bits``, ``rounding``, ``calibration`` and others.

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
    batches = [Batch(x, None) for x in inputs]
    copied = copy.deepcopy(model).eval()
    run = Run(
        model=copied,
        task=Task(batches, batches, None, _nothing, _nothing, name="some inputs"),
        device=example_device(model),
        original=model,
        methods=[method],
    )
    method.attach(run)
    return Quantized(copied, method.finish(run))


def _nothing(output: Any, target: Any) -> Tensor:
    return torch.zeros(())
