"""PackNet: each task trains the weights that earlier ones left free, prunes them, and frees what it can.

Paper: PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning (Mallya, Lazebnik; CVPR 2018;
arXiv 1711.05769)

Every weight of the backbone has an owner: task 1, task 2, ..., or nobody yet. Task t

1. trains all free weights, from zero, beside the fixed weights of tasks 1 to t-1 that it sees too;
2. gives back the fraction ``prune`` of them with the smallest magnitude in every layer, which become zero
   and free;
3. retrains those that it keeps.

Biases and normalization, running statistics included, are those of the first task and never move again. Each
task has a last layer of its own. So every task computes for ever, bit for bit, what it computed when its
stage ended, and costs the logarithm of the number of tasks in bits a weight, less in the entropy-coded file.

Faithful: owners, order, pruning by layer, frozen statistics. Differs: exactly ``round(prune * n)`` weights
    of n
go, where the authors' code takes all that equal the threshold; the fixed weights lie in buffers, so that
momentum and weight decay need not be switched off for them; training and retraining share one learning-rate
schedule (``until`` parts them), unless two stages name the same task.

The surprising rule: the network that a stage leaves *is* its task. ``lilliput.switch`` makes it another.

Cost: a copy of the backbone while training. When not to use it: for more tasks than about ``log(1/n) /
log(prune)``, after which hardly 1/n of the weights are free; then ``piggyback``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight
from ...core.types import Change, Fraction, Sparsity
from ...errors import InputError
from ...mechanisms.encodings import Held, encode, encoding_of
from ...mechanisms.packing import Pack, set_pack
from ...mechanisms.ranking import keep_largest
from ._tasks import TaskMethod, known


@method
class Packnet(TaskMethod):
    """Add a task to a network by training its free weights.

    Attributes:
        task: name of the task.
        prune: fraction of the weights it trained that it gives back; 0 for the last task.
        until: part of the stage after which it gives them back; the rest is retraining.
        own: pattern over the modules that the task has for itself; by default the last layer with weights.
        outputs: width of its last layer, where it is another one than before.
        layers: pattern over module names, the same for all tasks of a network.

    Raises:
        InputError: no weight is free; the task exists; the layers are others than the first task's.

    Example:
        >>> Packnet(task="flowers", prune=0.75, outputs=102).until
        0.5
    """

    kind: ClassVar[str] = "owners"

    prune: Sparsity = 0.5
    until: Fraction = 0.5

    @classmethod
    def example(cls) -> Packnet:
        """Half of the weights stay free."""
        return cls(task="first")

    def attach(self, run: Run) -> None:
        """Hold what other tasks own."""
        pack = known(run, self.kind)
        self.begin(run, pack)
        memory, chosen = self.memory(run), self.weights(run.model)
        number = len(pack.tasks) + (not self.continues(pack))
        memory["number"], memory["pruned"] = number, False
        for weight in chosen:
            owner = _owner(pack, weight)
            free = (owner == number) if self.continues(pack) else (owner == 0)
            held = pack.weights.get(weight.name, weight.value).to(weight.value)
            visible = (owner > 0) & (owner < number)
            encode(weight, Held(free, torch.where(visible, held, 0.0)))
        if not any(bool(_held(w).free.any()) for w in chosen):
            raise InputError(
                f"packnet: no weight is free for {self.task}: {', '.join(pack.tasks)} own them all. Give "
                "back more in their stages (prune), or remove a task (lilliput.remove_task)."
            )

    def before_step(self, run: Run) -> None:
        """Give back when it is time."""
        super().before_step(run)
        if run.progress >= self.until:
            self._give_back(run)

    def settled(self, run: Run) -> bool:
        """Whether the task has given back."""
        return bool(self.memory(run)["pruned"])

    def finish(self, run: Run) -> list[Change]:
        """Enter the task into the network's pack."""
        self._give_back(run)
        pack, number = known(run, self.kind), self.memory(run)["number"]
        chosen, owners, values = self.weights(run.model), {}, {}
        own, shared = self.conclude(run)
        for weight in chosen:
            before, mine = _owner(pack, weight), _held(weight).free
            owner = torch.where(mine, number, before.masked_fill(before == number, 0))
            old = pack.weights.get(weight.name, torch.zeros_like(weight.value)).to(weight.value)
            new = torch.where(mine, weight.value.detach(), old)
            owners[weight.name] = owner.to(torch.uint8)
            values[weight.name] = torch.where(owner > 0, new, 0.0)
        tasks = pack.tasks if self.continues(pack) else (*pack.tasks, self.task)
        set_pack(run.model, replace(
            pack, tasks=tasks, current=self.task, weights=values, owners=owners,
            own={**pack.own, self.task: own}, shared=shared,
        ))  # fmt: skip
        return [
            Change(
                w.name, f"weights of {self.task}", 0, int(_held(w).free.sum()), self.method_name()
            )
            for w in chosen
        ]

    def _give_back(self, run: Run) -> None:
        """Free the smallest of the weights that the task has trained, once."""
        memory = self.memory(run)
        if memory["pruned"]:
            return
        memory["pruned"] = True
        for weight in self.weights(run.model):
            encoding = _held(weight)
            kept = encoding.free.clone()
            kept[encoding.free] = keep_largest(
                weight.value.detach()[encoding.free].abs(), self.prune
            )
            encoding.update(kept, encoding.held)


def _owner(pack: Pack, weight: Weight) -> Tensor:
    nobody = torch.zeros_like(weight.value, dtype=torch.uint8)
    return pack.owners.get(weight.name, nobody).to(nobody.device)


def _held(weight: Weight) -> Held:
    encoding = encoding_of(weight, Held)
    assert encoding is not None
    return encoding
