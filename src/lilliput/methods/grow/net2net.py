"""Net2Net: a wider or deeper network starts with the very function that a smaller one has learned.

Paper: Net2Net: Accelerating Learning via Knowledge Transfer (Chen, Goodfellow, Shlens; ICLR 2016; arXiv
1511.05641)

Net2WiderNet: a layer of n channels becomes one of q > n by a random mapping, ``g(j) = j`` for j <= n and a
random one of 1 ... n for the others. The layer copies what makes channel g(j), ``U[k, j] = W[k, g(j)]``;
whatever uses the channels divides by the number of copies, ``V[j, h] = W[g(j), h] / |{x: g(x) = g(j)}|``.
Biases and the statistics of batch normalization are copied along. Net2DeeperNet: a layer that the smaller
network lacks is an identity, ``U = I``; a convolution has a 1 in the middle of its kernel, a batch
normalization undoes itself, its scale and shift being the deviation and the mean of its input in training
data. That needs ``f(I f(v)) = f(v)`` of the non-linearity: ReLU and its clipped forms have it, sigmoid and
tanh do not.

Faithful: both operations, random mapping, noise. The paper goes layer by layer and says for each kind of
layer what is connected with it; here the network that is to be filled says how wide and deep it is, and
tracing says which weights use a channel, so residual, concatenated and recurrent networks need no rules.
Ours: where an operator takes a statistic over channels (layer normalization), a multiple of the width is
asked for and every channel copied equally often; ``zero`` adds residual blocks, which the paper has not; the
self-check: both networks must give the same output for training data, or nothing is filled.

Cost: two traces, and forward passes of both networks in double precision over ``samples`` samples. When not
to use it: where the larger network has other connections; ``inherit`` takes over what agrees.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.method import Method
from ...core.registry import method
from ...core.run import Run
from ...core.select import matches
from ...core.types import Change, Layers, NonNegative, Positive
from ...errors import ModelMismatch, NothingChanged, NothingMatched
from ...mechanisms.factors import multiplied
from ...mechanisms.groups import find_groups
from ...mechanisms.groups.classes import Group
from ...mechanisms.initializing import owner_of, refuse_encoded
from ...mechanisms.surgery.check import relative_error
from ._layers import (
    Norm,
    answers,
    exact,
    exact_answer,
    input_statistics,
    named_tensors,
    why_not_identity,
)
from ._match import (
    Block,
    DimBlocks,
    Ints,
    Match,
    answers_of,
    blocks_of,
    lookup,
    partners,
)


def random_mapping(small: int, large: int, generator: torch.Generator) -> Ints:
    """The mapping g: which channel each channel of the wider layer copies; the first n copy themselves.

    Args:
        small: n, channels of the layer.
        large: q, channels of the wider one.
        generator: of the random choices.

    Example:
        >>> random_mapping(3, 5, torch.Generator().manual_seed(0))[:3].tolist()
        [0, 1, 2]
    """
    copied = torch.randint(small, (large - small,), generator=generator)
    return np.concatenate([np.arange(small), copied.numpy()])


def even_mapping(small: int, large: int) -> Ints:
    """The mapping g that copies every channel equally often, so that means over channels stay."""
    return np.arange(large) % small


def replicated(value: Tensor, sources: Mapping[int, Ints], copies: Mapping[int, Ints]) -> Tensor:
    """The tensor of the wider layer: copies along some dims, divided by their number where they are summed.

    Args:
        value: of the smaller network.
        sources: dim -> the index that each index of the wider tensor copies.
        copies: dim over which the layer sums -> how many copies each index is one of.

    Example:
        >>> replicated(torch.tensor([[6.0, 4.0]]), {1: np.array([0, 1, 0])}, {1: np.array([2, 1, 2])})
        tensor([[3., 4., 3.]])
    """
    for dim, index in sources.items():
        value = value.index_select(dim, torch.from_numpy(index).to(value.device))
    for dim, count in copies.items():
        shape = [-1 if d == dim else 1 for d in range(value.ndim)]
        value = value / torch.from_numpy(count).to(value).view(shape)
    return value


def identity(like: Tensor, made: Ints, used: Ints, copies: Ints) -> Tensor | None:
    """The weight of a layer that passes its input on: each output is the mean of its channel's copies.

    Args:
        like: a weight ``(outputs, inputs, *kernel)`` of the wanted shape; kernels of odd size.
        made: number of the channel of each output.
        used: number of the channel of each input.
        copies: how many inputs have the same channel as each input.

    Returns:
        None where an output is no channel of the input.

    Example:
        >>> a, b = np.array([1, 2]), np.array([1, 2, 1])
        >>> identity(torch.empty(2, 3), a, b, np.array([2, 1, 2]))
        tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 1.0000, 0.0000]])
    """
    same = made[:, None] == used[None, :]
    if not same.any(1).all():
        return None
    weight = torch.zeros_like(like)
    taps = (
        weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    )  # a view: rows, columns, kernel
    taps[:, :, taps.shape[2] // 2] = torch.from_numpy(same / copies).to(like)
    return weight


def set_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """Let a batch normalization expect these statistics and undo them, so that it changes nothing."""
    norm.running_mean.copy_(mean.expand_as(norm.running_mean))
    norm.running_var.copy_(variance.expand_as(norm.running_var))
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)


@method
class Net2net(Method):
    """Start a wider or deeper network with the function of an earlier, smaller one.

    Put it into a stage that brings the larger network (``model``), whose layers have the names that they
    have in the smaller one.

    Attributes:
        source: the smaller network: ``"previous"``, the name of an earlier stage, a file, or what a
            recipe's ``model`` may be.
        noise: deviation of the noise on the copies of channels, in deviations of the tensor; it breaks their
            symmetry where no dropout does, and the start is then only nearly the same function.
        zero: pattern over layers that only the larger network has and that answer zero, such as the last
            normalization of a new residual block; what is new beside them stays random.
        samples: training samples for the self-check and the statistics of new batch normalizations.
        tolerance: largest difference of the outputs, relative to the largest output.

    Example:
        >>> Net2net(noise=0.01).source
        'previous'
    """

    family: ClassVar[str] = "grow"
    initializes: ClassVar[bool] = True

    source: Any = "previous"
    noise: NonNegative = 0.0
    zero: Layers | None = None
    samples: Annotated[int, Field(ge=1)] = 128
    tolerance: Positive = 1e-5

    def attach(self, run: Run) -> None:
        """Fill the network.

        Raises:
            ModelMismatch: it would not compute what the smaller network computes; it is as it was.
            NothingChanged: it is the smaller network itself.
        """
        refuse_encoded(run.model, "net2net")
        small = multiplied(run.find_network(self.source).to(run.device))
        batches = [batch.inputs for batch in run.calibration(self.samples)]
        growth = Growth(small, run.model, batches[0], self.zero, run.generator("net2net"))
        grown = growth.grown(batches)
        error = growth.check(grown, batches, self.tolerance)
        state, own = grown.state_dict(), run.model.state_dict()
        if all(torch.equal(value, state[name]) for name, value in own.items()):
            raise NothingChanged(
                "net2net: the network is already the one that it should grow out of. Give the stage a "
                "larger network of its own (model: ...), or leave the method out."
            )
        growth.disturb(grown, self.noise)
        run.model.load_state_dict(state)
        self.memory(run).update(told=growth.told(), error=error)

    def finish(self, run: Run) -> list[Change]:
        """How each layer began."""
        before = " before the noise" if self.noise else ""
        note = f"at the start the output differed by {self.memory(run)['error']:.1e}{before}"
        return [
            Change(layer, what, before, after, self.method_name(), note)
            for layer, what, before, after in self.memory(run)["told"]
        ]


class Growth:
    """A larger network that is to compute what a smaller one computes.

    Args:
        small: the smaller network.
        large: the larger one; it stays as it is.
        inputs: an example.
        zero: which new layers answer zero.
        generator: of everything random.

    Attributes:
        theirs: tensors of the smaller network.
        own: tensors of the larger one.
        new: layers that only the larger one has.
        zeros: those that answer zero.
        identities: those that pass their input on.

    Raises:
        ModelMismatch: the larger network is narrower somewhere, lacks a layer, or has a new one that cannot
            pass its input on.
        NothingMatched: ``zero`` covers no new layer.
    """

    def __init__(
        self,
        small: nn.Module,
        large: nn.Module,
        inputs: Any,
        zero: Layers | None,
        generator: torch.Generator,
    ) -> None:
        self.small, self.large, self.generator = small, large, generator
        self.theirs, self.own = named_tensors(small), named_tensors(large)
        if missing := [name for name in self.theirs if name not in self.own]:
            raise ModelMismatch(
                f"net2net: the larger network lacks {', '.join(missing[:5])}, which the smaller one has: it "
                "cannot compute the same. Its layers need the names that they have in the smaller one."
            )
        known = {owner_of(name) for name in self.theirs}
        self.new = [n for n in dict.fromkeys(map(owner_of, self.own)) if n not in known]
        self.zeros, self.identities = _parts(self.new, zero)
        for name in self.identities:
            if why := why_not_identity(large.get_submodule(name)):
                raise _no_identity(name, why)
        self.match = self._match(inputs)

    def _match(self, inputs: Any) -> Match:
        small, large = find_groups(self.small, inputs), find_groups(self.large, inputs)
        self.small_blocks, self.large_blocks = blocks_of(small), blocks_of(large)
        passed_on = [((f"{n}.weight", 1), (f"{n}.weight", 0)) for n in self.identities]
        partner = partners(self.small_blocks, self.large_blocks, passed_on)
        pairs = [(n, small.groups[p], large.groups[n]) for n, p in sorted(partner.items())]
        mapping = {n: _mapping(their, own, self.generator) for n, their, own in pairs}
        return Match(small, large, partner, mapping)

    @torch.no_grad()
    def grown(self, batches: Sequence[Any]) -> nn.Module:
        """A copy of the larger network, filled, in eval mode.

        Raises:
            ModelMismatch: a tensor cannot be filled; it is named.
        """
        network = copy.deepcopy(self.large).eval()
        for name, tensor in named_tensors(network).items():
            layer, leaf = owner_of(name), name.rpartition(".")[2]
            if name in self.theirs:
                tensor.copy_(self._copied(name))
            elif layer not in self.new and leaf != "bias":
                raise ModelMismatch(
                    f"net2net: both networks have {layer}, the smaller one no {leaf}."
                )
            elif layer not in self.new or (layer in self.zeros and leaf in ("weight", "bias")):
                tensor.zero_()
        for name in self.identities:
            module = network.get_submodule(name)
            if not isinstance(module, Norm):
                self._pass_on(name, module)
        self._normalize(network, batches)
        return network

    def check(self, grown: nn.Module, batches: Iterable[Any], tolerance: float) -> float:
        """The largest relative difference of both networks' outputs.

        Raises:
            ModelMismatch: it is above the tolerance; the message names the first layer that differs.
        """
        small, large = exact(self.small), exact(grown)
        largest = 0.0
        for inputs in batches:
            error = relative_error(exact_answer(large, inputs), exact_answer(small, inputs))
            if not error <= tolerance:
                raise self._explained(small, large, inputs, error, tolerance)
            largest = max(largest, error)
        return largest

    @torch.no_grad()
    def disturb(self, network: nn.Module, noise: float) -> None:
        """Add noise to what makes the copies of channels, all but the first of each."""
        tensors = named_tensors(network)
        for number, group in enumerate(self.match.large.groups):
            for member in group.with_role("makes"):
                if noise and member.tensor in self.theirs:
                    known = self.match.small.groups[self.match.partner[number]].channels
                    tensor, copies = tensors[member.tensor], member.index[known:].reshape(-1)
                    rows = torch.from_numpy(copies).to(tensor.device)
                    shape = tensor.index_select(member.dim, rows).shape
                    random = torch.randn(shape, generator=self.generator).to(tensor)
                    tensor.index_add_(member.dim, rows, noise * tensor.std() * random)

    def told(self) -> list[list[Any]]:
        """Layer, what, before and after, of each layer."""
        widths: dict[str, tuple[int, int]] = {}
        for number, their in self.match.partner.items():
            own, other = self.match.large.groups[number], self.match.small.groups[their]
            for layer in own.layers if own.channels > other.channels else ():
                before, after = widths.get(layer, (0, 0))
                widths[layer] = (before + other.channels, after + own.channels)
        return [
            [layer, "channels", *widths[layer]]
            if layer in widths and layer not in self.new
            else [layer, "start", "random", self._start(layer)]
            for layer in dict.fromkeys(map(owner_of, self.own))
        ]

    def _start(self, layer: str) -> str:
        if layer not in self.new:
            return "copied"
        return (
            "zero" if layer in self.zeros else "identity" if layer in self.identities else "random"
        )

    def _copied(self, name: str) -> Tensor:
        """A tensor of the smaller network in the shape of the larger one."""
        value, shape = self.theirs[name], self.own[name].shape
        if value.ndim != len(shape):
            raise ModelMismatch(f"net2net: {name} has {value.ndim} dims, then {len(shape)}.")
        sources, copies = {}, {}
        for dim, (before, after) in enumerate(zip(value.shape, shape, strict=True)):
            here, there = self._blocks(name, dim), self.small_blocks.get((name, dim), [])
            index = lookup(self.match.of_large(after, here), self.match.of_small(before, there))
            if index is None:
                raise self._cannot_widen(name, dim, before, after)
            sources[dim] = index
            if self._sums(name, dim):
                copies[dim] = self.match.copies(after, here)
        return replicated(value, sources, copies)

    def _blocks(self, name: str, dim: int) -> Sequence[Block]:
        return self.large_blocks.get((name, dim), [])

    def _sums(self, name: str, dim: int) -> bool:
        """Whether a layer sums over a dim of its tensor."""
        groups = [self.match.large.groups[number] for number, _ in self._blocks(name, dim)]
        used = (m for group in groups for m in group.with_role("uses"))
        return any((m.tensor, m.dim) == (name, dim) for m in used)

    def _cannot_widen(self, name: str, dim: int, before: int, after: int) -> ModelMismatch:
        why = self.match.large.unprunable.get(f"{name} dim {dim}")
        return ModelMismatch(
            f"net2net: dim {dim} of {name} is {before} in the smaller network and {after} in the larger one, "
            f"and its channels are not copies of the smaller one's{f': {why}' if why else ''}."
        )

    def _pass_on(self, name: str, layer: Any) -> None:
        """Let a new layer answer its input."""
        weight: Tensor = layer.weight
        if layer.bias is not None:
            layer.bias.zero_()
        if (
            weight.shape[1] == 1 and getattr(layer, "groups", 1) > 1
        ):  # depthwise: channel by channel
            each = np.zeros(1, np.int64)
            weight.copy_(cast(Tensor, identity(weight[:1], each, each, each + 1)))
            return
        made, used = (self._blocks(f"{name}.weight", dim) for dim in (0, 1))
        found = identity(
            weight,
            self.match.of_large(weight.shape[0], made),
            self.match.of_large(weight.shape[1], used),
            self.match.copies(weight.shape[1], used),
        )
        if found is None:
            raise _no_identity(name, "what it makes are not the channels that it reads")
        weight.copy_(found)

    def _normalize(self, network: nn.Module, batches: Iterable[Any]) -> None:
        """Let new batch normalizations undo themselves, by the statistics of their input."""
        layers = {name: network.get_submodule(name) for name in self.identities}
        norms = {name: layer for name, layer in layers.items() if isinstance(layer, Norm)}
        for norm in norms.values():  # so that each sees what it will see
            set_statistics(norm, torch.zeros(()), torch.ones(()))
        if norms:
            for name, statistics in input_statistics(network, list(norms), batches).items():
                set_statistics(norms[name], *statistics)

    def _explained(
        self, small: nn.Module, large: nn.Module, inputs: Any, error: float, tolerance: float
    ) -> ModelMismatch:
        where = self._first_difference(small, large, inputs, tolerance)
        new = f" (new layers: {', '.join(self.new[:8])})" if self.new else ""
        return ModelMismatch(
            f"net2net: the larger network would not compute what the smaller one does: relative error "
            f"{error:.1e}, where {tolerance:.0e} is allowed; first in {where}{new}. The network is as it "
            "was. Around a new layer the only non-linearity may be ReLU or its like, and a new residual "
            "block must answer zero (zero: PATTERN)."
        )

    def _first_difference(
        self, small: nn.Module, large: nn.Module, inputs: Any, tolerance: float
    ) -> str:
        """The first layer of both networks whose answer differs, in the order of the larger one's calls."""
        before = {(name, number): answer for name, number, answer in answers(small, inputs)}
        there, here = answers_of(self.match.small), answers_of(self.match.large)
        for name, number, answer in answers(large, inputs):
            place = name, number
            if place in before:
                expected = self._widened(
                    before[place], answer, there.get(place, {}), here.get(place, {})
                )
                if not relative_error([answer], [expected]) <= tolerance:
                    return repr(name)
        return "the output, behind all layers"

    def _widened(self, value: Tensor, like: Tensor, there: DimBlocks, here: DimBlocks) -> Tensor:
        """An answer of the smaller network with the channels of the larger one, as far as they agree."""
        sources = {}
        for dim, blocks in here.items():
            known = self.match.of_small(value.shape[dim], there.get(dim, []))
            index = lookup(self.match.of_large(like.shape[dim], blocks), known)
            if index is not None:
                sources[dim] = index
        return replicated(value, sources, {})


def _no_identity(name: str, why: str) -> ModelMismatch:
    return ModelMismatch(
        f"net2net: the new layer {name!r} cannot pass its input on: {why}. Identities are linear layers, "
        "convolutions that keep the size, and batch normalization; the last layer of a new residual "
        "block may be zero (zero: PATTERN)."
    )


def _parts(new: Sequence[str], zero: Layers | None) -> tuple[list[str], list[str]]:
    """The new layers that answer zero, and those that pass their input on: outside of the former's blocks."""
    zeros = [name for name in new if zero is not None and matches(zero, name)]
    if zero is not None and not zeros:
        raise NothingMatched(
            f"net2net: zero={zero!r} covers none of the new layers: {', '.join(new) or 'there are none'}."
        )
    blocks = {name.rpartition(".")[0] for name in zeros} - {""}
    inside = [n for n in new if any(n.startswith(f"{block}.") for block in blocks)]
    return zeros, [n for n in new if n not in zeros and n not in inside]


def _mapping(small: Group, large: Group, generator: torch.Generator) -> Ints:
    before, after = small.channels, large.channels
    if after < before:
        raise ModelMismatch(
            f"net2net: {large.name!r} has {after} channels, in the smaller network {before}: it has to be as "
            "wide at least."
        )
    if after > before and large.pairwise:
        raise ModelMismatch(
            f"net2net: the channels of {large.name!r} are multiplied with each other (queries with keys), so "
            f"copies of them count twice. Leave its width at {before}."
        )
    if after > before and large.mixed_by:
        if after % before:
            raise ModelMismatch(
                f"net2net: {large.mixed_by[0]} takes a statistic over the channels of {large.name!r}, so "
                f"each must be copied equally often: choose a multiple of {before} instead of {after}."
            )
        return even_mapping(before, after)
    return random_mapping(before, after, generator)
