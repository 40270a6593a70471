"""Adversarial distillation: a discriminator learns what the student's outputs lack beside the teacher's.

Paper: Training Shallow and Thin Networks for Acceleration via Knowledge Distillation with Conditional
Adversarial Networks (Xu, Hsu, Huang; ICLR Workshop 2018; arXiv 1709.00513)

The loss between student and teacher is not written down but learned. The student F is the generator: from
the image x_i, with dropout as its noise, it makes logits F(x_i). A discriminator D sees logits and says two
things: whether they are the teacher's t_i (real) or the student's (fake), and, as an auxiliary classifier,
of which class l_i they are. That condition on the class keeps the student from logits that look like the
teacher's for some other image. With means over the batch::

    L_A  = log P(real | D(t_i)) + log P(fake | D(F(x_i)))
    L_DS = log P(l_i | D(t_i)) + log P(l_i | D(F(x_i)))
    D maximizes   L_A + L_DS
    F minimizes   L_A - L_DS + H(l_i, softmax(F(x_i))) + ||F(x_i) - t_i||_1

The last two terms are the labels and the knowledge about the single image.

Confirmed, from the abstract and from others' notes: the loss is learned by a conditional adversarial network
on the logits of student and teacher. From memory and not confirmed, for the text was not at hand: the
auxiliary classifier, that D maximizes L_DS for both networks and the student for its own logits, the
1-norm, dropout as noise, all weights 1, and a D of three linear layers. Chosen here: D's width, one update of
D for each of the student, on the logits that the student gave before its step, and ``objective``:
``"minimax"`` is the formula above, ``"non_saturating"`` lets the student maximize log P(real | D(F(x_i)))
instead, which pulls harder while D is far ahead. An ensemble teaches with the mean of its members' logits.

The surprising rule: D only sees logits. A student whose output has the wrong scale is told apart at once and
learns the scale first; where ``adversary/accuracy`` of the log stays at 1, D has won and its gradient
says little.

Cost: the teacher's forward pass a step, nothing when its outputs are cached; D is tiny. When not to use it:
``soft_targets`` is as good where the student is large enough, and has one number to set.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.method import Method
from ...core.registry import method
from ...core.run import Player, Run
from ...core.schedule import LossWeight, weight_at
from ...core.types import Change, Fraction, Positive, Term
from ...errors import LilliputWarning
from ...mechanisms.taps import find_module
from ._players import class_labels, frozen, output_width
from ._responses import ResponseMethod

Objective = Literal["minimax", "non_saturating"]


class LogitCritic(nn.Module):
    """The discriminator: three linear layers with ReLU between them, on logits.

    Args:
        classes: of the logits.
        width: units of the hidden layers.

    Example:
        >>> real, classes = LogitCritic(10, 32)(torch.zeros(5, 10))
        >>> real.shape, classes.shape
        (torch.Size([5]), torch.Size([5, 10]))
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(classes, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 1 + classes),
        )

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The log-odds that the logits are real, ``(samples,)``, and logits of their class."""
        out = self.layers(logits)
        return out[:, 0], out[:, 1:]


def critic_loss(real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """``-(L_A + L_DS)``, what D minimizes.

    Args:
        real: what D says of the teacher's logits.
        fake: what D says of the student's.
        labels: int64 ``(samples,)``.
    """
    told_apart = F.softplus(-real[0]).mean() + F.softplus(fake[0]).mean()
    classes = F.cross_entropy(real[1], labels) + F.cross_entropy(fake[1], labels)
    return told_apart + classes


def deceiving_loss(fake: Tensor, objective: Objective) -> Tensor:
    """The student's part of L_A.

    Args:
        fake: log-odds that the student's logits are real, as D says.
        objective: ``"minimax"`` is ``log P(fake)``; ``"non_saturating"`` is ``-log P(real)``.
    """
    return F.softplus(-fake).mean() if objective == "non_saturating" else -F.softplus(fake).mean()


def instance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``||F(x_i) - t_i||_1``, the sum over the classes and the mean over the samples."""
    return (student - teacher).abs().sum(dim=-1).mean()


@method
class Adversarial(ResponseMethod):
    """Learn from a discriminator that tells the student's logits from the teacher's.

    Attributes:
        teacher: ``"original"`` (the network before compression), ``"previous"``, the name of an earlier
            stage, a file, an architecture with weights, a module, or a list of these for an ensemble.
        view: which view of the samples the teacher looks at; None for the student's inputs.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.
        cache: keep the teacher's outputs for all training samples in a file; ``True`` puts it into
            the run directory.
        adversarial_weight: of L_A, a number or ``{start: 0, end: 1}``.
        class_weight: of L_DS in the student's loss, likewise.
        instance_weight: of the 1-norm, likewise.
        hard_weight: of the task's own loss, likewise.
        objective: how the student deceives, see the module's docstring.
        width: units of the discriminator's hidden layers.
        discriminator_lr: its learning rate, as a multiple of the stage's.
        noise: modules of the student whose output gets dropout while this stage trains -> probability;
            a network with dropout of its own needs none.

    Example:
        >>> Adversarial(teacher="original", noise={"fc1": 0.3}).objective
        'minimax'
    """

    adversarial_weight: LossWeight = 1.0
    class_weight: LossWeight = 1.0
    instance_weight: LossWeight = 1.0
    hard_weight: LossWeight = 1.0
    objective: Objective = "minimax"
    width: int = 64
    discriminator_lr: Positive = 1.0
    noise: dict[str, Fraction] = {}  # noqa: RUF012 (pydantic copies it)

    _critic: Player = PrivateAttr()
    _noise: list[Any] = PrivateAttr(default_factory=list)
    _seen: tuple[Tensor, Tensor, Tensor] = PrivateAttr()

    @classmethod
    def example(cls) -> Method:
        """A small discriminator that keeps up with a tiny network."""
        return cls(width=16)

    def check(self, model: nn.Module) -> None:
        """The places of the noise must be in the student."""
        for name in self.noise:
            find_module(model, name)

    def attach(self, run: Run) -> None:
        """Find the teacher, bring the discriminator in, and put noise into the student."""
        super().attach(run)
        critic = LogitCritic(self._classes(run), self.width)
        self._critic = run.player(f"{run.key_of(self)}.discriminator", critic)
        self._critic.lr *= self.discriminator_lr
        self._noise = [
            find_module(run.model, name).register_forward_hook(_Dropout(p))
            for name, p in self.noise.items()
        ]
        self._warn_without_noise(run.model)

    def task_weight(self, run: Run) -> float:
        """The weight of the labels."""
        return weight_at(self.hard_weight, run.progress)

    def loss(self, run: Run) -> dict[str, Term]:
        """The student's side of the game, and the distance to the teacher's logits."""
        own, taught = self.answers(run)
        own, teacher = own.flatten(0, -2), taught.mean(dim=0).flatten(0, -2)
        labels = class_labels(run, len(own), "adversarial")
        self._seen = (own.detach(), teacher, labels)
        with frozen(self._critic.network) as critic:
            fake, classes = critic(own)
        terms = {
            "adversarial": (deceiving_loss(fake, self.objective), self.adversarial_weight),
            "class": (F.cross_entropy(classes, labels), self.class_weight),
            "instance": (instance_loss(own, teacher), self.instance_weight),
        }
        return {n: Term(v, weight_at(weight, run.progress)) for n, (v, weight) in terms.items()}

    def after_step(self, run: Run) -> None:
        """The discriminator's side, on the same logits."""
        own, teacher, labels = self._seen
        # One forward pass for both halves.
        told, classes = self._critic.network(torch.cat([teacher, own]))
        half = len(own)
        loss = critic_loss((told[:half], classes[:half]), (told[half:], classes[half:]), labels)
        self._critic.descend(loss)
        run.log("adversary/loss", loss)
        run.log(
            "adversary/accuracy", ((told[:half] > 0).sum() + (told[half:] < 0).sum()) / len(told)
        )

    def finish(self, run: Run) -> list[Change]:
        """The noise goes; the teacher must be what it was."""
        for handle in self._noise:
            handle.remove()
        return super().finish(run)

    def _classes(self, run: Run) -> int:
        """How many classes the student tells apart."""
        return output_width(run, self.class_dim)

    def _warn_without_noise(self, model: nn.Module) -> None:
        if any(self.noise.values()) or any(_draws(module) for module in model.modules()):
            return
        warnings.warn(
            "adversarial: the student has no dropout, so this generator has no noise. Name places for it, "
            "such as noise: {fc1: 0.3}.",
            LilliputWarning,
            stacklevel=2,
        )


def _draws(module: nn.Module) -> bool:
    """Whether a module has dropout."""
    rate = getattr(module, "dropout", 0.0)  # of attention and recurrent layers
    if isinstance(module, nn.modules.dropout._DropoutNd):
        rate = module.p
    return isinstance(rate, float) and rate > 0.0


class _Dropout:
    """A hook that drops outputs while its module trains; a copy of the module gets one that does nothing."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return F.dropout(output, self.probability) if module.training else None

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _idle, ()


def _nothing(*anything: Any) -> None:
    """The hook of a copied module."""


def _idle() -> Any:
    """What a pickled hook becomes."""
    return _nothing
