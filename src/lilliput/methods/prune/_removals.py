"""Weights removed at the least price of a quadratic, the others making up for them.

Several independent problems are solved at once: ``problems`` is the first dim of the weights and of their
inverse Hessians. Optimal Brain Surgeon has one problem, the block-diagonal Fisher matrix one a block, a
layer one a filter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...mechanisms.columns import factor_of, settle_columns
from ...mechanisms.ranking import count, keep_largest


def prices(weights: Tensor, inverse: Tensor) -> Tensor:
    """``L_q`` of every weight, ``(..., entries)``.

    Example:
        >>> prices(torch.tensor([1.0, 2.0]), torch.eye(2))
        tensor([0.5000, 2.0000])
    """
    return weights.square() / (2.0 * inverse.diagonal(dim1=-2, dim2=-1))


def remove(weights: Tensor, inverse: Tensor, chosen: Tensor) -> None:
    """Make one weight of every problem zero, move the others, and take it out of the inverse; in place.

    Args:
        weights: ``(problems, entries)``.
        inverse: ``(problems, entries, entries)``.
        chosen: int64 ``(problems,)``; -1 leaves a problem alone.
    """
    every = (chosen >= 0).nonzero().flatten()
    q = chosen[every]
    column = inverse[every, :, q]
    size = column.gather(1, q[:, None])
    weights[every] -= weights[every, q][:, None] / size * column
    weights[every, q] = 0.0
    inverse[every] -= column[:, :, None] * (column / size)[:, None, :]
    inverse[every, q, :] = 0.0  # exactly: a rounding error here would move what was removed
    inverse[every, :, q] = 0.0


def removals(
    weights: Tensor, inverse: Tensor, alive: Tensor, counts: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Remove the cheapest weight of every problem, again and again; in place.

    Args:
        weights: ``(problems, entries)``.
        inverse: ``(problems, entries, entries)``.
        alive: bool ``(problems, entries)``, which may go.
        counts: int64 ``(problems,)``, how many of each go.

    Yields:
        Which went, -1 where a problem has lost enough, and their prices.
    """
    for turn in range(int(counts.max()) if len(counts) else 0):
        price = prices(weights, inverse).masked_fill(~alive, torch.inf)
        cheapest, chosen = price.min(dim=1)
        chosen = torch.where((turn < counts) & cheapest.isfinite(), chosen, -1)
        remove(weights, inverse, chosen)
        gone = chosen >= 0
        alive[gone, chosen[gone]] = False
        yield chosen, torch.where(gone, cheapest, 0.0)


def shares(weights: Tensor, inverse: Tensor, alive: Tensor, total: int) -> Tensor:
    """How many weights each problem loses so that ``total`` go at the least price.

    Every problem is emptied on a copy. A problem's prices count as rising: what comes after a dear weight is
    no cheaper, for it cannot be had without it.
    """
    found = removals(weights.clone(), inverse.clone(), alive.clone(), alive.sum(1))
    traces = [torch.where(chosen >= 0, price, torch.inf) for chosen, price in found]
    rising = torch.stack(traces, dim=1).cummax(dim=1).values
    cheapest = rising.flatten().topk(total, largest=False).indices
    return torch.bincount(cheapest // rising.shape[1], minlength=len(rising))


def greedy(weights: Tensor, inverse: Tensor, total: int) -> Tensor:
    """Optimal Brain Compression: the new weights, ``total`` zeros in them, with the least price over all.

    Args:
        weights: ``(problems, entries)``; what is zero counts, and stays so.
        inverse: ``(problems, entries, entries)``.
        total: how many zeros over all problems.
    """
    weights, inverse = weights.clone(), inverse.clone()
    alive = torch.ones_like(weights, dtype=torch.bool)
    counts = shares(weights, inverse, alive, total)
    for _ in removals(weights, inverse, alive, counts):
        pass
    return weights


def sweep(
    weights: Tensor, hessian: Tensor, sparsity: float, block: int, pattern: tuple[int, int] | None
) -> Tensor:
    """SparseGPT: the new weights, chosen and made up for in one pass over the columns.

    Args:
        weights: ``(filters, columns)``; what is zero counts, and stays so.
        hessian: ``(columns, columns)``, damped.
        sparsity: of all of them.
        block: columns among which weights are chosen together.
        pattern: (n, m): n of m neighboring columns stay in every filter; in place of sparsity and block.
    """
    weights = weights.clone()
    dead = weights == 0
    factor = factor_of(hessian)
    together = pattern[1] if pattern else block
    gone_before = 0
    for first in range(0, weights.shape[1], together):
        last = min(first + together, weights.shape[1])
        price = (weights[:, first:last] / factor.diagonal()[first:last]).square()
        price = price.masked_fill(dead[:, first:last], -1.0)
        if pattern:
            kept = torch.zeros_like(price, dtype=torch.bool)
            kept.scatter_(1, price.topk(pattern[0], dim=1).indices, True)
        else:
            due = max(count(weights[:, :last].numel(), sparsity) - gone_before, 0)
            kept = keep_largest(price, due / price.numel())
        kept &= ~dead[:, first:last]  # more may be dead than are due
        gone_before += int((~kept).sum())
        settle_columns(
            weights, factor, range(first, last), partial(_cleared, kept=kept, first=first)
        )
    return weights


def _cleared(column: int, values: Tensor, kept: Tensor, first: int) -> Tensor:
    return torch.where(kept[:, column - first], values, 0.0)
