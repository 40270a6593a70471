"""FitNets: a thin, deep student first learns a hint from inside its teacher, then the teacher's outputs.

Paper: FitNets: Hints for Thin Deep Nets (Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio; ICLR
2015; arXiv 1412.6550)

Stage 1, ``hint`` (equation 3). The student up to its guided layer g, and a regressor r behind it, minimize

    1/2 * || u_h(x; W_Hint) - r(v_g(x; W_Guided); W_r) ||**2

where u_h is the teacher up to its hint layer. Nothing else of the student is trained, or even computed. r
has the hint layer's non-linearity; for maps it is a convolution without padding whose kernel k makes up for
the sizes: ``N_g - k + 1 = N_h`` in each direction.

Stage 2, ``fitnets`` (equation 2). The whole student minimizes

    H(y, P_S) + lambda * H(P_T^tau, P_S^tau)

with tau = 3, and lambda falling from 4 to 1 on a straight line, so that examples on which the teacher is
unsure count less and less.

Two stages, and not one: the paper's deep student failed to learn with the hint and the cross-entropy, or
the hint and the teacher's outputs, in one loss (section 3.1). Most libraries ship just that; here ``hint``
refuses company that adds a loss, be it a penalty on weights, and computes no output that one could be taken
from.

Faithful: both losses, the kernel rule, which parameters move, no factor tau**2 in stage 2. ``form: code``
sums the squares over the channels and averages over the positions, as the authors' code does; the equation
sums over both. Differs: the paper ends a stage when the validation error has not fallen for 100 epochs,
here its epochs are stated; the weights start as the architecture has them, not from U(-0.005, 0.005).

The surprising rule: the validation score of stage 1 is that of a student whose upper part has learned
nothing. So ``keep: best`` keeps the last epoch there.

Cost: in stage 1 the lower parts of both networks; in stage 2 the teacher's forward pass. When not to use
it: a student that trains well without help.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from pydantic import PrivateAttr, field_validator
from torch import Tensor, nn

from ...core.method import overrides
from ...core.registry import method
from ...core.run import Run
from ...core.schedule import LossWeight, Ramp, weight_at
from ...core.task import answer, evaluation
from ...core.types import Change, Positive, Term
from ...errors import InputError, LilliputWarning, NothingMatched
from ...mechanisms.adapters import Shape, build_adapter
from ...mechanisms.taps import Taps
from ...mechanisms.teacher import seen_by
from ._features import FeatureMethod
from ._responses import ResponseMethod, mean_cross_entropy
from .soft_targets import soften

# -- stage 1 ----------------------------------------------------------------------------------------


def hint_loss(hint: Tensor, guess: Tensor, form: Literal["paper", "code"]) -> Tensor:
    """``1/2 ||u_h - r(v_g)||**2``, the mean over the batch.

    Args:
        hint: the teacher's feature, ``(batch, channels, ...)``.
        guess: the regressor's output, same shape.
        form: ``"paper"`` sums over a sample; ``"code"`` sums over the channels and averages over the rest.
    """
    squares = (hint - guess).square()
    summed = squares.sum(1) if form == "code" else squares.flatten(1).sum(1)
    return 0.5 * summed.mean()


def regressor(guided: Shape, hint: Shape, activation: Literal["relu", "none"]) -> nn.Module:
    """r, from one shape to another by the paper's kernel rule.

    Example:
        >>> regressor((1, 16, 10, 10), (1, 32, 8, 8), "none")
        Conv2d(16, 32, kernel_size=(3, 3), stride=(1, 1))
    """
    whole: Any = build_adapter("fitnets", guided, hint)
    bare: nn.Module = whole[0]
    return whole if activation == "relu" else bare


class UpTo(nn.Module):
    """A network that ends at one of its places, and answers with the feature there.

    Args:
        network: shared with the caller.
        taps: on the network, at that place alone.
    """

    def __init__(self, network: nn.Module, taps: Taps) -> None:
        super().__init__()
        self.network, self.taps = network, taps

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The feature; what lies behind the place does not run."""
        self.taps.run_until_seen(kwargs or args)
        feature = self.taps[self.taps.places[0]]
        self.taps.close()
        return feature


@method
class Hint(FeatureMethod):
    """FitNets' first stage: train the student up to a guided layer to predict a hint of its teacher.

    Attributes:
        teacher: one network; see :meth:`~lilliput.core.run.Run.find_network`.
        pairs: the guided layer -> the hint layer (see :mod:`lilliput.mechanisms.taps`), one pair; a
            list where both have the same name.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        activation: non-linearity of the regressor, that of the hint layer.
        form: ``"paper"`` sums over positions, ``"code"`` averages over them.

    Example:
        >>> Hint(pairs={"relu2_3": "relu2"}, teacher="teacher").form
        'paper'
    """

    activation: Literal["relu", "none"] = "relu"
    form: Literal["paper", "code"] = "paper"

    _regressor: nn.Module = PrivateAttr()
    _lower: nn.Module = PrivateAttr()
    _lower_of: Any = PrivateAttr(None)
    _hinting: nn.Module = PrivateAttr()
    _frozen: list[nn.Parameter] = PrivateAttr(default_factory=list)

    @field_validator("pairs")
    @classmethod
    def _one(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) != 1:
            raise ValueError(f"a student has one guided layer, and {list(value)} are {len(value)}")
        return value

    @classmethod
    def example(cls) -> Hint:
        """The last place that two of the networks have learns the one before it."""
        return cls(pairs={"5": "4"}, activation="none")

    def attach(self, run: Run) -> None:
        """Find the teacher, build the regressor, and freeze what lies behind the guided layer."""
        self._refuse_company(run)
        super().attach(run)
        [(guided, hint)] = self.first_features(run)
        if self.activation == "relu" and bool((hint < 0).any()):
            warnings.warn(
                f"hint: {next(iter(self.pairs.values()))!r} of the teacher is negative at times, which a "
                "regressor with a ReLU cannot reach. Name the place behind the teacher's ReLU, or set "
                "activation: none.",
                LilliputWarning,
                stacklevel=2,
            )
        made = regressor(tuple(guided.shape), tuple(hint.shape), self.activation)
        self._regressor = run.extra(f"{run.key_of(self)}.regressor", made)
        self._hinting = UpTo(self._teacher.networks[0], self._taught[0])
        self._frozen = self._freeze(run)

    def task_weight(self, run: Run) -> float:
        """Stage 1 does not ask for the labels."""
        return 0.0

    def forward(self, run: Run) -> Tensor:
        """The student up to the guided layer."""
        if self._lower_of is not run.network:  # wrapped here, once all that is frozen is frozen
            self._lower = run.wrap(UpTo(run.model, self._own))
            self._lower_of = run.network
        feature: Tensor = answer(self._lower, run.batch.inputs)
        return feature

    def loss(self, run: Run) -> dict[str, Term]:
        """The hint loss."""
        with torch.no_grad():
            hint: Tensor = answer(self._hinting, seen_by(run.batch, self.view))
        self.require_same_width([run.output])
        guess = self._regressor(run.output.float())
        return {"hint": Term(hint_loss(hint.float(), guess, self.form))}

    def settled(self, run: Run) -> bool:
        """Never: the validation score cannot say which epoch is the best."""
        return False

    def finish(self, run: Run) -> list[Change]:
        """Let the rest of the student learn again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        return super().finish(run)

    def _refuse_company(self, run: Run) -> None:
        others = [m for m in run.methods if m is not self]
        if named := [m.method_name() for m in others if overrides(m, "loss")]:
            raise InputError(
                f"hint and {' and '.join(named)} in one stage: the paper reports that a hint together with "
                "another loss fails to train deep students (section 3.1). Put them into two stages, the hint "
                "first."
            )

    def _freeze(self, run: Run) -> list[nn.Parameter]:
        """Freeze the parameters that the guided layer does not depend on; returns them."""
        free = [p for p in run.model.parameters() if p.requires_grad]
        with evaluation(run.model), torch.enable_grad():
            feature: Tensor = answer(UpTo(run.model, self._own), self._first_batch(run).inputs)
        if not feature.requires_grad:
            raise NothingMatched(
                f"hint: no parameter in front of {next(iter(self.pairs))!r} trains: choose a later layer."
            )
        reached = torch.autograd.grad(feature.float().sum(), free, allow_unused=True)
        behind = [p for p, g in zip(free, reached, strict=True) if g is None]
        for parameter in behind:
            parameter.requires_grad_(False)
        return behind


# -- stage 2 ----------------------------------------------------------------------------------------


@method
class Fitnets(ResponseMethod):
    """FitNets' second stage: learn the labels and, less and less, the teacher's softened outputs.

    Attributes:
        teacher: ``"original"`` (the network before compression), ``"previous"``, the name of an earlier
            stage, a file, an architecture with weights, a module, or a list of these for an ensemble.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.
        temperature: tau.
        soft_weight: lambda.

    Example:
        >>> Fitnets(teacher="teacher").soft_weight
        Ramp(start=4.0, end=1.0, over=1.0)
    """

    temperature: Positive = 3.0
    soft_weight: LossWeight = Ramp(start=4.0, end=1.0)

    def loss(self, run: Run) -> dict[str, Term]:
        """``H(P_T^tau, P_S^tau)``."""
        own, taught = self.answers(run)
        target = soften(taught, self.temperature, "arithmetic")
        value = mean_cross_entropy(own / self.temperature, target)
        return {"fitnets": Term(value, weight_at(self.soft_weight, run.progress))}
