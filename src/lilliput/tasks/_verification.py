"""Are two embeddings of the same person? The contrastive loss, and what a verifier is measured by.

Paper: Dimensionality Reduction by Learning an Invariant Mapping (Hadsell, Chopra, LeCun; CVPR 2006; doi
10.1109/CVPR.2006.100)
Paper: Labeled Faces in the Wild: A Database for Studying Face Recognition in Unconstrained Environments
(Huang, Ramesh, Berg, Learned-Miller; University of Massachusetts 2007)

A pair is *the same* where the Euclidean distance d of its embeddings is below a threshold. Embeddings come
one after the other: rows 2k and 2k + 1 of a network's output are pair k, so that any network for single
images is a Siamese one, and its two branches have the same weights because they are one network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError, UnknownName

MEASURES = ("accuracy", "equal_error_rate")
#: Parts into which the pairs are cut, as in the protocol of Labeled Faces in the Wild.
_FOLDS = 10


def distances(output: Tensor) -> Tensor:
    """Euclidean distances of the pairs ``(pairs,)``, of embeddings ``(2 pairs, width)``.

    Example:
        >>> distances(torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
        tensor([5.])
    """
    first, second = output.float().unflatten(0, (-1, 2)).unbind(1)
    apart: Tensor = torch.linalg.vector_norm(first - second, dim=-1)
    return apart


def contrastive_loss(output: Tensor, same: Tensor, margin: float = 1.0) -> Tensor:
    """``y d^2 / 2 + (1 - y) max(0, margin - d)^2 / 2``, the mean over the pairs (Hadsell 2006, equation 4).

    The paper's Y is 0 for a similar pair; here y is 1 for the same person.

    Args:
        output: embeddings ``(2 pairs, width)``.
        same: 1 where both are the same person, else 0, ``(pairs,)``.
        margin: beyond which others do not have to be pushed.

    Example:
        >>> x = torch.tensor([[0.0], [0.6], [0.0], [0.6]])
        >>> contrastive_loss(x, torch.tensor([1, 0])).round(decimals=3)
        tensor(0.1300)
    """
    d, y = distances(output), same.to(output.dtype)
    return (y * d.square() + (1.0 - y) * (margin - d).clamp_min(0.0).square()).mean() / 2.0


def equal_error_rate(d: Tensor, same: Tensor) -> float:
    """The percentage at which as many strangers are taken in as friends are turned away.

    Between two thresholds both rates are joined by straight lines.

    Args:
        d: distances ``(pairs,)``.
        same: 1 or 0, ``(pairs,)``.

    Raises:
        InputError: there are no pairs of one of the two kinds.

    Example:
        >>> equal_error_rate(torch.tensor([0.1, 0.3, 0.2, 0.4]), torch.tensor([1, 1, 0, 0]))
        50.0
    """
    ordered = _ordered(d, same)
    accepted = torch.cat([torch.zeros(1, 2).double(), ordered])
    away, into = 1.0 - accepted[:, 1], accepted[:, 0]  # of friends, of strangers
    gap = into - away  # from -1 to 1, never falling
    after = int((gap >= 0).nonzero()[0])
    before = max(0, after - 1)
    step = float(gap[after] - gap[before])
    part = float(-gap[before]) / step if step else 0.0
    return 100.0 * float(into[before] + part * (into[after] - into[before]))


def _ordered(d: Tensor, same: Tensor) -> Tensor:
    """For each threshold, ascending, the parts of strangers and of friends that are nearer: ``(n, 2)``."""
    same = same.bool()
    if same.all() or not same.any():
        raise InputError(
            f"of {len(same)} pairs all are {'the same person' if len(same) and same[0] else 'strangers'}: an "
            "error rate needs both kinds."
        )
    values, place = d.unique(return_inverse=True)
    counts = torch.zeros(len(values), 2, dtype=torch.float64)
    counts.index_put_((place, same.long()), torch.ones(()).double(), accumulate=True)
    return counts.cumsum(0) / counts.sum(0)


def verification_accuracy(d: Tensor, same: Tensor, folds: int = _FOLDS) -> float:
    """Percent of pairs that are told right, each part by the threshold that was best on all others.

    That is the protocol of Labeled Faces in the Wild. Pairs k, k + folds, k + 2 folds ... are one part.

    Args:
        d: distances ``(pairs,)``.
        same: 1 or 0, ``(pairs,)``.
        folds: parts.

    Example:
        >>> d = torch.tensor([0.1, 0.2, 0.9, 0.8])
        >>> verification_accuracy(d, torch.tensor([1, 1, 0, 0]), folds=2)
        100.0
    """
    same, part = same.bool(), torch.arange(len(d)) % folds
    right = 0
    for fold in range(min(folds, len(d))):
        held = part == fold
        threshold = _best_threshold(d[~held], same[~held])
        right += int(((d[held] <= threshold) == same[held]).sum())
    return 100.0 * right / len(d)


def _best_threshold(d: Tensor, same: Tensor) -> float:
    """In the middle between two distances; of several that tell as many pairs right, the middle one."""
    values = d.unique()
    if not len(values):
        return 0.0
    between = (values[:-1] + values[1:]) / 2.0
    tried = torch.cat([values[:1] - 1.0, between, values[-1:] + 1.0])
    right = ((d[None] <= tried[:, None]) == same[None]).sum(1)
    best = (right == right.max()).nonzero().flatten()
    return float(tried[best[len(best) // 2]])


class Verification:
    """How well distances tell pairs of one person from pairs of two: a score over a whole set of pairs.

    Args:
        measure: ``"accuracy"``, in percent by :func:`verification_accuracy`, or ``"equal_error_rate"``: 100
            minus :func:`equal_error_rate`, because a score is better if it is higher.

    Raises:
        UnknownName: there is no such measure.

    Example:
        >>> metric = Verification("equal_error_rate")
        >>> metric.update(torch.tensor([[0.0], [0.1], [0.0], [2.0]]), torch.tensor([1, 0]))
        >>> metric.compute()
        100.0
    """

    def __init__(self, measure: str = "accuracy") -> None:
        if measure not in MEASURES:
            raise UnknownName("measure of face_pairs", measure, MEASURES)
        self.measure = measure
        self.reset()

    def reset(self) -> None:
        """Forget all pairs."""
        self._distances: list[Tensor] = []
        self._same: list[Tensor] = []

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in embeddings ``(2 pairs, width)`` and which pairs are the same, ``(pairs,)``."""
        if len(output) != 2 * len(target):
            raise ValueError(f"{len(output)} embeddings do not make {len(target)} pairs")
        self._distances.append(distances(output.detach()).cpu())
        self._same.append(target.detach().cpu())

    def compute(self) -> float:
        """The score of all pairs since the last reset."""
        d, same = torch.cat(self._distances), torch.cat(self._same)
        if self.measure == "accuracy":
            return verification_accuracy(d, same)
        return 100.0 - equal_error_rate(d, same)
