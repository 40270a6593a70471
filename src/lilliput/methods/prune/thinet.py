"""ThiNet: the channels go that the next layer misses least; factors on the rest make up for them.

Paper: ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression (Luo, Wu, Lin; ICCV
2017; arXiv 1707.06342)

A sample is one output of the next layer: an image, a filter, a position, drawn at random. Without its
bias it is a sum over channels, ``y = sum_c x_c``, so removing the set T costs ``sum over samples of
(sum_{c in T} x_c)**2`` (equation 6), and T grows greedily by the channel that adds least. Then the kept
channels S get the factors that minimize ``sum (y - sum_{c in S} w_c x_c)**2`` (equation 7), which are
multiplied into the next layer's weights. One layer after the other, each on the activations that the
thinner layers before it produce, with some training in between: ``rounds`` spreads the layers over the
stage.

Faithful: samples, greedy choice, factors, order of the layers. As in the paper the bias is left out, and the
inputs are those of the next layer, after activation and pooling. Differs: the paper draws 10 images of
each class, here it is ``samples`` images of any class. The inverse in equation 7 does not exist where two
channels are equal; then the factors nearest to 1 are taken. The greedy choice needs the products of channels
only, which are computed once. Ours: where several layers use the channels (a residual stream, a
concatenation), the errors of all of them are added, each relative to what it has to reproduce, and each
layer gets factors of its own. Users that are neither linear nor convolutions (an attention's joint matrix,
a recurrent layer) do not count; channels that no other layer uses are ranked by the 2-norm of their
filters, which the change says. The paper leaves the last convolution of a residual block whole:
``layers: "!..."``.

Cost: a pass over ``samples`` images a layer, and for C channels and N samples C**2 * N multiplications in
one matrix product. When not to use it: without data, or with fewer samples than some ten times the channels.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from ...core.registry import method
from ...core.run import Run
from ...measure.macs import unfused
from ...mechanisms.groups import Groups
from ...mechanisms.groups.classes import Group, Removal
from ...mechanisms.solvers import least_squares, matrix, solvable, visit_rows
from ._channels import Edit
from ._layerwise import LayerwiseMethod, thinned, write
from ._norms import effective, norms


def contributions(layer: nn.Module, rows: Tensor, filters: Tensor, index: np.ndarray) -> Tensor:
    """What each channel adds to one output of the layer, ``x_c``; with the bias they sum to the output.

    Args:
        layer: linear or convolution.
        rows: what it multiplies, ``(samples, input channels, kernel positions)``; see
            :func:`lilliput.mechanisms.solvers.rows`.
        filters: int64 ``(samples,)``, which filter each sample looks at.
        index: ``(channels, repeats)``, where each channel lies among the input channels of one filter.

    Returns:
        Shape ``(samples, channels)``, double precision.
    """
    weight = matrix(layer)
    groups = rows.shape[1] // weight.shape[1]
    samples = torch.arange(len(rows), device=rows.device)
    own = rows.view(len(rows), groups, *weight.shape[1:])
    own = own[samples, filters // (len(weight) // groups)]
    each = (own.double() * weight[filters].double()).sum(2)
    return each[:, torch.from_numpy(index).to(rows.device)].sum(2)


def removal_order(gram: Tensor, count: int) -> np.ndarray:
    """The greedy choice: each time the channel goes that keeps ``sum((x_T)**2)`` of the removed T smallest.

    All inner products of channels are computed once (``gram``); the inner products with the sum over T
    are then kept up to date, so that a step costs C operations and no sum is ever taken again.

    Args:
        gram: ``x.T @ x`` of the contributions, ``(channels, channels)``.
        count: how many go.

    Returns:
        Their numbers, in the order in which they go.

    Example:
        >>> x = torch.tensor([[3.0, 1.0, -2.9], [0.0, 0.5, 0.0]])
        >>> removal_order(x.T @ x, 2)
        array([1, 0])
    """
    products = gram.double().cpu().numpy()
    error = products.diagonal().copy()  # what is added to the error when a channel joins T
    order = np.empty(count, dtype=np.int64)
    for step in range(count):
        order[step] = chosen = int(error.argmin())
        error += 2.0 * products[chosen]
        error[order[: step + 1]] = np.inf
    return order


def kept_scales(gram: Tensor, kept: Tensor) -> Tensor:
    """The factors on the kept channels that give the sum over all channels back best: least squares.

    Equation 7, with the normal equations instead of the inverse. Where kept channels are dependent,
    the factors nearest to 1 are taken, so the error is never above that without factors.

    Args:
        gram: ``x.T @ x`` of the contributions, ``(channels, channels)``.
        kept: int64, which stay.

    Returns:
        A factor for each kept channel.
    """
    inner = gram[kept][:, kept]
    return least_squares(inner, gram[kept].sum(1), toward=torch.ones_like(inner[0]))


@method
class Thinet(LayerwiseMethod):
    """Remove the channels whose loss the next layer feels least; scale the others by least squares.

    Attributes:
        samples: images from which the samples are drawn.
        per_sample: random (filter, position) pairs of each image.
        scale: multiply the kept channels by the least-squares factors.
        rounds: over how many rounds the layers are spread; as many as layers trains after each one.

    Example:
        >>> Thinet(keep=0.5, layers=["layer*.conv1"], rounds=9).per_sample
        10
    """

    samples: Annotated[int, Field(ge=1)] = 1000
    per_sample: Annotated[int, Field(ge=1)] = 10
    scale: bool = True

    _grams: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _one_correction(self) -> Thinet:
        if self.scale and self.fold != "none":
            raise ValueError(
                "the factors make up for removed channels, constants included: with fold set scale to false"
            )
        return self

    def chosen(self, run: Run, groups: Groups, number: int) -> np.ndarray:
        """The channels that equation 6 removes."""
        group = groups.groups[number]
        count = group.channels - self.width(run, groups, number)
        if not count:
            return np.empty(0, dtype=np.int64)
        self._grams = self._measure(run, group)
        if not self._grams:
            for layer in group.layers:
                self.note(run, layer, "no layer that can be measured uses it: ranked by 2-norm")
            return np.sort(np.argsort(norms(run.model, group, 2), kind="stable")[:count])
        together = torch.stack([_relative(gram) for gram in self._grams.values()]).sum(0)
        return np.sort(removal_order(together, count))

    def edit(self, run: Run, groups: Groups, removal: Removal) -> Edit | None:
        """Multiply the kept channels of each next layer by its factors."""
        if not self.scale:
            return None
        ((number, gone),) = removal.items()
        values = {
            tensor: _scaled(run.model, tensor, groups.groups[number], gone, gram)
            for tensor, gram in self._grams.items()
        }

        def scale(model: nn.Module) -> None:
            for tensor, value in values.items():
                write(model, tensor, value)

        return scale

    def _measure(self, run: Run, group: Group) -> dict[str, Tensor]:
        """For each weight that uses the channels, the products of their contributions."""
        places = users(run.model, group)
        weights = {name.rpartition(".")[0]: name for name in places}
        generator = run.generator(f"thinet {group.name}")
        grams: dict[str, Tensor] = {}

        def use(layer: str, rows: Tensor) -> None:
            module, name = run.model.get_submodule(layer), weights[layer]
            filters = torch.randint(len(matrix(module)), (len(rows),), generator=generator)
            x = contributions(module, rows, filters.to(rows.device), places[name])
            grams[name] = grams[name] + x.T @ x if name in grams else x.T @ x

        batches = run.calibration(self.samples)
        with unfused():
            visit_rows(run.model, weights, batches, self.per_sample, generator, use)
        return {name: gram for name, gram in grams.items() if gram.any()}


def users(model: nn.Module, group: Group) -> dict[str, np.ndarray]:
    """The weights whose layers multiply the channels, and where each channel lies in the input dim."""
    found: dict[str, np.ndarray] = {}
    for member in group.with_role("uses"):
        layer = model.get_submodule(member.layer)
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        is_weight = member.tensor.rpartition(".")[2] == "weight"
        if solvable(layer) and is_weight and member.dim == (not transposed):
            known = found.get(member.tensor)
            found[member.tensor] = (
                member.index if known is None else np.concatenate([known, member.index], axis=1)
            )
    return found


def _relative(gram: Tensor) -> Tensor:
    """Products on a scale on which removing everything costs 1."""
    whole = gram.sum()
    return gram / whole if whole > 0 else gram


def _scaled(model: nn.Module, tensor: str, group: Group, gone: np.ndarray, gram: Tensor) -> Tensor:
    """What is left of a weight that uses the channels, times their factors."""
    whole, index = effective(model, tensor), users(model, group)[tensor]
    dim = next(m.dim for m in group.with_role("uses") if m.tensor == tensor)
    kept = np.setdiff1d(np.arange(group.channels), gone)
    factors = torch.ones(whole.shape[dim], dtype=torch.float64)
    scales = kept_scales(gram, torch.from_numpy(kept).to(gram.device)).cpu()
    factors[torch.from_numpy(index[kept])] = scales[:, None].expand(-1, index.shape[1])
    shape = [-1 if d == dim else 1 for d in range(whole.ndim)]
    return thinned(whole * factors.view(shape).to(whole), group, gone, tensor)
