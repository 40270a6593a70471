"""Curriculum: training begins with the easiest samples, and the others join by and by.

Paper: On the Power of Curriculum Learning in Training Deep Networks (Hacohen, Weinshall; ICML 2019; arXiv
1904.03626)

Paper: Curriculum Learning (Bengio, Louradour, Collobert, Weston; ICML 2009; doi 10.1145/1553374.1553380)

A scoring function says how difficult each sample is: the loss of a network on it, measured once before the
stage trains. If that network is a teacher, the paper speaks of transfer scoring, if it is an earlier
generation of the student, of self-taught scoring. The samples are put in order, each class by itself so that
every part of the order has the classes in their proportions. A pacing function says how many of the first
samples are shown at a step t:

- ``exponential``: ``g(t) = min(start * increase ** floor(t / length), 1)``, with ``length`` such that all
  samples are shown from ``over`` on;
- ``step``: ``start``, and from ``over`` on all;
- ``linear``: from ``start`` to all on a straight line (ours).

``order: hard`` (anti-curriculum) and ``random`` are the paper's controls: what an order is good for shows
only against them.

Faithful: scoring, balanced order, pacing, controls. Differs: the paper draws each batch at random from the
samples shown; here the task's own batches are read again and again and the samples whose turn has not come
are left out, so that augmentation goes on and every sample shown is seen equally often. The loss stands for
the paper's confidence in the right class; both give the same order for cross-entropy.

The surprising rule: batches keep their size and number, so a stage has as many steps as without a
curriculum. The order follows from seeds, not from what was drawn while training: an interrupted run goes on
bit for bit.

Cost: one forward pass of the scoring network over the training set and a loss for each sample; reading
batches whose samples are mostly left out, ``1 / start`` times as many at first. When not to use it: where
data are read from a slow disk, or where nearly all samples are easy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.digests import mix
from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.task import Loss, answer, batch_size, move
from ...core.types import Batch
from ...errors import ModelMismatch
from ._easy_first import EasyFirst, numbers_of, one_pass, ranks_of

Pacing: TypeAlias = Literal["exponential", "step", "linear"]


def pace(progress: float, start: float, over: float, pacing: Pacing, increase: float) -> float:
    """The part of the samples that is shown at a point of the stage.

    Args:
        progress: of the stage, 0 to 1.
        start: the part at the first step.
        over: progress from which on all are shown.
        pacing: see the module's docstring.
        increase: factor of each exponential step.

    Example:
        >>> [round(pace(p, 0.1, 0.5, "exponential", 2.0), 2) for p in (0.0, 0.125, 0.25, 0.375, 0.5)]
        [0.1, 0.2, 0.4, 0.8, 1.0]
    """
    if progress >= over:
        return 1.0
    if pacing == "linear":
        return start + (1.0 - start) * progress / over
    if pacing == "step":
        return start
    jumps = math.ceil(math.log(1.0 / start) / math.log(increase) - 1e-9)
    return min(start * increase ** math.floor(progress / over * jumps + 1e-9), 1.0)


def in_order(difficulty: Tensor, classes: Tensor | None) -> Tensor:
    """The samples from the easiest to the hardest, int64 ``(samples,)``.

    Args:
        difficulty: of each sample.
        classes: of each sample; every beginning of the order then has the classes in the proportions of the
            whole. None orders by difficulty alone.

    Example:
        >>> in_order(torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([0, 0, 0, 1])).tolist()
        [1, 2, 3, 0]
    """
    order = difficulty.argsort(stable=True)
    if classes is None:
        return order
    share = torch.empty(len(order), dtype=torch.float64)
    for one in classes.unique():
        places = (classes[order] == one).nonzero().flatten()
        share[places] = (torch.arange(len(places), dtype=torch.float64) + 0.5) / len(places)
    return order[share.argsort(stable=True)]


@torch.no_grad()
def losses(network: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """The loss of each sample by itself, float64 ``(samples,)`` on the processor."""
    answers = answer(network, batch.inputs), batch.target
    single = pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(1), answers)
    try:
        each: Tensor = torch.vmap(loss)(*single)
        return each.double().cpu().reshape(-1)
    except (RuntimeError, ValueError):  # not every loss can be mapped over samples: one by one

        def of(row: int) -> float:
            return float(loss(*pytree.tree_map_only(Tensor, lambda t: t[row], single)))

        return torch.tensor([of(row) for row in range(batch_size(batch))], dtype=torch.float64)


@method
class Curriculum(Method):
    """Show the easiest samples first and the others by and by.

    Attributes:
        teacher: the network whose loss says how difficult a sample is: ``"previous"``, ``"original"``, the
            name of an earlier stage, a file, an architecture with weights, or a module.
        order: ``"easy"``, ``"hard"`` or ``"random"`` samples first.
        start: the part of the samples that is shown at first.
        over: the part of the stage after which all are shown.
        pacing: how it grows; see the module's docstring.
        increase: factor of each exponential step.
        balanced: order each class by itself; the targets must be class numbers.

    Example:
        >>> Curriculum(start=0.2).order
        'easy'
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    teacher: Any = "previous"
    order: Literal["easy", "hard", "random"] = "easy"
    start: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    over: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    pacing: Pacing = "exponential"
    increase: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 1.9
    balanced: bool = True

    _sizes: list[int] = PrivateAttr()

    def attach(self, run: Run) -> None:
        """Measure how difficult each sample is.

        Raises:
            InputError: the batches carry no sample numbers, or classes are needed and there are none.
        """
        network = run.find_network(self.teacher).eval().to(run.device)
        seed = mix(run.seed, run.stage, "curriculum")
        batches = list(_measured(run, network, seed))
        self._sizes = [len(numbers) for numbers, _, _ in batches]
        numbers, difficulty = (torch.cat([b[part] for b in batches]) for part in (0, 1))
        if self.order == "random":
            generator = torch.Generator().manual_seed(seed)
            difficulty = torch.rand(len(difficulty), generator=generator, dtype=torch.float64)
        elif self.order == "hard":
            difficulty = -difficulty
        classes = _classes([target for _, _, target in batches]) if self.balanced else None
        # Remembered: another process might measure another last bit, and order two samples otherwise.
        self.memory(run)["ranks"] = ranks_of(numbers[in_order(difficulty, classes)])

    def data(self, run: Run, batches: Iterable[Any]) -> Iterable[Any]:
        """Let through only the samples whose turn has come."""

        def part(number: int) -> float:
            done = (run.epoch * len(self._sizes) + number) / max(1, run.total_steps)
            return pace(done, self.start, self.over, self.pacing, self.increase)

        return EasyFirst(batches, self._sizes, lambda: self.memory(run)["ranks"], part)

    def before_step(self, run: Run) -> None:
        """Log the part that is shown."""
        now = pace(run.progress, self.start, self.over, self.pacing, self.increase)
        run.log("curriculum/part", now)


def _measured(run: Run, network: nn.Module, seed: int) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Numbers, losses and targets of the samples of each training batch."""
    for item in one_pass(run.task.train, seed):
        batch = move(item, run.device)
        yield numbers_of(item), losses(network, batch, run.task.loss), item.target


def _classes(targets: Sequence[Any]) -> Tensor:
    numbers = [isinstance(t, Tensor) and t.ndim == 1 and not t.is_floating_point() for t in targets]
    if not all(numbers):
        raise ModelMismatch(
            "curriculum: balanced orders each class by itself, and the targets are no class numbers, one a "
            "sample. Set balanced to false."
        )
    return torch.cat([target.cpu() for target in targets])
