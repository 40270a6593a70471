"""Which weights are the least important: exact counts, whatever the ties.

Thresholding at the k-th value prunes too much when values repeat; here exactly ``k`` go.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count(total: int, sparsity: float) -> int:
    """How many of ``total`` weights a sparsity takes away."""
    return round(sparsity * total)


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """A bool mask, in the shape of ``scores``, that drops the ``round(sparsity * n)`` lowest.

    Example:
        >>> keep_largest(torch.ones(4), 0.5).sum()
        tensor(2)
    """
    flat = scores.reshape(-1)
    dropped = count(flat.numel(), sparsity)
    kept = flat.numel() - dropped
    fewer_kept = kept < dropped  # selecting the shorter side is faster
    chosen = torch.topk(flat, min(kept, dropped), largest=fewer_kept, sorted=False).indices
    mask = torch.full_like(flat, not fewer_kept, dtype=torch.bool)
    mask[chosen] = fewer_kept
    return mask.view(scores.shape)


def keep_largest_together(scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks that drop the lowest of all tensors together; each tensor keeps at least its largest."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    ends = torch.tensor([s.numel() for s in scores]).cumsum(0).tolist()
    protected = flat.clone()
    for s, end in zip(scores, ends, strict=True):
        protected[end - s.numel() + int(s.argmax())] = torch.inf
    most = (len(flat) - len(scores)) / len(flat)
    masks = keep_largest(protected, min(sparsity, most))
    return [masks[end - s.numel() : end].view(s.shape) for s, end in zip(scores, ends, strict=True)]
