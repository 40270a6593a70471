"""Specialists: many small experts for confusable classes beside one generalist.

Paper: Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean; NIPS Deep Learning
Workshop 2014; arXiv 1503.02531)

Section 5, for tasks with too many classes for an ensemble of whole networks:

1. :func:`confusable_classes`: cluster the columns of the covariance matrix of the generalist's predictions;
   classes that are predicted together fall into one set S_m.
2. :func:`specialist_of`: specialist m starts with the generalist's weights; its softmax has the classes of
   S_m and one *dustbin* for all others.
3. :func:`specialist_task`: half of its training examples come from S_m, half at random from the rest.
4. :func:`log_oversampling` is what that adds to the odds of S_m, and goes back on top of the dustbin's logit.
5. :func:`combine`: for a sample, A are the specialists whose S_m holds one of the generalist's n best
   classes. Its probabilities are equation 5, ``q = argmin KL(p_g, q) + sum_A KL(p_m, q)``, where a
   specialist compares its dustbin with the sum of q over the classes outside S_m. :class:`Specialists`
   does that.

Faithful: all of it but these. The paper clusters by an on-line k-means, here it is Lloyd's, from several
starts. The paper finds q for each sample by gradient descent on logits; the problem is convex in q, and
here Newton's method solves its dual, which has one unknown a specialist, for a whole batch at once, until
the duality gap proves that the minimum is reached. What the dustbin's weights start from is not in the
paper: here the mean of the rows that it replaces, plus the logarithm of their number, which is the
logarithm of their summed exponentials to first order.

Cost: a network per set, of which a sample meets those that it calls, and some matrix products for q. When
not to use it: a network that must be small; with few classes, a plain ensemble is as cheap.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import ClusterError, kmeans2
from torch import Tensor, nn

from ...core.digests import mix
from ...core.task import Task, read
from ...core.types import Batch
from ...errors import EmptyData, InputError, ModelMismatch, RunError
from ...mechanisms.taps import find_module

#: What all say of the classes together, at least, shared out among these.
_LEAST = 1e-7
#: Of a step of Newton's method, at most.
_HALVINGS = 40


def confusable_classes(
    probabilities: Tensor, sets: int, *, seed: int = 0, starts: int = 20
) -> list[list[int]]:
    """Sets of classes that the generalist predicts together.

    Args:
        probabilities: its predictions for many samples, shape ``(samples, classes)``. Softened ones show
            more of what it confuses.
        sets: how many; each class is in one of them.
        seed: of the k-means' first centers.
        starts: of which the one with the smallest sum of squares is taken.

    Returns:
        The classes of each set, in rising order.

    Raises:
        InputError: there are fewer classes than sets, or too few different columns.

    Example:
        >>> pairs = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.6, 0.0, 0.4], [0.4, 0.1, 0.5, 0.0]])
        >>> confusable_classes(pairs, 2)
        [[0, 2], [1, 3]]
    """
    classes = probabilities.shape[1]
    if not 0 < sets <= classes:
        raise InputError(f"sets={sets}: give 1 to {classes}, the number of classes.")
    columns = torch.cov(probabilities.detach().double().cpu().T).reshape(classes, classes).numpy()
    found = [_cluster(columns, sets, mix(seed, start)) for start in range(starts)]
    found = [labels for labels in found if labels is not None]
    if not found:
        raise InputError(
            f"the predictions of {classes} classes vary in fewer than {sets} ways: ask for fewer sets."
        )
    labels = min(found, key=lambda labels: _scatter(columns, labels))
    return sorted(np.flatnonzero(labels == m).tolist() for m in range(sets))


def enriched(labels: Tensor, classes: Sequence[int], generator: torch.Generator) -> Tensor:
    """Sample numbers of one epoch of a specialist, half of them of its classes, in random order.

    Args:
        labels: int64 ``(samples,)``.
        classes: its classes. All their samples are there, and as many of the rest, drawn without repetition
            as far as the rest reaches.
        generator: of the draws.

    Raises:
        EmptyData: no sample belongs to the classes, or none to the rest.
    """
    own, rest = (part.nonzero().flatten() for part in _apart(labels, classes))
    _require_both(len(own), len(rest), classes)
    rounds = math.ceil(len(own) / len(rest))
    drawn = torch.cat([torch.randperm(len(rest), generator=generator) for _ in range(rounds)])
    numbers = torch.cat([own, rest[drawn[: len(own)]]])
    return numbers[torch.randperm(len(numbers), generator=generator)]


def log_oversampling(labels: Tensor, classes: Sequence[int]) -> float:
    """Logarithm of how much oftener the classes occur in :func:`enriched` data, against the rest.

    Of a share f of the samples half of the examples are made, so it is ``log((1 - f) / f)``. Added to the
    logit of the dustbin it brings a specialist's odds back to those of the whole data.

    Raises:
        EmptyData: no sample belongs to the classes, or none to the rest.
    """
    own, rest = (int(part.sum()) for part in _apart(labels, classes))
    _require_both(own, rest, classes)
    return math.log(rest / own)


def specialist_targets(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """The place of each label in ``classes``; the dustbin's, ``len(classes)``, for all others."""
    targets = torch.full_like(labels, len(classes))
    for place, label in enumerate(classes):
        targets[labels == label] = place
    return targets


def specialist_task(task: Task, classes: Sequence[int]) -> Task:
    """What a specialist trains on: half of the examples of its classes, all others in the dustbin.

    Validation and test batches keep the frequencies of the task, and their targets are the specialist's too.

    Args:
        task: a classification task whose inputs are tensors. Its training data are read once and kept.
        classes: of the specialist.

    Raises:
        InputError: the training data are augmented at random, which this cannot keep up.

    Example:
        >>> inputs, labels = torch.randn(40, 2), torch.arange(40) % 4
        >>> batches = [(inputs, labels)]
        >>> task = Task(batches, batches, None, nn.functional.cross_entropy, lambda z, y: z[:, 0])
        >>> next(iter(specialist_task(task, [1]).train)).target.bincount()
        tensor([10, 10])
    """
    if getattr(task.train, "augmented", False):
        raise InputError(
            "specialist_task: the training data are augmented at random, and would be kept as they are in "
            "one epoch. Switch the augmentation off."
        )
    parts = [(b.inputs, b.target) for b in read(task.train, "the training batches")]
    inputs, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    size = len(parts[0][1])
    test = None if task.test is None else _Relabeled(task.test, classes)
    return replace(
        task,
        train=_Enriched(inputs, labels, classes, size),
        validation=_Relabeled(task.validation, classes),
        test=test,
        name=f"{task.name}, specialist for {list(classes)}",
    )


def specialist_of(generalist: nn.Module, classes: Sequence[int], layer: str) -> nn.Module:
    """A copy of the generalist whose last layer answers for some classes and a dustbin.

    Args:
        generalist: stays as it is.
        classes: of the specialist, in the order of its outputs; the dustbin comes last.
        layer: name of the last layer, a linear one.

    Raises:
        ModelMismatch: that layer is not linear.
        InputError: the classes are not some of its outputs.
    """
    old = find_module(generalist, layer)
    if not isinstance(old, nn.Linear) or not layer:
        raise ModelMismatch(f"specialist_of: {layer!r} is not a linear layer inside the network.")
    _check_set(classes, old.out_features)
    rest = [c for c in range(old.out_features) if c not in classes]
    new = nn.Linear(old.in_features, len(classes) + 1, device=old.weight.device)
    with torch.no_grad():
        new.weight.copy_(_rows(old.weight, classes, rest))
        bias = old.weight.new_zeros(old.out_features) if old.bias is None else old.bias
        new.bias.copy_(_rows(bias, classes, rest))
        new.bias[-1] += math.log(len(rest))
    student = copy.deepcopy(generalist)
    parent, _, name = layer.rpartition(".")
    setattr(student.get_submodule(parent), name, new)
    return student


def combine(
    generalist: Tensor,
    specialists: Sequence[Tensor],
    sets: Sequence[Sequence[int]],
    active: Tensor | None = None,
    *,
    gap: float = 1e-5,
    steps: int = 200,
) -> Tensor:
    """The q of equation 5 for each sample.

    With ``a_c`` what generalist and active specialists say of class c together, d_m a dustbin's probability,
    and t the sum of them all, q minimizes ``-sum_c a_c log q_c - sum_m d_m log s_m``, where s_m is the sum of
    q outside S_m. At the minimum ``q_c = a_c / (t - sum_m [c outside S_m] v_m)``, where ``v_m = d_m / s_m``
    maximizes the dual, ``sum_c a_c log(t - sum_m [c outside S_m] v_m) + sum_m d_m log v_m``.

    Args:
        generalist: probabilities, shape ``(samples, classes)``.
        specialists: of each its probabilities, shape ``(samples, len(set) + 1)``, the dustbin last.
        sets: the classes of each specialist, in the order of its outputs.
        active: bool ``(samples, specialists)``; by default all.
        gap: largest distance to the minimum of equation 5, in nats.
        steps: of Newton's method, at most.

    Returns:
        Shape ``(samples, classes)``; each row sums to 1.

    Raises:
        RunError: the gap is not reached.
        InputError: sets and probabilities do not fit.
    """
    samples, classes = generalist.shape
    _check_specialists(specialists, sets, samples, classes)
    if active is None:
        active = torch.ones(samples, len(sets), dtype=torch.bool, device=generalist.device)
    # In double precision, for the gap is a difference of nearly equal numbers.
    said, outside = generalist.double().clone(), generalist.new_ones(len(sets), classes).double()
    dustbins = active.double()
    for m, (probabilities, members) in enumerate(zip(specialists, sets, strict=True)):
        said[:, list(members)] += active[:, m : m + 1] * probabilities[:, :-1].double()
        outside[m, list(members)] = 0.0
        dustbins[:, m] *= probabilities[:, -1].double()
    return _solve(said, dustbins, outside, gap, steps).to(generalist.dtype)


class Specialists(nn.Module):
    """A generalist and its specialists as one classifier.

    Args:
        generalist: a classifier; its outputs are logits.
        specialists: their outputs are the logits of their set and of the dustbin.
        sets: the classes of each specialist.
        oversampling: of each :func:`log_oversampling`; None where they trained on data as they are.
        best: n, how many of the generalist's best classes call specialists.
    """

    dustbin: Tensor

    def __init__(
        self,
        generalist: nn.Module,
        specialists: Sequence[nn.Module],
        sets: Sequence[Sequence[int]],
        oversampling: Sequence[float] | None = None,
        best: int = 1,
    ) -> None:
        super().__init__()
        corrections = [0.0] * len(sets) if oversampling is None else list(oversampling)
        if not 0 < len(specialists) == len(sets) == len(corrections):
            raise InputError(
                f"{len(specialists)} specialists, {len(sets)} sets and {len(corrections)} corrections: "
                "give one of each for every specialist."
            )
        self.generalist, self.specialists = generalist, nn.ModuleList(specialists)
        self.sets, self.best = [list(s) for s in sets], best
        self.register_buffer("dustbin", torch.tensor(corrections))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logarithms of the probabilities of all classes; a specialist runs on the samples that call it."""
        general = self.generalist(inputs).softmax(dim=-1)
        active = self.called(general)
        said = [self._ask(m, inputs, active[:, m], general) for m in range(len(self.specialists))]
        q = combine(general, said, self.sets, active)
        return q.clamp(min=torch.finfo(q.dtype).tiny).log()

    def called(self, general: Tensor) -> Tensor:
        """Which specialists a sample calls, bool ``(samples, specialists)``."""
        top = general.topk(self.best, dim=-1).indices
        chosen = torch.zeros_like(general, dtype=torch.bool).scatter_(1, top, True)
        return torch.stack([chosen[:, members].any(dim=1) for members in self.sets], dim=1)

    def _ask(self, m: int, inputs: Tensor, rows: Tensor, general: Tensor) -> Tensor:
        """Probabilities of one specialist; zeros for samples that do not call it."""
        found = general.new_zeros(len(general), len(self.sets[m]) + 1)
        if rows.any():
            logits = self.specialists[m](inputs[rows]).clone()
            logits[:, -1] += self.dustbin[m]
            found[rows] = logits.softmax(dim=-1)
        return found


class _Enriched:
    """Batches of :func:`enriched` epochs."""

    def __init__(
        self, inputs: Tensor, labels: Tensor, classes: Sequence[int], batch_size: int
    ) -> None:
        self.inputs, self.labels, self.classes = inputs, labels, list(classes)
        self.batch_size, self._seed = batch_size, 0
        self._epoch = len(enriched(labels, classes, torch.Generator()))

    def __len__(self) -> int:
        return -(-self._epoch // self.batch_size)

    def reshuffle(self, seed: int) -> None:
        """Set the draws of the epochs that follow."""
        self._seed = seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed)
        targets = specialist_targets(self.labels, self.classes)
        for index in enriched(self.labels, self.classes, generator).split(self.batch_size):
            yield Batch(self.inputs[index], targets[index], index)


class _Relabeled:
    """Another task's batches with a specialist's targets."""

    def __init__(self, batches: Any, classes: Sequence[int]) -> None:
        self.batches, self.classes = batches, list(classes)

    def __iter__(self) -> Iterator[Batch]:
        for batch in read(self.batches, "the batches"):
            yield replace(batch, target=specialist_targets(batch.target, self.classes))


def _solve(said: Tensor, dustbins: Tensor, outside: Tensor, gap: float, steps: int) -> Tensor:
    """See :func:`combine`; all in double precision."""
    # Nobody rules a class out: a dustbin needs somewhere to put its probability.
    said = said.clamp(min=_LEAST / said.shape[1])
    total = (said.sum(dim=1) + dustbins.sum(dim=1)).unsqueeze(1)
    v = dustbins.clone()  # their sum is below the total, so all logarithms exist
    for _ in range(steps):
        q = said / (total - v @ outside)
        q = q / q.sum(dim=1, keepdim=True)
        slope = said / q + (dustbins / (q @ outside.T)) @ outside
        # The problem is convex: by so much its value can fall at most.
        if bool((slope.amax(dim=1, keepdim=True) - total <= gap).all()):
            return q
        v = _newton_step(said, dustbins, outside, total, v)
    raise RunError(
        f"combine: {steps} steps did not bring the probabilities within {gap} nats of the minimum. Allow "
        "more steps, or a larger gap."
    )


def _newton_step(
    said: Tensor, dustbins: Tensor, outside: Tensor, total: Tensor, v: Tensor
) -> Tensor:
    """One step up the dual; what no dustbin weighs stays 0."""
    weighs = dustbins > 0.0
    left = total - v @ outside
    ratio = torch.where(weighs, dustbins / v, 0.0)
    gradient = torch.where(weighs, ratio - (said / left) @ outside.T, 0.0)
    curvature = torch.einsum("nc,mc,kc->nmk", said / left.square(), outside, outside)
    curvature = curvature * (weighs.unsqueeze(1) & weighs.unsqueeze(2))
    own = torch.where(weighs, ratio / v, 1.0)
    step: Tensor = torch.linalg.solve(curvature + torch.diag_embed(own), gradient)
    length = _feasible(left, step @ outside, v, step)
    before = _dual(said, dustbins, outside, total, v)
    rise = 1e-4 * (gradient * step).sum(dim=1, keepdim=True)
    for _ in range(_HALVINGS):
        after = _dual(said, dustbins, outside, total, v + length * step)
        short = after < before + length * rise - 1e-13 * before.abs()
        if not short.any():
            break
        length = torch.where(short, length / 2, length)
    return v + length * step


def _feasible(left: Tensor, falls: Tensor, v: Tensor, step: Tensor) -> Tensor:
    """The longest step, up to 1, that keeps every logarithm's argument above 0; ``(samples, 1)``."""
    never = torch.full_like(left[:, :1], math.inf)
    to_class = torch.where(falls > 0.0, left / falls, math.inf)
    to_specialist = torch.where(step < 0.0, -v / step, math.inf)
    nearest = torch.cat([to_class, to_specialist, never], dim=1).amin(dim=1, keepdim=True)
    length: Tensor = (0.99 * nearest).clamp(max=1.0)
    return length


def _dual(said: Tensor, dustbins: Tensor, outside: Tensor, total: Tensor, v: Tensor) -> Tensor:
    """What is maximized, ``(samples, 1)``."""
    classes: Tensor = torch.special.xlogy(said, total - v @ outside).sum(dim=1, keepdim=True)
    weighs: Tensor = torch.special.xlogy(dustbins, v).sum(dim=1, keepdim=True)
    return classes + weighs


def _cluster(columns: Any, sets: int, seed: int) -> Any:
    """The set of each column; None where a set stays empty."""
    if len(np.unique(columns, axis=0)) < sets:
        return None
    try:
        return kmeans2(columns, sets, minit="++", iter=100, seed=seed % 2**32, missing="raise")[1]
    except ClusterError:
        return None


def _scatter(columns: Any, labels: Any) -> float:
    """Sum of squared distances to the centers."""
    parts = [columns[labels == m] for m in np.unique(labels)]
    return float(sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts))


def _apart(labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which labels are of the classes, and which are not."""
    own = torch.isin(labels, torch.tensor(list(classes), device=labels.device))
    return own, ~own


def _require_both(own: int, rest: int, classes: Sequence[int]) -> None:
    if not own or not rest:
        raise EmptyData(
            f"of {own + rest} samples {own} belong to the classes {list(classes)} and {rest} do not: a "
            "specialist needs both."
        )


def _rows(weight: Tensor, classes: Sequence[int], rest: Sequence[int]) -> Tensor:
    """The rows of the classes, then the mean of the others."""
    return torch.cat([weight[list(classes)], weight[list(rest)].mean(dim=0, keepdim=True)])


def _check_set(classes: Sequence[int], outputs: int) -> None:
    if not 0 < len(set(classes)) == len(classes) < outputs or not set(classes) < set(
        range(outputs)
    ):
        raise InputError(
            f"the set {list(classes)}: give some of the classes 0 to {outputs - 1}, each once, and not all."
        )


def _check_specialists(
    specialists: Sequence[Tensor], sets: Sequence[Sequence[int]], samples: int, classes: int
) -> None:
    if len(specialists) != len(sets):
        raise InputError(f"{len(specialists)} specialists for {len(sets)} sets of classes.")
    for probabilities, members in zip(specialists, sets, strict=True):
        _check_set(members, classes)
        if probabilities.shape != (samples, len(members) + 1):
            raise InputError(
                f"a specialist for {list(members)} gave probabilities of shape "
                f"{tuple(probabilities.shape)} instead of {(samples, len(members) + 1)}: its classes "
                "and the dustbin."
            )
