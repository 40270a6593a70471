"""What removing each channel really costs, and how well a criterion foretells it.

The oracle of Molchanov et al. (2017, section 2.2): one channel at a time is removed, everything else stays
as it was, nothing is retrained, and the change of the loss is taken. ``absolute`` is the paper's better
one, ``|loss without - loss with|``; signed, a channel whose removal *lowers* the loss ranks lowest. A
criterion is as good as the rank correlation of its scores with that (Spearman).

The surprising rule: a channel is removed by zeroing the weights of the layers that use it, so every
network can be asked, also where no activation can be watched. Where a statistic is taken over the
channels (``Group.mixed_by``: layer normalization) a thinner network differs from that.

Paper: Pruning Convolutional Neural Networks for Resource Efficient Inference (Molchanov, Tyree, Karras,
Aila, Kautz; ICLR 2017; arXiv 1611.06440)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from ..core.select import example_device
from ..core.task import Loss, answer, batch_size, evaluation, move, read
from ..mechanisms.encodings import bake
from ..mechanisms.groups import Group, Member


@dataclass(frozen=True)
class LayerCorrelation:
    """How well the channels of one group are ranked.

    Attributes:
        layer: the first layer that makes the channels.
        channels: how many.
        spearman: -1 to 1; NaN where it is not defined (one channel, or all scores equal).
    """

    layer: str
    channels: int
    spearman: float


@dataclass(frozen=True)
class Correlation:
    """How well a criterion ranks channels.

    Attributes:
        overall: Spearman's correlation over the channels of all groups together.
        layers: of each group by itself.
    """

    overall: float
    layers: tuple[LayerCorrelation, ...]

    @property
    def mean(self) -> float:
        """Mean of the groups' correlations, without those that are not defined."""
        defined = [row.spearman for row in self.layers if not np.isnan(row.spearman)]
        return float(np.mean(defined)) if defined else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form; what is not defined is None."""
        found = {**asdict(self), "mean": self.mean}
        rows = [{k: _defined(v) for k, v in row.items()} for row in found["layers"]]
        return {k: _defined(v) for k, v in found.items()} | {"layers": rows}


@torch.no_grad()
def oracle(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Any],
    loss: Loss,
    *,
    absolute: bool = True,
) -> list[np.ndarray]:
    """The change of the loss when one channel is removed, for every channel of every group.

    Args:
        model: left as it is; a copy without encodings is probed, in eval mode.
        groups: whose channels.
        batches: over all of which each loss is the mean; read once for each channel.
        loss: ``loss(output, target)``, the mean over a batch, as a task has it.
        absolute: the size of the change, or the change itself.

    Returns:
        A float64 array ``(channels,)`` for each group. The cost is one pass over the batches a channel.

    Raises:
        EmptyData: there is no batch.
        ModelMismatch: the model does not take the inputs.

    Example:
        >>> from lilliput.mechanisms.groups import find_groups
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> batches = [(torch.randn(8, 4), torch.arange(8) % 2)]
        >>> groups = find_groups(net, batches[0][0]).groups
        >>> oracle(net, groups, batches, nn.functional.cross_entropy)[0].shape
        (3,)
    """
    probe, device = bake(copy.deepcopy(model)), example_device(model)
    ready = [move(batch, device) for batch in read(batches, "the batches of the oracle")]

    def mean_loss() -> float:
        sizes = [batch_size(batch) for batch in ready]
        values = [float(loss(answer(probe, batch.inputs), batch.target)) for batch in ready]
        return float(np.average(values, weights=sizes))

    with evaluation(probe):
        whole = mean_loss()
        changes = [
            np.array([_loss_without(probe, group, c, mean_loss) for c in range(group.channels)])
            - whole
            for group in groups
        ]
    return [np.abs(change) for change in changes] if absolute else changes


def rank_correlation(
    groups: Sequence[Group],
    scores: Sequence[np.ndarray | None],
    truth: Sequence[np.ndarray],
) -> Correlation:
    """Spearman's rank correlation of a criterion's scores with the oracle.

    Args:
        groups: whose channels.
        scores: an importance for each channel of each group, as a method's ``scores`` returns them;
            a group without scores is left out.
        truth: of :func:`oracle`.

    Example:
        >>> from lilliput.mechanisms.groups import Member
        >>> group = Group(3, (Member("conv.weight", 0, "makes", np.arange(3)[:, None]),))
        >>> rank_correlation([group], [np.array([1.0, 5.0, 9.0])], [np.array([0.1, 0.2, 0.3])]).overall
        1.0
    """
    rows = [(g, s, t) for g, s, t in zip(groups, scores, truth, strict=True) if s is not None]
    layers = [LayerCorrelation(g.name, g.channels, _spearman(s, t)) for g, s, t in rows]
    together = (
        [np.concatenate([row[n] for row in rows]) for n in (1, 2)] if rows else [np.empty(0)] * 2
    )
    return Correlation(_spearman(*together), tuple(layers))


def _loss_without(probe: nn.Module, group: Group, channel: int, mean_loss: Any) -> float:
    with _zeroed(probe, group, channel):
        return float(mean_loss())


@contextmanager
def _zeroed(probe: nn.Module, group: Group, channel: int) -> Iterator[None]:
    """Set to zero what reads one channel, or makes it where nothing reads it by itself."""
    users = group.with_role("uses")
    members = group.members if group.pairwise or not users else users
    places = [_slice(probe, member, channel) for member in members]
    before = [tensor[index].clone() for tensor, index in places]
    try:
        for tensor, index in places:
            tensor[index] = 0
        yield
    finally:
        for (tensor, index), value in zip(places, before, strict=True):
            tensor[index] = value


def _slice(probe: nn.Module, member: Member, channel: int) -> tuple[Tensor, tuple[Any, ...]]:
    layer, _, name = member.tensor.rpartition(".")
    tensor: Tensor = getattr(probe.get_submodule(layer), name)
    rows = torch.from_numpy(member.index[channel]).to(tensor.device)
    return tensor, (*[slice(None)] * member.dim, rows)


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def _spearman(scores: np.ndarray, truth: np.ndarray) -> float:
    """NaN, without a warning, where a rank is not defined."""
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(truth) == 0:
        return float("nan")
    return float(stats.spearmanr(scores, truth).statistic)
