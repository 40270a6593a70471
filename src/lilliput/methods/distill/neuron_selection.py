"""Neuron selection: the student learns those neurons of its teacher that tell the labels apart.

Paper: Face Model Compression by Distilling Knowledge from Neurons (Luo, Zhu, Liu, Wang, Tang; AAAI 2016)

The top hidden layer of a teacher, or of an ensemble side by side, holds as much as its outputs and more
compactly; but some of its neurons are noise for the task, and some say the same thing. With y_i = 1 for a
neuron that is selected, the selection minimizes the energy

    E(y) = sum_i Phi(y_i) + lambda * sum_{i<j} Psi(y_i, y_j)

by mean field. Phi rewards neurons that are discriminative, Psi penalizes pairs that are correlated. Then
the student regresses the selected neurons f_sel,

    1 / (2N) * sum_x || f_sel(x) - f_s(x) ||**2

Faithful, by the paper's abstract: hidden neurons as targets, a selection that keeps discriminative neurons
and drops noisy and redundant ones, ensembles. The energy, mean field and the loss's constant are as
reported, and not confirmed against the paper's text. What Phi and Psi are exactly is not known here, and
therefore ours (the paper is reported to measure discriminativeness by face attributes):

    Phi(1) = threshold - d_i,   d_i = the share of the neuron's variance that the labels explain
    Psi(1, 1) = r_ij**2,        r_ij = the correlation of two neurons

and both are 0 where a y is 0. With classes d is the variance of the classes' means over all of it (eta
squared); with several attributes a sample, the largest squared correlation with one of them. So both are
shares of a variance, between 0 and 1. Mean field approximates ``p(y) ~ exp(-E(y) / T)`` by independent
neurons: q_i, the probability of y_i = 1, solves

    q_i = sigmoid( -(Phi_i + lambda * sum_j Psi_ij * q_j) / T )

Each neuron in turn, the most discriminative first, is set to its solution; no such step raises the free
energy. T is then halved until every neuron is decided: at one T alone, hundreds of neurons that say the
same would each be selected a little, and none of them for good. Neurons with q_i > 1/2 are selected, or the
``count`` that are nearest to it.

Two stages: the regression alone, then the task; so this method sets the task's weight to 0. Where the
student's layer has another width than the selection, a linear layer between them trains along and is then
thrown away.

Cost: a pass of the teacher over some samples and a matrix neurons x neurons before the stage (4 s of one
core for 2,048); the teacher's forward pass a step. When not to use it: teachers whose last hidden layer is
wide maps; few labelled samples, with which every neuron seems to tell classes apart.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, weight_at
from ...core.types import Change, Fraction, NonNegative, Positive, Term
from ...errors import InputError, ModelMismatch
from ...mechanisms.adapters import build_adapter
from ._features import FeatureMethod, side_by_side

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

# -- which neurons --------------------------------------------------------------------------------


def discriminativeness(neurons: Tensor, labels: Tensor) -> Tensor:
    """d_i, the share of each neuron's variance that the labels explain; 0 for a neuron that is constant.

    Args:
        neurons: activations, float64 ``(samples, neurons)``.
        labels: class numbers, int64 ``(samples,)``, or attributes, floats ``(samples, attributes)``.

    Returns:
        Shape ``(neurons,)``.

    Example:
        >>> neurons = torch.tensor([[1.0, 1.0], [1.0, 2.0], [3.0, 1.0], [3.0, 2.0]]).double()
        >>> discriminativeness(neurons, torch.tensor([0, 0, 1, 1]))
        tensor([1., 0.], dtype=torch.float64)
    """
    if labels.is_floating_point():
        return (standardized(labels.double()).t() @ standardized(neurons)).square().amax(0)
    members = F.one_hot(labels).to(neurons)
    members = members[:, members.any(0)]
    means = members.t() @ standardized(neurons) / members.sum(0)[:, None]
    return (members.sum(0)[:, None] * means.square()).sum(0)


def squared_correlations(neurons: Tensor) -> Tensor:
    """Psi_ij, the squared correlations of all pairs, ``(neurons, neurons)``; 0 on the diagonal."""
    columns = standardized(neurons)
    return (columns.t() @ columns).square().fill_diagonal_(0.0)


def standardized(columns: Tensor) -> Tensor:
    """Columns of mean 0 and sum of squares 1; zeros for a column that is constant."""
    centered = columns - columns.mean(0)
    squares = centered.square().sum(0)
    rounding = 1e-12 * columns.square().sum(0)
    return torch.where(squares > rounding, centered / squares.sqrt(), 0.0)


def mean_field(
    unary: Array,
    pairwise: Array,
    temperature: float,
    sweeps: int = 300,
    start: Array | None = None,
    tolerance: float = 1e-8,
) -> Array:
    """q_i, how probable it is that y_i = 1 where all others are as probable as they are.

    Args:
        unary: Phi(1), shape ``(neurons,)``.
        pairwise: lambda * Psi(1, 1), symmetric, 0 on the diagonal.
        temperature: T.
        sweeps: at most so many passes over the neurons; fewer where nothing moves any more.
        start: q to begin with; by default nothing is selected.
        tolerance: what counts as moving.

    Example:
        >>> twins = np.array([[0.0, 5.0], [5.0, 0.0]])
        >>> mean_field(np.array([-0.9, -0.8]), twins, 0.05).round(3).tolist()
        [1.0, 0.0]
    """
    probable = np.zeros(len(unary)) if start is None else start.copy()
    order = np.argsort(unary, kind="stable").tolist()
    for _ in range(sweeps):
        before = probable.copy()
        for i in order:
            field = unary[i] + pairwise[i] @ probable
            probable[i] = 0.5 * (1.0 - math.tanh(0.5 * field / temperature))
        if np.abs(probable - before).max() < tolerance:
            break
    return probable


def decided(unary: Array, pairwise: Array, temperature: float) -> Array:
    """q_i of :func:`mean_field`, cooled until every neuron is in or out; same arguments."""
    probable = None
    while True:
        probable = mean_field(unary, pairwise, temperature, start=probable, tolerance=1e-3)
        if np.minimum(probable, 1 - probable).max() < 0.01 or temperature < 1e-6:
            return probable
        temperature /= 2


def select_neurons(
    unary: Array, pairwise: Array, temperature: float, count: int | None = None
) -> list[int]:
    """The neurons of low energy, in ascending order; the arguments are those of :func:`mean_field`.

    Args:
        unary: see there.
        pairwise: see there.
        temperature: where the cooling begins.
        count: how many; by default those that are more probable selected than not.
    """
    fields = unary + pairwise @ decided(unary, pairwise, temperature)
    if count is None:
        return [int(i) for i in np.flatnonzero(fields < 0)]
    return sorted(int(i) for i in np.argsort(fields, kind="stable")[:count])


# -- what is learned from them --------------------------------------------------------------------


def regression_loss(own: Tensor, selected: Tensor) -> Tensor:
    """``1 / (2N) * sum || f_sel - f_s ||**2``; both are ``(batch, neurons)``."""
    return 0.5 * (selected - own).square().sum(1).mean()


@method
class NeuronSelection(FeatureMethod):
    """Regress the teacher's neurons that tell the labels apart and do not repeat each other.

    Attributes:
        teacher: one network or a list of them, whose neurons then stand side by side; see
            :meth:`~lilliput.core.run.Run.find_network`.
        pairs: place in the student -> place in the teacher, its top hidden layer (see
            :mod:`lilliput.mechanisms.taps`); one pair.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        redundancy: lambda, how much correlated neurons repel each other.
        threshold: the share of its variance that the labels must explain for a neuron to be worth it.
        temperature: T at which the mean field begins.
        count: how many neurons; by default as many as the energy wants.
        samples: labelled training samples on which neurons are judged.
        weight: of the regression, a number or ``{start: 1, end: 0}``.
        hard_weight: of the task's own loss; the paper has 0.

    Example:
        >>> NeuronSelection(pairs={"fc1": "fc7"}, teacher="teacher", count=64).threshold
        0.1
    """

    ensembles: ClassVar[bool] = True

    redundancy: NonNegative = 0.1
    threshold: Fraction = 0.1
    temperature: Positive = 0.05
    count: Annotated[int, Field(ge=1)] | None = None
    samples: Annotated[int, Field(ge=2)] = 2000
    weight: LossWeight = 1.0
    hard_weight: LossWeight = 0.0

    _adapter: nn.Module = PrivateAttr()
    _selected: Tensor = PrivateAttr()
    _neurons: int = PrivateAttr()

    @field_validator("pairs")
    @classmethod
    def _one(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) != 1:
            raise ValueError(f"one layer learns from one layer, and {list(value)} are {len(value)}")
        return value

    @classmethod
    def example(cls) -> NeuronSelection:
        """What a transformer's head reads."""
        return cls(pairs=["head:input"], count=5)

    def attach(self, run: Run) -> None:
        """Find the teacher, select its neurons, and build an adapter where widths differ."""
        super().attach(run)
        neurons, labels = self._judged(run)
        self._neurons = neurons.shape[1]
        chosen = self._select(neurons, labels)
        self._selected = torch.tensor(chosen, device=run.device)
        self.memory(run)["selected"] = chosen
        [(own, _)] = self.first_features(run)
        adapter = build_adapter("auto", tuple(own.flatten(1).shape), (1, len(chosen)))
        self._adapter = run.extra(f"{run.key_of(self)}.adapter", adapter)

    def task_weight(self, run: Run) -> float:
        """The weight of the task's own loss."""
        return weight_at(self.hard_weight, run.progress)

    def loss(self, run: Run) -> dict[str, Term]:
        """The regression of the selected neurons."""
        [(own, taught)] = self.features(run)
        selected = taught.flatten(1)[:, self._selected]
        value = regression_loss(self._adapter(own.flatten(1)), selected)
        return {"neuron_selection": Term(value, weight_at(self.weight, run.progress))}

    def finish(self, run: Run) -> list[Change]:
        """Say how many neurons were learned from; the teacher must be what it was."""
        told = next(iter(self.pairs.values()))
        note = "of the teacher, as targets"
        learned = Change(
            told, "neurons", self._neurons, len(self._selected), self.method_name(), note
        )
        return [*super().finish(run), learned]

    def _select(self, neurons: Tensor, labels: Tensor) -> list[int]:
        unary = self.threshold - discriminativeness(neurons, labels).numpy()
        pairwise = self.redundancy * squared_correlations(neurons).numpy()
        if self.count is not None and self.count > len(unary):
            raise InputError(
                f"neuron_selection: count={self.count}, and the teacher's layer has {len(unary)} neurons."
            )
        chosen = select_neurons(unary, pairwise, self.temperature, self.count)
        if not chosen:
            best = self.threshold - unary.min()
            raise InputError(
                f"neuron_selection: no neuron is worth its energy: the labels explain at most {best:.3f} of "
                f"one's variance, and threshold is {self.threshold}. Lower it, choose another layer, or give "
                "count."
            )
        return chosen

    @torch.no_grad()
    def _judged(self, run: Run) -> tuple[Tensor, Tensor]:
        """The teacher's neurons for some training samples, float64 ``(samples, neurons)``, and labels."""
        [told] = self.pairs.values()
        neurons, labels = [], []
        for batch in run.calibration(self.samples):
            for taps in self._taught:
                taps.open()
            self._teacher.outputs(batch)
            feature = side_by_side([taps[told] for taps in self._taught])
            neurons.append(feature.flatten(1).double().cpu())
            labels.append(_labels(batch.target, len(feature)))
        return torch.cat(neurons), torch.cat(labels)


def _labels(target: Any, samples: int) -> Tensor:
    """Class numbers ``(samples,)``, or attributes as floats ``(samples, attributes)``.

    Raises:
        ModelMismatch: the target is neither.
    """
    shape = tuple(target.shape) if isinstance(target, Tensor) else None
    if shape is None or len(shape) not in (1, 2) or shape[0] != samples:
        raise ModelMismatch(
            "neuron_selection judges neurons by labels, class numbers (batch,) or attributes (batch, "
            f"attributes), and the target is {type(target).__name__ if shape is None else shape}. In a "
            "training loop of your own give attach(..., task=...)."
        )
    labels: Tensor = target.cpu()
    if labels.is_floating_point() or labels.ndim == 2 or labels.dtype == torch.bool:
        return labels.double().reshape(samples, -1)
    if bool((labels < 0).any()):
        raise ModelMismatch("neuron_selection judges neurons by labels, and some are below 0.")
    return labels.long()
