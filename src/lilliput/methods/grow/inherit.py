"""Inheritance: a network takes over every tensor that an earlier one has under the same name and shape.

Paper: How Transferable Are Features in Deep Neural Networks? (Yosinski, Clune, Bengio, Lipson; NIPS
2014; arXiv 1411.1792)

A network for task B starts from the first n layers of a network that was trained on task A; its other layers
are drawn at random. The paper names such networks AnB where the copied layers are frozen and AnB+ where
they are fine-tuned: ``layers`` says which are copied, the stage's ``train.trainable`` which of them learn.

Here "the same layer" means the same name, and the same shape of the tensor. So a stage that brings a network
with another number of classes keeps the trunk and draws its head anew (two classes first, then all), and a
stage with a longer network keeps the layers that it had.

Faithful: copying, random layers above, frozen or fine-tuned. Differs: what is copied follows from names and
patterns, not from a count of layers; running statistics of batch normalization are copied too.

Cost: nothing. When not to use it: where both networks have the same function but other widths, ``net2net``
keeps what was learned in all layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.select import matches
from ...core.types import Change, Layers
from ...errors import NothingChanged, NothingMatched, did_you_mean
from ...mechanisms.initializing import owner_of, refuse_encoded

State = Mapping[str, Tensor]


def obstacle(name: str, own: State, source: State) -> str:
    """Why a tensor cannot be inherited; empty if it can.

    Args:
        name: of the tensor in ``own``.
        own: the state of the network that inherits.
        source: the state of the network that it inherits from.

    Example:
        >>> obstacle("fc.weight", {"fc.weight": torch.ones(10, 4)}, {"fc.weight": torch.ones(2, 4)})
        'weight is (10, 4) here and (2, 4) there'
    """
    leaf = name.removeprefix(f"{owner_of(name)}.")
    if name not in source:
        return f"{leaf} is not there"
    if own[name].shape != source[name].shape:
        return f"{leaf} is {tuple(own[name].shape)} here and {tuple(source[name].shape)} there"
    return ""


@method
class Inherit(Method):
    """Start from the tensors that an earlier network has under the same name and shape.

    Put it into a stage that brings its own network (``model``); what is not inherited keeps the values that
    this network came with.

    Attributes:
        source: the network to inherit from: ``"previous"``, the name of an earlier stage, a file, or what a
            recipe's ``model`` may be.
        layers: pattern over names of modules, with all their tensors; ``"!head"`` keeps the own head.

    Example:
        >>> Inherit(layers="!fc2").source
        'previous'
    """

    family: ClassVar[str] = "grow"
    initializes: ClassVar[bool] = True

    source: Any = "previous"
    layers: Layers = "*"

    def check(self, model: nn.Module) -> None:
        """The pattern must cover a module that has tensors."""
        self._covered(model.state_dict())

    def attach(self, run: Run) -> None:
        """Copy what agrees.

        Raises:
            NothingMatched: no tensor does.
            NothingChanged: all that do are the same already.
        """
        refuse_encoded(run.model, "inherit")
        own = run.model.state_dict()
        source = run.find_network(self.source).to(run.device).state_dict()
        reasons = {name: obstacle(name, own, source) for name in self._covered(own)}
        matched = [name for name, reason in reasons.items() if not reason]
        self._refuse(own, source, matched, reasons)
        with torch.no_grad():
            for name in matched:
                own[name].copy_(source[name])
        self.memory(run)["layers"] = _by_layer(reasons)

    def finish(self, run: Run) -> list[Change]:
        """How many tensors each layer has inherited, and why not the others."""
        told = f"from {_called(self.source)}"
        return [
            Change(layer, "inherited tensors", 0, count, self.method_name(), why or told)
            for layer, count, why in self.memory(run)["layers"]
        ]

    def _covered(self, own: State) -> list[str]:
        """The tensors of the modules that the pattern covers."""
        owners = {name: owner_of(name) for name in own}
        covered = [name for name, owner in owners.items() if matches(self.layers, owner)]
        if not covered:
            pattern = self.layers if isinstance(self.layers, str) else ", ".join(self.layers)
            raise NothingMatched(
                f"inherit: the pattern {self.layers!r} covers no module with tensors."
                f"{did_you_mean(pattern.strip('*!'), dict.fromkeys(owners.values()))}"
            )
        return covered

    def _refuse(
        self, own: State, source: State, matched: list[str], reasons: Mapping[str, str]
    ) -> None:
        if not matched:
            told = "; ".join(f"{owner_of(n)}: {why}" for n, why in list(reasons.items())[:5])
            raise NothingMatched(
                f"inherit: no tensor that {self.layers!r} covers has the same name and shape in "
                f"{_called(self.source)} ({told}). The layers of both networks need the same names."
            )
        if all(torch.equal(own[name], source[name]) for name in matched):
            raise NothingChanged(
                f"inherit: all {len(matched)} tensors that agree with {_called(self.source)} in name and "
                "shape have the same values already: the stage works on that very network. Give the "
                "stage a network of its own (model: ...), or leave the method out."
            )


def _called(source: Any) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else repr(source)


def _by_layer(reasons: Mapping[str, str]) -> list[list[Any]]:
    """Of each layer the number of inherited tensors, and why others were not."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        found[owner_of(name)].append(reason)
    return [
        [layer, sum(not r for r in each), ", ".join(r for r in each if r)]
        for layer, each in found.items()
    ]
