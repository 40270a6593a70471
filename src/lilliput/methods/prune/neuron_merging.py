"""Data-free pruning: of two neurons that compute nearly the same one goes, the other does its work.

Paper: Data-free Parameter Pruning for Deep Neural Networks (Srinivas, Babu; BMVC 2015; arXiv
1507.06149)

Neuron i has incoming weights W_i, its bias appended, and outgoing weights a_i. If W_i = W_j, then j can go
without loss when ``a_i`` becomes ``a_i + a_j``; otherwise the loss is bounded by the saliency ``s_ij =
<a_j**2> * |W_i - W_j|**2``, where ``<>`` is the mean over the outgoing weights. Again and again the pair of
smallest saliency is taken, j goes, a_j is added to a_i ("surgery"), and the saliencies with a_i are computed
anew. Layer by layer; without data and without training.

How many go is given (``keep``, ``budget`` or ``count``), or follows from the paper's heuristic: removal goes
on while the saliency is below the mode of the histogram of saliencies; of that number the paper takes all
or a fraction, which ``heuristic`` is. The histogram is of all pairs of the layer as it stands when its turn
comes, which is our reading. It works where the dense network is good to begin with.

Faithful: saliency, surgery, order; fully connected layers only. Ours, with ``convolutions``: layers of one
convolution without groups, and layers that batch normalization follows directly. W_i then is the filter with
the normalization folded in, a_i all weights of the next layer, linear or convolution, that see the channel;
the bound holds up to a factor that is the same for all neurons of a layer. Channels stay that several layers
make (residual streams), that are multiplied with each other, or over which a statistic is taken.

Cost: for n neurons n**2 products of rows, in one matrix product, and about n**2 operations for all removals.
When not to use it: where there are data to retrain with, every other criterion then does as well or better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from ...core.registry import method
from ...core.run import Run
from ...core.types import Change, Keep, PerLayer, resolve
from ...errors import NothingMatched
from ...mechanisms.budget import rounded
from ...mechanisms.flow import flows
from ...mechanisms.groups import Groups
from ...mechanisms.groups.classes import Group, Removal
from ._channels import ChannelMethod, Edit
from ._layerwise import LayerwiseMethod, thinned, write
from ._norms import effective, rows

Matrix = NDArray[np.float64]
_Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Merge:
    """One removal.

    Attributes:
        removed: the neuron that goes, j.
        into: the neuron that takes over its outgoing weights, i.
        saliency: s_ij.
    """

    removed: int
    into: int
    saliency: float


def saliencies(incoming: Matrix, outgoing: Matrix) -> Matrix:
    """``s_ij = <a_j**2> * |W_i - W_j|**2``: the harm when neuron i takes over the work of neuron j.

    Not symmetric: a_j belongs to the neuron that goes.

    Args:
        incoming: W, a row for each neuron, the bias appended: ``(neurons, inputs + 1)``.
        outgoing: a, a row for each neuron: ``(neurons, outputs)``.

    Returns:
        ``(neurons, neurons)``, infinite on the diagonal.

    Example:
        >>> saliencies(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[1.0], [2.0]]))
        array([[ inf, 100.],
               [ 25.,  inf]])
    """
    return np.asarray(_distances(incoming) * (outgoing**2).mean(1))


def merges(incoming: Matrix, outgoing: Matrix, *, surgery: bool = True) -> Iterator[Merge]:
    """One removal after the other, always the pair of smallest saliency, until one neuron is left.

    After ``a_i += a_j`` only the saliencies with a_i change, and only neurons whose nearest one has
    gone look for another; so all removals together cost about as much as the first matrix.

    Args:
        incoming: see :func:`saliencies`.
        outgoing: see :func:`saliencies`.
        surgery: add a_j to a_i; False only removes j.
    """
    distance, outgoing = _distances(incoming), outgoing.copy()
    strength = (outgoing**2).mean(1)
    nearest = distance.argmin(0)
    neurons = np.arange(len(distance))
    for _ in range(len(distance) - 1):
        saliency = strength * distance[nearest, neurons]
        j = int(saliency.argmin())
        i = int(nearest[j])
        yield Merge(j, i, float(saliency[j]))
        if surgery:
            outgoing[i] += outgoing[j]
            strength[i] = (outgoing[i] ** 2).mean()
        strength[j] = distance[j] = distance[:, j] = np.inf
        lost = (nearest == j).nonzero()[0]
        nearest[lost] = distance[:, lost].argmin(0)


def mode_of(values: NDArray[np.float64]) -> float:
    """The middle of the highest bar of the histogram of the finite values."""
    counts, edges = np.histogram(values[np.isfinite(values)], bins="auto")
    peak = int(counts.argmax())
    return float(edges[peak] + edges[peak + 1]) / 2


def _distances(rows: Matrix) -> Matrix:
    """Squared distances of all pairs of rows, infinite on the diagonal."""
    products = rows @ rows.T
    squares = products.diagonal()
    distance = np.maximum(squares[:, None] + squares[None, :] - 2.0 * products, 0.0)
    np.fill_diagonal(distance, np.inf)
    return np.asarray(distance)


@method
class NeuronMerging(LayerwiseMethod):
    """Remove neurons whose work another neuron can do, and let it do it; needs no data.

    Attributes:
        count: instead of keep, how many neurons go from each layer; for every layer or by layer pattern.
        heuristic: instead of keep, this fraction of what the paper's rule removes.
        surgery: add the outgoing weights of the removed neuron to those of the one that stays.
        convolutions: also convolutions, and layers followed by batch normalization.

    Example:
        >>> NeuronMerging(heuristic=0.5).surgery
        True
    """

    data_free: ClassVar[bool] = True

    count: PerLayer[Annotated[int, Field(ge=1)]] | None = None
    heuristic: Keep | None = None
    surgery: bool = True
    convolutions: bool = False

    _merges: list[Merge] = PrivateAttr(default_factory=list)

    def _check_amount(self) -> None:
        given = [
            n for n in ("keep", "budget", "count", "heuristic") if getattr(self, n) is not None
        ]
        if len(given) != 1:
            raise ValueError("give exactly one of keep, budget, count and heuristic")

    @model_validator(mode="after")
    def _one_correction(self) -> NeuronMerging:
        if self.surgery and self.fold != "none":
            raise ValueError(
                "the merged neuron brings the constants of the removed one: with fold set surgery to false"
            )
        return self

    @classmethod
    def example(cls) -> ChannelMethod:
        """Half of the neurons and channels go, in steps of two."""
        return cls(keep=0.5, round_to=2, convolutions=True)

    def attach(self, run: Run) -> None:
        """Refuse a network in which no layer can be merged."""
        groups = self.groups(run)
        # Once: which normalization follows which layer stays so while channels go.
        self.memory(run)["norms"] = norms_behind(run.model, self.inputs(run))
        mine = [g for g, m in zip(groups.groups, self.takes_part(groups), strict=True) if m]
        reasons = {g.name: self._why_not(run, g) for g in mine}
        self.memory(run)["whole"] = [
            [g.name, g.channels, w] for g in mine if (w := reasons[g.name])
        ]
        if all(reasons.values()):
            told = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:5])
            raise NothingMatched(
                f"neuron_merging: no layer that {self.layers!r} covers can be merged ({told}). "
                "Choose linear layers inside the network, or set convolutions: true."
            )
        super().attach(run)

    def finish(self, run: Run) -> list[Change]:
        """What was merged, and which layers were left whole and why."""
        whole = [
            Change(layer, "channels", width, width, self.method_name(), f"left whole: {why}")
            for layer, width, why in self.memory(run)["whole"]
        ]
        return [*super().finish(run), *whole]

    def allowed(self, run: Run, groups: Groups) -> list[np.ndarray]:
        """The counts that each group may keep; only all, where its channels cannot be merged."""
        return [
            counts[-1:] if self._why_not(run, group) else counts
            for group, counts in zip(groups.groups, super().allowed(run, groups), strict=True)
        ]

    def width(self, run: Run, groups: Groups, number: int) -> int:
        """How many channels one group keeps: as the base says, or by a rule of this paper."""
        if self.count is None and self.heuristic is None:
            return super().width(run, groups, number)
        group = groups.groups[number]
        wish = max(group.channels - self._asked(run, group), 0)
        allowed = self.allowed(run, groups)[number]
        return int(rounded(np.array([wish]), [allowed])[0])

    def chosen(self, run: Run, groups: Groups, number: int) -> np.ndarray:
        """The neurons that are merged into others."""
        group = groups.groups[number]
        if self._why_not(run, group):
            return np.empty(0, dtype=np.int64)
        going = group.channels - self.width(run, groups, number)
        self._merges = list(islice(self._removals(run, group), going))
        return np.sort(np.array([m.removed for m in self._merges], dtype=np.int64))

    def edit(self, run: Run, groups: Groups, removal: Removal) -> Edit | None:
        """Add the outgoing weights of the removed neurons to those that stay."""
        if not self.surgery:
            return None
        ((number, gone),) = removal.items()
        group = groups.groups[number]
        values = {
            m.tensor: _merged(run.model, m.tensor, group, gone, self._merges)
            for m in group.with_role("uses")
        }

        def merge(model: nn.Module) -> None:
            for tensor, value in values.items():
                write(model, tensor, value)

        return merge

    def _why_not(self, run: Run, group: Group) -> str:
        if self.count is not None and resolve(self.count, group.name) is None:
            return f"no pattern of count, {self.count}, covers it"
        norm = self._norm(run, group) if self.convolutions else None
        return why_not(run.model, group, self.convolutions, norm)

    def _asked(self, run: Run, group: Group) -> int:
        """How many neurons go by ``count`` or by the heuristic."""
        if self.count is not None:
            return resolve(self.count, group.name) or 0
        rows = incoming(run.model, group, self._norm(run, group))
        limit = mode_of(saliencies(rows, outgoing(run.model, group)))
        below = takewhile(lambda m: m.saliency < limit, self._removals(run, group))
        return round(sum(1 for _ in below) * float(self.heuristic or 1))

    def _removals(self, run: Run, group: Group) -> Iterator[Merge]:
        rows = incoming(run.model, group, self._norm(run, group))
        return merges(rows, outgoing(run.model, group), surgery=self.surgery)

    def _norm(self, run: Run, group: Group) -> str | None:
        norm: str | None = self.memory(run)["norms"].get(group.name)
        return norm


def why_not(model: nn.Module, group: Group, convolutions: bool, norm: str | None = None) -> str:
    """Why the channels of a group cannot be merged; empty if they can.

    Args:
        model: the network.
        group: of its channels.
        convolutions: whether convolutions may be merged too.
        norm: the batch normalization of :func:`norms_behind`, whose numbers may be folded.
    """
    makers, used = group.with_role("makes"), group.with_role("uses")
    kinds = "linear layers and convolutions" if convolutions else "linear layers"
    if len(makers) != 1 or group.pairwise:
        return "several layers make its channels"
    if group.mixed_by:
        return f"{group.mixed_by[0]} takes a statistic over its channels"
    if not _plain(model, makers[0].layer, convolutions):
        return f"{makers[0].layer} is none of the {kinds}"
    if not used or not all(m.dim == 1 and _plain(model, m.layer, convolutions) for m in used):
        return f"not only {kinds} use its channels"
    extra = [m for m in group.with_role("along") if m.layer != makers[0].layer]
    strange = [m.tensor for m in extra if norm is None or m.layer != norm]
    return f"{strange[0]} has numbers of its own for each channel" if strange else ""


def incoming(model: nn.Module, group: Group, norm: str | None = None) -> Matrix:
    """W: what makes each channel, bias appended, a batch normalization behind it folded in."""
    (maker,) = group.with_role("makes")
    weight = rows(effective(model, maker.tensor), maker).double()
    shift = weight.new_zeros(len(weight), 1)
    for member in group.with_role("along"):
        if member.layer == maker.layer:
            index = torch.from_numpy(member.index).to(weight.device)
            shift = effective(model, member.tensor).double()[index]
    if norm is not None:
        scale, mean, beta = _normalization(model.get_submodule(norm), len(weight))
        weight, shift = weight * scale, (shift - mean) * scale + beta
    return np.asarray(torch.cat([weight, shift], dim=1).cpu())


def outgoing(model: nn.Module, group: Group) -> Matrix:
    """a: the weights that see each channel, in all layers that use it."""
    parts = [rows(effective(model, m.tensor), m).double() for m in group.with_role("uses")]
    return np.asarray(torch.cat(parts, dim=1).cpu())


def _plain(model: nn.Module, name: str, convolutions: bool) -> bool:
    layer = model.get_submodule(name)
    if convolutions and isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups == 1 and not isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return isinstance(layer, nn.Linear)


def norms_behind(model: nn.Module, inputs: Any) -> dict[str, str]:
    """Layers whose output a batch normalization takes as it is, with its name.

    What lies between need not be a module: in ``norm(conv(x).relu())`` there is nothing to fold.

    Args:
        model: run in eval mode.
        inputs: an example.
    """
    layers = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
    ]
    found = flows(model, layers, inputs).layers
    return {layer: flow.norm for layer, flow in found.items() if flow.norm is not None}


def _normalization(norm: Any, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, mean and shift of a batch normalization in eval mode, each ``(channels, 1)``."""
    ones = torch.ones(channels, dtype=torch.float64)
    weight, bias, mean, variance = (
        other if value is None else value.detach().double()
        for value, other in (
            (norm.weight, ones),
            (norm.bias, 0 * ones),
            (norm.running_mean, 0 * ones),
            (norm.running_var, ones),
        )
    )
    return (weight / (variance + norm.eps).sqrt())[:, None], mean[:, None], bias[:, None]


def _merged(
    model: nn.Module, tensor: str, group: Group, gone: np.ndarray, merged: list[Merge]
) -> Tensor:
    """What is left of a weight that uses the channels, the removed columns added to the others."""
    whole = effective(model, tensor).clone()
    for member in group.with_role("uses"):
        if member.tensor == tensor:
            index = torch.from_numpy(member.index).to(whole.device)
            for merge in merged:
                whole[:, index[merge.into]] += whole[:, index[merge.removed]]
    return thinned(whole, group, gone, tensor)
