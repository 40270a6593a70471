"""Magnitude pruning: weights near zero go, the others learn to do without them.

Paper: Learning both Weights and Connections for Efficient Neural Networks (Han, Pool, Tran, Dally;
NIPS 2015; arXiv 1506.02626)

The paper's threshold is a quality factor times the standard deviation of the layer's dense weights,
``|w| < q * std(W)``; retraining goes on from the kept values, and prune and retrain alternate with
growing q. Here ``threshold`` is q, and ``rounds`` is how often a stage prunes: round r of n uses
``q * r / n``. ``sparsity`` states the exact fraction of zeros instead, per layer or over all layers
together. A pruned weight never returns.

Dropout is weakened with the connections, ``D_r = D_o * sqrt(C_r / C_o)`` (equation 2), and neurons left
without an input or without an output lose their other connections too; a constant that such a neuron
still sends is folded into the next bias.

Faithful: threshold, masks, retraining, dropout, dead neurons. Differs: the paper folds no constants, it
lets retraining with weight decay drive them to zero. Freezing the convolutions while the linear layers
retrain, as the paper does, is the stage's ``train.trainable``.

Cost: one selection over the weights a round. When not to use it: zeros in a dense layer make a file
smaller, not an inference faster; for speed remove whole channels.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import Tensor, nn

from ...core.registry import method
from ...core.run import Run
from ...core.select import Weight, weights
from ...core.types import Change, PerLayer, Positive, resolve
from ...mechanisms.encodings import reapply, stored_masks
from ...mechanisms.ranking import keep_largest, keep_largest_together
from ._in_rounds import SparseInRounds
from ._masking import mask_of, nonzeros


def above_threshold(weight: Tensor, quality: float, deviation: float) -> Tensor:
    """Which weights survive ``|w| >= quality * deviation``."""
    return weight.abs() >= quality * deviation


def corrected_dropout(rate: float, kept: int, total: int) -> float:
    """Equation 2: the dropout rate for a layer that kept ``kept`` of ``total`` connections.

    Example:
        >>> corrected_dropout(0.5, 25, 100)
        0.25
    """
    return rate * math.sqrt(kept / total)


@method
class Magnitude(SparseInRounds):
    """Prune the weights of smallest magnitude and keep them at zero while the rest retrains.

    Attributes:
        sparsity: fraction of zeros, exactly; for every layer or by layer pattern. A layer that no
            pattern covers stays dense.
        threshold: quality factor q, in standard deviations of the dense layer; instead of sparsity.
        allocation: how one sparsity is spread over the layers: uniform, by one ranking of all weights
            (magnitude), by shape (erk), by sensitivity, or by energy.
        scope: rank the weights of each layer by themselves, or anew of all layers together in each round
            (sparsity only).
        layers: pattern over module names.
        rounds: how often the stage prunes, each time retraining afterwards.
        until: part of the stage over which the rounds are spread; the rest is the last retraining.
        correct_dropout: weaken the dropout that follows a pruned layer.
        remove_dead: cut the other connections of neurons that have lost all inputs or all outputs.

    Example:
        >>> Magnitude(sparsity={"conv*": 0.5, "fc*": 0.9}, rounds=3).scope
        'layer'
    """

    family: ClassVar[str] = "prune"

    threshold: PerLayer[Positive] | None = None
    scope: Literal["layer", "global"] = "layer"
    correct_dropout: bool = True

    @model_validator(mode="after")
    def _one_amount(self) -> Magnitude:
        if (self.sparsity is None) == (self.threshold is None):
            raise ValueError("give either sparsity or threshold, and not both")
        if self.scope == "global" and not isinstance(self.sparsity, float):
            raise ValueError("scope: global ranks all layers together: give one sparsity for all")
        if self.scope == "global" and self.allocation != "uniform":
            raise ValueError(
                "scope: global decides how sparse each layer becomes: leave allocation out"
            )
        return self

    @classmethod
    def example(cls) -> Magnitude:
        """Half of the weights go."""
        return cls(sparsity=0.5)

    def amounts(self) -> Any:
        """The setting that decides which layers take part."""
        return self.sparsity if self.threshold is None else self.threshold

    def finish(self, run: Run) -> list[Change]:
        """Cut dead neurons; report the zeros of every layer and the dropout rates that changed."""
        found = super().finish(run)
        for name, before in self.memory(run)["dropout"].items():
            now = run.model.get_submodule(name).p
            if now != before:
                found.append(Change(name, "dropout rate", before, now, self.method_name()))
        return found

    def _remember(self, run: Run, chosen: list[Weight]) -> None:
        memory = self.memory(run)
        memory["deviation"] = {w.name: _deviation(w.value.detach()) for w in chosen}
        memory["dropout"] = dict(_dropouts(run.model))

    def _prune(self, run: Run, chosen: list[Weight], part: float) -> None:
        for weight, mask in zip(chosen, self._masks(run, chosen, part), strict=True):
            mask_of(weight).update(mask_of(weight).mask & mask)
        reapply(stored_masks(run.model))
        if self.correct_dropout:
            self._weaken_dropout(run, chosen)

    def _masks(self, run: Run, chosen: list[Weight], part: float) -> list[Tensor]:
        scores = [w.value.detach().abs() for w in chosen]
        if self.scope == "global":
            return keep_largest_together(scores, part * float(self.sparsity))  # type: ignore[arg-type]
        if self.threshold is None:
            amounts = [part * self.final(run, w) for w in chosen]
            return [keep_largest(s, a) for s, a in zip(scores, amounts, strict=True)]
        deviation = self.memory(run)["deviation"]
        return [
            above_threshold(s, part * (resolve(self.threshold, w.layer) or 0.0), deviation[w.name])
            for w, s in zip(chosen, scores, strict=True)
        ]

    def _weaken_dropout(self, run: Run, chosen: list[Weight]) -> None:
        """A dropout belongs to the weight that stands before it in the model's order of modules."""
        mine, every = {w.layer: w for w in chosen}, {w.layer for w in weights(run.model)}
        memory = self.memory(run)
        last: Weight | None = None
        for name, module in run.model.named_modules():
            last = mine.get(name) if name in every else last
            if name in memory["dropout"] and last is not None:
                # Of the connections as the stage found them: what an earlier one took it has counted.
                kept, total = nonzeros(last.value), max(memory["before"][last.name], 1)
                module.p = corrected_dropout(memory["dropout"][name], kept, total)


def _dropouts(model: nn.Module) -> list[tuple[str, float]]:
    kinds = nn.modules.dropout._DropoutNd
    return [(n, m.p) for n, m in model.named_modules() if isinstance(m, kinds)]


def _deviation(weight: Tensor) -> float:
    """The standard deviation; that of a single weight is zero, for which nothing of it is small."""
    return float(weight.std()) if weight.numel() > 1 else 0.0
