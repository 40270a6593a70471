"""Deep mutual learning: networks that start untrained teach each other, and one of them is kept.

Paper: Deep Mutual Learning (Zhang, Xiang, Hospedales, Lu; CVPR 2018; arXiv 1706.00384)

K networks see the same mini-batch. Network k minimizes the cross-entropy with the labels plus how far its
probabilities p_k, at temperature 1, are from those of its peers::

    L_k = H(y, p_k) + 1 / (K - 1) * sum over l != k of KL(p_l || p_k)

The p_l are constants to network k. The networks are updated one after the other, each against the others'
newest probabilities (the paper's algorithm 1): network 1 makes its step, p_1 is computed again, then
network 2 makes its step, and so on. The student is network 1; the peers are gone when the stage ends.

Faithful: losses, temperature, order of the updates; p_k is computed with dropout and batch statistics, as in
training, and does not move running statistics a second time. ``average=False`` leaves 1 / (K - 1) out: the
authors' code sums the divergences. That code also draws a new mini-batch for each network; here, as
in the paper, all learn from the same. ``update="simultaneous"`` updates all networks from the
probabilities before the step, as many reimplementations do. Differs: ``weight`` can weigh the
divergences; the paper has 1. A peer's own loss is the task's, whatever other methods of the stage do
to the student's.

The surprising rule: networks that start with the same weights have nothing to teach each other. A number of
peers therefore means copies with fresh random weights, not copies.

Cost: each peer is trained as the student is, forward and backward; one after the other, each network but the
last also runs forward once more. When not to use it: where a good teacher is at hand, ``soft_targets`` costs
a third.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from ...core.digests import mix, weights_digest
from ...core.method import Method
from ...core.registry import method
from ...core.run import Player, Run
from ...core.schedule import LossWeight, weight_at
from ...core.task import answer
from ...core.types import Term
from ...errors import LilliputWarning
from ...mechanisms.encodings import bake
from ...mechanisms.teacher import logits_of
from ._players import (
    fresh_copy,
    log_probabilities,
    newest_logits,
    require_same_classes,
    task_loss,
    trainable,
)


def mutual_divergence(
    own: Tensor, others: Sequence[Tensor], class_dim: int = -1, average: bool = True
) -> Tensor:
    """``1 / (K - 1) * sum_l KL(p_l || p_k)``, the mean over all predictions.

    Args:
        own: logarithms of p_k, shape ``(batch, ...)``.
        others: logarithms of each p_l, same shape.
        class_dim: the dim that holds the classes.
        average: whether to divide by the number of the others.

    Example:
        >>> p = torch.tensor([[0.25, 0.75]]).log()
        >>> q = torch.tensor([[0.5, 0.5]]).log()
        >>> round(float(mutual_divergence(q, [p, q], average=False)), 4)
        0.1308
    """
    parts = [(other.exp() * (other - own)).sum(dim=class_dim).mean() for other in others]
    total = sum(parts[1:], parts[0])
    return total / len(parts) if average else total


@method
class Mutual(Method):
    """Learn together with peers, which learn from the student in turn.

    Attributes:
        peers: how many copies of the student with fresh random weights; or a list of networks, each of them
            what a recipe's ``model`` may be, ``"original"``, the name of an earlier stage, or a module.
        update: ``"sequential"``, one network after the other, or ``"simultaneous"``.
        average: divide the divergences of a network by the number of its peers.
        weight: of the divergences, a number or ``{start: 0, end: 1}``.
        class_dim: the dim of the outputs that holds the classes; 1 for maps ``(batch, classes, ...)``.

    Example:
        >>> Mutual(peers=2, update="simultaneous").average
        True
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    peers: Annotated[int, Field(ge=1)] | Annotated[list[Any], Field(min_length=1)] = 1
    update: Literal["sequential", "simultaneous"] = "sequential"
    average: bool = True
    weight: LossWeight = 1.0
    class_dim: int = -1

    _players: list[Player] = PrivateAttr()
    _turns: list[tuple[Tensor, Tensor]] = PrivateAttr()
    _own: Tensor = PrivateAttr()
    _weight: float = PrivateAttr()

    def attach(self, run: Run) -> None:
        """Bring the peers in.

        Raises:
            InputError: a copy of the student cannot get fresh weights.
        """
        networks = self._networks(run)
        self._warn_of_twins(run, networks)
        key = run.key_of(self)
        self._players = [run.player(f"{key}.peer {n}", x) for n, x in enumerate(networks, 2)]

    def loss(self, run: Run) -> dict[str, Term]:
        """The student's divergence from its peers.

        Raises:
            ModelMismatch: a peer has other classes.
        """
        own = logits_of(run.output, "the student")
        # A peer has the same weights until its turn: this forward pass also serves its own step.
        self._turns = [self._forward(run, player, own) for player in self._players]
        self._own = self._log(own.detach())
        self._weight = weight_at(self.weight, run.progress)
        value = self._divergence(self._log(own), [logs.detach() for _, logs in self._turns])
        return {"mutual": Term(value, self._weight)}

    def after_step(self, run: Run) -> None:
        """Each peer makes its step."""
        networks = [run.model, *(player.network for player in self._players)]
        newest = [self._own, *(logs.detach() for _, logs in self._turns)]
        for k, (player, (hard, logs)) in enumerate(zip(self._players, self._turns, strict=True), 1):
            if self.update == "sequential":  # the network before has just moved
                newest[k - 1] = self._log(newest_logits(networks[k - 1], run.batch))
            loss = hard + self._weight * self._divergence(logs, newest[:k] + newest[k + 1 :])
            player.descend(loss)
            run.log(f"peer {k + 1}", loss)
        self._turns = []

    def _networks(self, run: Run) -> list[nn.Module]:
        if isinstance(self.peers, list):
            return [trainable(bake(run.find_network(reference))) for reference in self.peers]
        seeds = [mix(run.seed, run.stage, run.key_of(self), n) for n in range(self.peers)]
        instead = "let peers be a list of networks"
        return [fresh_copy(run.model, seed, "mutual", instead) for seed in seeds]

    def _warn_of_twins(self, run: Run, networks: list[nn.Module]) -> None:
        digests = [weights_digest(network) for network in (run.model, *networks)]
        twins = [n for n, digest in enumerate(digests, 1) if digests.count(digest) > 1]
        if twins:
            warnings.warn(
                f"mutual: the networks {', '.join(map(str, twins))} (1 is the student) start with the same "
                "weights, so they have nothing to teach each other. Give peers: a number, for fresh weights.",
                LilliputWarning,
                stacklevel=2,
            )

    def _forward(self, run: Run, player: Player, own: Tensor) -> tuple[Tensor, Tensor]:
        """A peer's loss with the labels and its log-probabilities, both with their graph."""
        output = answer(player.network, run.batch.inputs)
        logits = logits_of(output, "the peer")
        require_same_classes(own, logits, "mutual", f"the {player.name.rpartition('.')[2]}")
        return task_loss(run, output), self._log(logits)

    def _log(self, logits: Tensor) -> Tensor:
        return log_probabilities(logits, self.class_dim, "mutual")

    def _divergence(self, own: Tensor, others: Sequence[Tensor]) -> Tensor:
        return mutual_divergence(own, others, self.class_dim, self.average)
