"""Which layer costs the score: each layer pruned, or quantized, by itself.

One layer at a time is changed, everything else stays as it was, nothing is retrained, and the score is
taken on the validation batches. A layer whose score falls early deserves more weights or more bits.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.select import Weight, example_device, select
from ..core.task import Task, evaluate
from ..core.types import Layers
from ..errors import InputError
from ..mechanisms.encodings import Codebook, original_of, strip
from ..mechanisms.ranking import keep_largest

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
BITS = (8, 6, 5, 4, 3, 2)


@dataclass(frozen=True)
class Row:
    """The score with one layer changed.

    Attributes:
        layer: the weight's name.
        kind: what was done to it.
        amount: the sparsity, or the bits of its shared values.
        score: of the whole network on the validation batches.
    """

    layer: str
    kind: Literal["sparsity", "bits"]
    amount: float
    score: float


@dataclass(frozen=True)
class Sensitivity:
    """A scan over the layers of a model.

    Attributes:
        baseline: the score of the unchanged model.
        score_name: what the score is, with its unit.
        rows: a row for each layer and amount.
    """

    baseline: float
    score_name: str
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


def sensitivity(
    model: nn.Module,
    task: Task,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    bits: Sequence[int] = BITS,
    layers: Layers = "*",
    limit: int | None = None,
) -> Sensitivity:
    """Scan the layers of a model, one at a time.

    Args:
        model: left as it is; its encodings are taken off a copy.
        task: its validation batches and its score.
        sparsities: fractions of the layer's smallest weights that are set to zero.
        bits: sizes of the layer's codebook.
        layers: pattern over module names.
        limit: evaluate on so many validation batches; None for all.

    Returns:
        The scores. The cost is one evaluation for each layer and amount.

    Raises:
        InputError: a sparsity is not in [0, 1), bits are not from 1 to 16, or the limit is below 1.
        NothingMatched: the pattern covers no layer.
    """
    _check(sparsities, bits, limit)
    probe = copy.deepcopy(model)
    batches = list(itertools.islice(iter(task.validation), limit))
    device = example_device(model)

    def score() -> float:
        return evaluate(probe, batches, task.score, device)

    chosen = select(probe, layers, by="sensitivity")
    for weight in chosen:
        strip(weight)
    rows = [row for weight in chosen for row in _scan(weight, sparsities, bits, score)]
    return Sensitivity(score(), task.score_name, rows)


def _check(sparsities: Sequence[float], bits: Sequence[int], limit: int | None) -> None:
    wrong = [s for s in sparsities if not 0 <= s < 1] + [b for b in bits if not 1 <= b <= 16]
    if wrong or (limit is not None and limit < 1):
        raise InputError(
            f"sensitivity: sparsities={list(sparsities)}, bits={list(bits)}, limit={limit}: give sparsities "
            "of at least 0 and below 1, bits from 1 to 16, and at least 1 batch."
        )


def _scan(
    weight: Weight, sparsities: Iterable[float], bits: Iterable[int], score: Any
) -> Iterator[Row]:
    """All amounts on one layer, which is put back afterwards."""
    before = original_of(weight).detach().clone()
    for sparsity in sparsities:
        changed = before * keep_largest(before.abs(), sparsity)
        yield Row(weight.name, "sparsity", sparsity, _with(weight, changed, score))
    for number in bits:
        codebook = Codebook.fitted(before, number, "exact")
        yield Row(weight.name, "bits", number, _with(weight, codebook(codebook.start), score))
    _set(weight, before)


def _with(weight: Weight, value: Tensor, score: Any) -> float:
    _set(weight, value)
    return float(score())


@torch.no_grad()
def _set(weight: Weight, value: Tensor) -> None:
    original_of(weight).copy_(value)
