"""Gradual pruning: the sparsity rises by a cubic schedule while the network trains on.

Paper: To prune, or not to prune: exploring the efficacy of pruning for model compression (Zhu, Gupta;
ICLR Workshop 2018; arXiv 1710.01878)

Equation 1: ``s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (n * dt))**3``. Every ``every`` steps the weights of
smallest magnitude of each layer are masked so that exactly ``round(s_t * N)`` are zero; masked weights
get no update, and training goes on between and after.

Weights that an earlier stage has pruned go first, and stay pruned even while the schedule asks for less.

Faithful: schedule, ranking within a layer, masked weights stay at zero. As options, the ranking may
go over all layers together, and dead neurons lose their other connections at the end.

The schedule itself is :class:`lilliput.core.schedule.Schedule`, which other methods use too.

Cost: one selection over the weights every ``every`` steps. When not to use it: with fewer than some ten
epochs to train, where one-shot pruning and retraining does as well.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...core.registry import method
from ...core.run import Run
from ...core.schedule import Schedule
from ...core.select import Weight
from ...core.types import Change, PerLayer, Sparsity
from ...mechanisms.encodings import Mask, encoding_of, reapply, stored_masks
from ...mechanisms.ranking import keep_largest, keep_largest_together
from ._allocation import SparsityMethod
from ._dead import remove_dead_connections
from ._masking import changes, mask_of, nonzeros, put_masks


@method
class Gradual(SparsityMethod):
    """Raise the sparsity by the cubic schedule, smallest magnitudes first.

    Attributes:
        sparsity: final fraction of zeros, exactly; for every layer or by layer pattern.
        allocation: how one sparsity is spread over the layers: uniform, by one ranking of all weights
            (magnitude), by shape (erk), by sensitivity, or by energy.
        scope: rank within each layer as the paper does, or anew over all layers together in each update.
        layers: pattern over module names.
        schedule: shape, begin, end, initial sparsity and distance of the updates in steps.
        remove_dead: cut the other connections of neurons that have lost all inputs or all outputs.

    Example:
        >>> round(Gradual(sparsity=0.9).schedule.amount(0.375, final=0.9), 4)
        0.7875
    """

    family: ClassVar[str] = "prune"

    sparsity: PerLayer[Sparsity]
    scope: Literal["layer", "global"] = "layer"
    schedule: Schedule = Field(default_factory=lambda: Schedule(shape="cubic", end=0.75))
    remove_dead: bool = True

    @classmethod
    def example(cls) -> Gradual:
        """Half of the weights go."""
        return cls(sparsity=0.5)

    def attach(self, run: Run) -> None:
        """Put masks on where there are none yet."""
        chosen = self.weights(run.model)
        self.memory(run)["before"] = {w.name: nonzeros(w.value) for w in chosen}
        # Names only: the masks themselves say which weights, and are cut with the layers by surgery.
        self.memory(run)["masked"] = [w.name for w in chosen if encoding_of(w, Mask)]
        self.allocate(run, chosen)
        put_masks(chosen)
        if not run.total_steps:
            self._prune(run, 1.0)

    def before_step(self, run: Run) -> None:
        """Follow the schedule."""
        if self.schedule.due(run.step, run.total_steps) and not self.settled(run):
            self._prune(run, run.progress)
            self.memory(run)["settled"] = run.progress >= self.schedule.end

    def settled(self, run: Run) -> bool:
        """Whether the final sparsity is reached."""
        return bool(self.memory(run).get("settled"))

    def finish(self, run: Run) -> list[Change]:
        """Reach the final sparsity; cut dead neurons."""
        chosen = self.weights(run.model)
        if not self.settled(run):
            self._prune(run, 1.0)
        if self.remove_dead:
            remove_dead_connections(run, chosen)
        return changes(self.method_name(), chosen, self.memory(run)["before"], lambda w: "")

    def _prune(self, run: Run, progress: float) -> None:
        chosen = self.weights(run.model)
        scores = [w.value.detach().abs() for w in chosen]
        before = self._pruned_before(run, chosen)
        scores = [
            s if b is None else s.masked_fill(b, -1.0) for s, b in zip(scores, before, strict=True)
        ]
        masks = self._masks(run, chosen, scores, progress)
        for weight, gone, mask in zip(chosen, before, masks, strict=True):
            mask_of(weight).update(mask if gone is None else mask & ~gone)
        reapply(stored_masks(run.model))

    def _pruned_before(self, run: Run, chosen: list[Weight]) -> list[Tensor | None]:
        """What stays pruned; None for weights on which this stage has put the first mask.

        In such weights a zero is no verdict: it may be how training begins, and may become something else.
        """
        masked = self.memory(run)["masked"]
        return [~mask_of(w).mask if w.name in masked else None for w in chosen]

    def _masks(
        self, run: Run, chosen: list[Weight], scores: list[Tensor], progress: float
    ) -> list[Tensor]:
        if self.scope == "global" and not isinstance(self.sparsity, dict):
            return keep_largest_together(scores, self.schedule.amount(progress, self.sparsity))
        return [
            keep_largest(s, self.schedule.amount(progress, self.final(run, w)))
            for w, s in zip(chosen, scores, strict=True)
        ]
