"""One call for those who just want a thinner network: no data, no training loop, no recipe.

The surprising rule: nothing is retrained, so the accuracy falls; fine-tune the result before judging it.
Where training data are at hand, a recipe with a data-driven criterion does better at the same cost.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .core import registry
from .core.run import Run
from .core.select import example_device
from .core.task import Task
from .core.types import Change
from .errors import InputError
from .mechanisms.groups import exported
from .mechanisms.surgery import plan_of


@dataclass(frozen=True, repr=False)
class Thinned:
    """A network with fewer channels.

    Attributes:
        model: the thin network, in the same mode as the one that was given, ready to be fine-tuned.
        plan: tensor name -> dim -> the indices that are left, counted in the network as its class
            builds it.
        unprunable: ``"layer.weight dim 0"`` -> why the channels there had to stay.
        error: largest difference to the given network with the removed channels silenced, relative to
            the largest output; None where the two cannot be compared.
        changes: the width of each thinner layer, then parameters and multiply-accumulates, before and
            after.
    """

    model: nn.Module
    plan: Mapping[str, Mapping[int, np.ndarray]]
    unprunable: Mapping[str, str]
    error: float | None
    changes: list[Change]

    def summary(self) -> str:
        """The changes as lines of text."""
        places = [(c.where if c.what == "channels" else c.what, c) for c in self.changes]
        width = max(len(name) for name, _ in places)
        return "\n".join(
            f"{name:<{width}}  {c.before:>13,} -> {c.after:>13,}  {c.after / c.before:>6.1%}"
            for name, c in places
        )

    def __repr__(self) -> str:
        """One line: how many layers are thinner, and what the whole is now."""
        totals = [c for c in self.changes if c.where == "model"]
        told = ", ".join(f"{c.what} {c.before:,} -> {c.after:,}" for c in totals)
        thinner = sum(c.what == "channels" for c in self.changes)
        return f"Thinned({thinner} layers thinner, {told})"


def thin(
    model: nn.Module,
    example_inputs: Any,
    keep: float | dict[str, float] = 0.5,
    by: str = "filter_l1",
    round_to: int = 8,
    rewrite: bool = False,
) -> Thinned:
    """Remove whole channels from a copy of a network, by its weights alone.

    Args:
        model: any module; it stays as it is.
        example_inputs: what its ``forward`` takes: a tensor, a tuple of positional arguments or a dict
            of keyword arguments. One example is enough.
        keep: fraction of the channels that stay, of every layer or by layer pattern. The output's
            width stays.
        by: name of a method that needs no data.
        round_to: widths become multiples of it, which runtimes like; 1 for exact counts.
        rewrite: thin a graph of the network instead (``torch.export``), in which the numbers that stand in
            ``forward`` can be corrected. For networks of which ``unprunable`` says "its size is a
            number in the code". The result then is a ``GraphModule``, in eval mode for ever; its file
            loads into the rewritten network, ``exported(MyNetwork(), example_inputs)``.

    Returns:
        The thin network, and what was done.

    Raises:
        UnknownName: no such method.
        InputError: the method needs data, or a setting is out of range.
        NothingMatched: the patterns cover no layer that can be thinner.
        NothingChanged: rounding leaves every layer as it is.
        ModelMismatch, SurgeryFailed: the network does not run on the example, or cannot be cut.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> thinned = thin(net, torch.randn(1, 8))
        >>> thinned
        Thinned(1 layers thinner, parameters 387 -> 195, macs 352 -> 176)
        >>> thinned.model[0].out_features, net[0].out_features
        (16, 32)
    """
    cls: Any = registry.load("method", by)
    if not getattr(cls, "data_free", False):
        raise InputError(
            f"{by} needs data, and thin() has none. Use {', '.join(_data_free())}, or run {by} in a "
            "recipe or through lilliput.compress."
        )
    method = cls(keep=keep, round_to=round_to)
    copied = copy.deepcopy(exported(model, example_inputs) if rewrite else model)
    run = Run(
        model=copied,
        task=_Example(example_inputs),
        device=example_device(model),
        original=model,
        methods=[method],
    )
    unprunable = method.groups(run).unprunable
    method.attach(run)
    changes = method.finish(run)
    plan = plan_of(copied)
    assert plan is not None  # a method that removes nothing has raised
    return Thinned(copied, plan.kept, unprunable, method.memory(run)["error"], changes)


class _Example(Task):
    """A task that has nothing but an example."""

    def __init__(self, inputs: Any) -> None:
        super().__init__((), (), None, _nothing, _nothing, name="an example")
        self._inputs = inputs

    def example_inputs(self) -> Any:
        """The example, whole: it may be anything but a batch."""
        return self._inputs


def _nothing(output: Any, target: Any) -> Tensor:
    return torch.zeros(())


def _data_free() -> list[str]:
    entries = registry.entries("method").values()
    return [
        e.name for e in entries if e.family == "prune" and getattr(e.load(), "data_free", False)
    ]
