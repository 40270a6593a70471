"""KDGAN: a game of three, in which student and teacher learn from each other and from a discriminator.

Paper: KDGAN: Knowledge Distillation with Generative Adversarial Networks (Wang, Zhang, Sun, Qi; NeurIPS
2018)

The players are the classifier c (the student), the teacher t and the discriminator d. A classifier gives
p_c(y|x), a teacher p_t(y|x); both propose labels for x. The discriminator tells the data's labels from
proposed ones, p_d(x, y) = sigma(h(x, y)). They play::

    min over c, t, max over d of
        E_{y from the data} log p_d(x, y)
        + alpha * E_{y from p_c} log(1 - p_d(x, y)) + (1 - alpha) * E_{y from p_t} log(1 - p_d(x, y))
        + beta * L_c(p_c, p_t) + gamma * L_t(p_t, p_c)

where L_c and L_t are distillation losses, each with the other player's output as a constant. A drawn label
has no gradient, so it is relaxed: y follows a *concrete* distribution, with Gumbel noise g and temperature
tau, ``y_k = softmax_k((log p_k + g_k) / tau)``, whose gradient with respect to p has little variance. The
players move in turn, each against the others' newest outputs: d, then t, then c.

Confirmed, from the abstract and the authors' code: three players, both distillation losses, both adversarial
losses, the concrete distribution, the weights (alpha and 1 - alpha for the discriminator's terms, and for
the classifier's and the teacher's own), players that are trained beforehand, h as a network that sees x and
gives a number for each class, tau falling by a constant factor from 10 to 0.1, and the distance of logits
(``distance="logits"``, half the squared distance). The defaults of alpha, beta and gamma are those of the
authors' script for 10,000 images of MNIST.

From memory and not confirmed: the formula as it stands here, and that the teacher's labels are relaxed too.
The authors' code relaxes the classifier's only, draws labels from them, and fits the logit of a drawn label
to p_d, which is not the gradient of the formula. Chosen here: ``h(x, y) = sum_k y_k h_k(x)`` for a relaxed
label, ``distance="kl"`` as the default, and turns within a mini-batch, where the authors' code gives each
player whole epochs (20 to d, 10 to t, 10 to c).

The surprising rule: the formula shows c and t the labels only through d. All three are meant to be trained
already: give the stage a trained student and a trained teacher, or set ``hard_weight``, with which c and t
also minimize the cross-entropy, as the authors' code lets them.

Cost: teacher and discriminator are trained beside the student, forward and backward, and the student and the
discriminator run forward once more. When not to use it: where labels are plenty; the paper gains most from
few of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from ...core.digests import mix
from ...core.method import Method
from ...core.registry import method
from ...core.run import Player, Run
from ...core.schedule import LossWeight, weight_at
from ...core.task import answer
from ...core.types import Fraction, Positive, Term
from ...mechanisms.encodings import bake
from ...mechanisms.teacher import logits_of
from ._players import (
    class_labels,
    fresh_copy,
    newest_logits,
    precise,
    require_same_classes,
    task_loss,
    trainable,
)
from ._responses import require_classes
from .logits import logit_loss
from .soft_targets import soft_target_loss, soften


def concrete(
    logits: Tensor, temperature: float, generator: torch.Generator, samples: int = 1
) -> Tensor:
    """Relaxed labels, drawn from the concrete distribution of the logits' probabilities.

    Args:
        logits: shape ``(batch, classes)``; gradients go through to them.
        temperature: tau; towards 0 the samples become one-hot.
        generator: of the noise; on the processor, so that every device sees the same.
        samples: drawn for each row.

    Returns:
        Shape ``(samples, batch, classes)``; each sums to 1 over the classes.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 9.0]])
        >>> y = concrete(logits, 0.01, torch.Generator().manual_seed(0), samples=4)
        >>> y.argmax(-1).flatten().tolist()
        [2, 2, 2, 2]
    """
    waits = torch.empty(samples, *logits.shape, dtype=logits.dtype)
    noise = -waits.exponential_(generator=generator).log()  # Gumbel(0, 1)
    drawn = F.log_softmax(logits, dim=-1) + noise.to(logits.device)
    return (drawn / temperature).softmax(dim=-1)


def log_refused(scores: Tensor, labels: Tensor) -> Tensor:
    """``log(1 - p_d(x, y))``, the mean over relaxed labels.

    Args:
        scores: h, shape ``(batch, classes)``.
        labels: y, shape ``(samples, batch, classes)``.
    """
    return -F.softplus((scores * labels).sum(dim=-1)).mean()


def discriminator_loss(
    scores: Tensor, labels: Tensor, classifier: Tensor, teacher: Tensor, alpha: float
) -> Tensor:
    """What the discriminator minimizes: the negative of its three terms.

    Args:
        scores: h, shape ``(batch, classes)``.
        labels: of the data, int64 ``(batch,)``.
        classifier: relaxed labels that the classifier proposes, ``(samples, batch, classes)``.
        teacher: those of the teacher.
        alpha: the classifier's share of the proposals.
    """
    true = -F.softplus(-scores.gather(1, labels.unsqueeze(1))).mean()
    proposed = alpha * log_refused(scores, classifier)
    return -(true + proposed + (1.0 - alpha) * log_refused(scores, teacher))


@dataclass
class _Turn:
    """What the players of one step need after the student's.

    Attributes:
        labels: int64 ``(batch,)``.
        teacher: its logits, with their graph.
        scores: the discriminator's, with their graph.
        hard: the teacher's loss with the labels, with its graph.
        tau: temperature of the concrete distribution.
        gamma: weight of the teacher's distillation.
    """

    labels: Tensor
    teacher: Tensor
    scores: Tensor
    hard: Tensor | float
    tau: float
    gamma: float


@method
class Kdgan(Method):
    """Student and teacher deceive a discriminator of labels, and learn from each other.

    Attributes:
        teacher: trains on in this stage: what a recipe's ``model`` may be, ``"original"``, the name of an
            earlier stage, or a module.
        discriminator: a network that sees x and gives a number for each class, likewise; None for one of
            the teacher's kind with fresh weights.
        alpha: the student's share of the proposed labels; the teacher has the rest.
        beta: weight of the student's distillation, a number or ``{start: 4, end: 1}``.
        gamma: weight of the teacher's distillation, likewise.
        hard_weight: of the cross-entropy of student and teacher with the labels, likewise.
        distance: of the distillation losses: ``"kl"``, softened by ``temperature``, or ``"logits"``, half the
            squared distance of the logits.
        temperature: T of ``"kl"``.
        concrete_start: tau at the beginning of the stage.
        concrete_end: tau at its end; it falls by a constant factor a step.
        samples: relaxed labels that are drawn for each x.
        discriminator_steps: of the discriminator for each step of the student.
        discriminator_lr: its learning rate, as a multiple of the stage's.
        teacher_lr: the teacher's, likewise.

    Example:
        >>> Kdgan(teacher="original", hard_weight=0.5).tau(0.5)
        1.0
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    teacher: Any = "original"
    discriminator: Any = None
    alpha: Fraction = 0.2
    beta: LossWeight = 2.0
    gamma: LossWeight = 1e-4
    hard_weight: LossWeight = 0.0
    distance: Literal["kl", "logits"] = "kl"
    temperature: Positive = 3.0
    concrete_start: Positive = 10.0
    concrete_end: Positive = 0.1
    samples: Annotated[int, Field(ge=1)] = 1
    discriminator_steps: Annotated[int, Field(ge=1)] = 1
    discriminator_lr: Positive = 1.0
    teacher_lr: Positive = 1.0

    _teacher: Player = PrivateAttr()
    _discriminator: Player = PrivateAttr()
    _turn: _Turn | None = PrivateAttr(default=None)

    def tau(self, progress: float) -> float:
        """Temperature of the concrete distribution at a point of the stage (0 to 1)."""
        return float(self.concrete_start * (self.concrete_end / self.concrete_start) ** progress)

    def attach(self, run: Run) -> None:
        """Bring teacher and discriminator in.

        Raises:
            InputError: no discriminator is given, and one of the teacher's kind cannot get fresh weights.
        """
        key = run.key_of(self)
        teacher = trainable(bake(run.find_network(self.teacher)))
        if self.discriminator is None:
            seed = mix(run.seed, run.stage, key, "discriminator")
            critic = fresh_copy(teacher, seed, "kdgan", "name a network as the discriminator")
        else:
            critic = trainable(bake(run.find_network(self.discriminator)))
        self._teacher = run.player(f"{key}.teacher", teacher)
        self._discriminator = run.player(f"{key}.discriminator", critic)
        self._teacher.lr *= self.teacher_lr
        self._discriminator.lr *= self.discriminator_lr

    def task_weight(self, run: Run) -> float:
        """The weight of the labels in the student's loss."""
        return weight_at(self.hard_weight, run.progress)

    def loss(self, run: Run) -> dict[str, Term]:
        """The student's turn.

        Raises:
            ModelMismatch: a player has other classes, or the targets are no class numbers.
            InputError: a sample has no label.
        """
        own = self._logits(run.output)
        self._turn = turn = self._forward(run, own)
        proposed = concrete(own, turn.tau, run.generator("kdgan student"), self.samples)
        adversarial = log_refused(turn.scores.detach(), proposed)
        distillation = self._distance(own, turn.teacher.detach())
        beta = weight_at(self.beta, run.progress)
        return {
            "adversarial": Term(adversarial, self.alpha),
            "distillation": Term(distillation, beta),
        }

    def after_step(self, run: Run) -> None:
        """The discriminator's turn, then the teacher's."""
        assert self._turn is not None
        turn, self._turn = self._turn, None
        student = self._logits(newest_logits(run.model, run.batch))
        self._move_discriminator(run, turn, student)
        self._move_teacher(run, turn, student)

    def _forward(self, run: Run, own: Tensor) -> _Turn:
        """Both other players' outputs; they serve the student, and then their own turns."""
        output = answer(self._teacher.network, run.batch.inputs)
        teacher = self._logits(output)
        scores = self._logits(answer(self._discriminator.network, run.batch.inputs))
        require_same_classes(own, teacher, "kdgan", "the teacher")
        require_same_classes(own, scores, "kdgan", "the discriminator")
        hard = weight_at(self.hard_weight, run.progress)
        return _Turn(
            labels=class_labels(run, len(own), "kdgan", own.shape[1]),
            teacher=teacher,
            scores=scores,
            hard=hard * task_loss(run, output) if hard else 0.0,
            tau=self.tau(run.progress),
            gamma=weight_at(self.gamma, run.progress),
        )

    def _move_discriminator(self, run: Run, turn: _Turn, student: Tensor) -> None:
        teacher = turn.teacher.detach()
        for step in range(self.discriminator_steps):
            scores = turn.scores
            if step:
                scores = self._logits(answer(self._discriminator.network, run.batch.inputs))
            noise = run.generator(f"kdgan discriminator {step}")
            by_student = concrete(student, turn.tau, noise, self.samples)
            by_teacher = concrete(teacher, turn.tau, noise, self.samples)
            loss = discriminator_loss(scores, turn.labels, by_student, by_teacher, self.alpha)
            self._discriminator.descend(loss)
        run.log("discriminator", loss)

    def _move_teacher(self, run: Run, turn: _Turn, student: Tensor) -> None:
        scores = self._logits(newest_logits(self._discriminator.network, run.batch))
        noise = run.generator("kdgan teacher")
        proposed = concrete(turn.teacher, turn.tau, noise, self.samples)
        adversarial = (1.0 - self.alpha) * log_refused(scores, proposed)
        distillation = turn.gamma * self._distance(turn.teacher, student)
        loss = turn.hard + adversarial + distillation
        self._teacher.descend(loss)
        run.log("teacher", loss)

    def _distance(self, own: Tensor, target: Tensor) -> Tensor:
        if self.distance == "logits":
            return logit_loss(own, target)
        softened = soften(target.unsqueeze(0), self.temperature, "arithmetic")
        return soft_target_loss(own, softened, self.temperature)

    def _logits(self, output: Any) -> Tensor:
        """Logits of single predictions, ``(predictions, classes)``."""
        logits = precise(logits_of(output))
        require_classes(logits, -1, "kdgan")
        return logits.reshape(-1, logits.shape[-1])
