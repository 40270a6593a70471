"""Piggyback: each task learns which weights of a fixed network to switch off.

Paper: Piggyback: Adapting a Single Network to Multiple Tasks by Learning to Mask Weights (Mallya, Davis,
Lazebnik; ECCV 2018; arXiv 1801.06519)

The backbone W is fixed. For a task a real number r belongs to every weight, and the layer computes with::

    W * m,     m = 1 where r > threshold, else 0

The gradient of m, ``dL/d(W m) * W``, is passed to r as if r were m. All r begin at ``start``, above the
threshold, so that the first step is the backbone's. After training only m is kept: one bit a weight and
task, less in the entropy-coded file, for most weights stay. Each task has a last layer of its own; biases
and normalization are the backbone's (give ``own`` for a normalization of the task's own).

Faithful: masks, threshold, start, gradients. The paper trains masks with Adam at 1e-4. Differs: the numbers
    of a
weight that is zero get no gradient, as in the paper, but weight decay of the stage does reach them.

The surprising rule: ``base`` names the task that the network does *before* the stage; without it the network
forgets that task's last layer.

Cost: a number a weight while training. When not to use it: on a backbone that was not trained for something
    richer
than the task.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change
from ...errors import InputError
from ...mechanisms.encodings import (
    Codebook,
    Mask,
    Threshold,
    encode,
    encoding_of,
    original_of,
    strip,
    take_off,
)
from ...mechanisms.packing import Pack, Tensors, set_pack
from ._tasks import TaskMethod, known


@method
class Piggyback(TaskMethod):
    """Add a task to a network by learning a mask over its weights, which stay as they are.

    Attributes:
        task: name of the task.
        base: name for what the network does at the beginning, kept as a task too; only with the first
            task that is added.
        threshold: a weight lives where its number is above.
        start: all numbers at the beginning.
        own: pattern over the modules that the task has for itself; by default the last layer with weights.
        outputs: width of its last layer, where it is another one than before.
        layers: pattern over module names, the same for all tasks of a network.

    Raises:
        InputError: start is not above the threshold; the task exists; the layers are others than the first
            task's; a backbone that tasks share already is clustered.

    Example:
        >>> Piggyback(task="flowers", base="imagenet", outputs=102).threshold
        0.005
    """

    kind: ClassVar[str] = "masks"

    base: str | None = None
    threshold: float = 5e-3
    start: float = 1e-2

    @classmethod
    def example(cls) -> Piggyback:
        """A task on top of a network that is forgotten."""
        return cls(task="first", threshold=9.9e-3)

    def attach(self, run: Run) -> None:
        """Fix the backbone, and put masks on that train."""
        if self.start <= self.threshold:
            raise InputError(
                f"piggyback: start {self.start} is not above the threshold {self.threshold}: the whole "
                "network would be switched off."
            )
        pack = self._with_base(run, known(run, self.kind))
        self.begin(run, pack)
        frozen = self.memory(run)["frozen"]
        for weight in self.weights(run.model):
            if weight.name in pack.weights:
                _lay_bare(weight, pack.weights[weight.name])
            encode(weight, Threshold(weight.value.detach(), self.threshold, self.start))
            original_of(weight).requires_grad_(False)
            frozen.append(f"{weight.layer}.parametrizations.{weight.tensor}.original".lstrip("."))

    def finish(self, run: Run) -> list[Change]:
        """Keep the mask, and enter the task into the network's pack."""
        pack, chosen = known(run, self.kind), self.weights(run.model)
        own, shared = self.conclude(run)
        masks = {w.name: _threshold(w).mask().clone() for w in chosen}
        backbone = {w.name: _whole(w) for w in chosen}
        for weight in chosen:
            take_off(weight, Threshold)
            encode(weight, Mask(masks[weight.name]))
        tasks = pack.tasks if self.continues(pack) else (*pack.tasks, self.task)
        set_pack(run.model, replace(
            pack, tasks=tasks, current=self.task, weights=backbone, shared=shared,
            masks={**pack.masks, self.task: masks}, own={**pack.own, self.task: own},
        ))  # fmt: skip
        return [
            Change(
                w.name,
                "weights in use",
                w.value.numel(),
                int(masks[w.name].sum()),
                self.method_name(),
            )
            for w in chosen
        ]

    def _with_base(self, run: Run, pack: Pack) -> Pack:
        """The pack with what the network does now as its first task, where that is wanted."""
        if self.base is None:
            return pack
        if pack.tasks:
            raise InputError(
                f"piggyback: the network has the tasks {', '.join(pack.tasks)} already, so base: "
                f"{self.base} cannot name what it was before them. Leave base out."
            )
        self.memory(run)["frozen"] = []
        own, shared = self.conclude(run)
        weights = {w.name: w.value.detach().clone() for w in self.weights(run.model)}
        every: Tensors = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        with_base = Pack(
            self.kind,
            (self.base,),
            self.base,
            weights,
            {},
            {self.base: every},
            {self.base: own},
            shared,
        )
        set_pack(run.model, with_base)
        return with_base


def _lay_bare(weight: Weight, backbone: Tensor) -> None:
    """Let a weight be the backbone's again, under no task's mask."""
    if encoding_of(weight, Codebook) is not None:
        raise InputError(
            f"piggyback: {weight.name} is clustered, and the network has tasks that share it. Cluster it "
            "before the first task is added."
        )
    strip(weight)
    original_of(weight).data.copy_(backbone)


def _threshold(weight: Weight) -> Threshold:
    encoding = encoding_of(weight, Threshold)
    assert encoding is not None
    return encoding


@torch.no_grad()
def _whole(weight: Weight) -> Tensor:
    """The weight as if its mask let all of it through."""
    _threshold(weight).numbers.fill_(_threshold(weight).start)
    return weight.value.detach().clone()
