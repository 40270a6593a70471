"""What removed channels always send, moved to where it still arrives.

A channel can be constant without being zero: batch normalization adds its shift to whatever a dead
filter gives, and ReLU passes it on. Cut away, the constant would be missing in the next layer. It is added
to that layer's bias instead, or, if the layer has none, taken off the running mean of the batch normalization
that directly follows.

The surprising rule: in front of a convolution that pads with zeros the constant does not reach the border,
so there folding is only right inside. It is done all the same, and said.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.task import answer, evaluation
from .groups.classes import Groups, Removal, Site
from .surgery import replace

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SAME = 1e-6


@dataclass(frozen=True)
class Folding:
    """What is to be added to which tensors of the thin network.

    Attributes:
        shifts: name of a bias or running mean -> what is added to it, as wide as it will be.
        folded: the same name -> how many channels it makes up for.
        notes: layer -> where the result is approximate, or why nothing was folded there.
    """

    shifts: Mapping[str, Tensor]
    folded: Mapping[str, int]
    notes: Mapping[str, str]

    def apply(self, model: nn.Module) -> None:
        """Do it; inside the transaction of the cut, see ``edit`` of :func:`.surgery.cut`."""
        for name, shift in self.shifts.items():
            target = _tensor(model, name)
            replace(target, target.detach() + shift.to(target))


@torch.no_grad()
def fold_constants(
    model: nn.Module, groups: Groups, removal: Removal, batches: Iterable[Any]
) -> Folding:
    """Find the constants that the removed channels send to the layers that use them.

    Args:
        model: before the cut; it runs in eval mode and stays as it is.
        groups: of the model.
        removal: group number -> channels that will go.
        batches: inputs; a channel that is the same at every place of every example is constant.

    Returns:
        What to add, in the thin network, to make up for them. Exact for linear layers and for
        convolutions without zero padding.
    """
    sites = [
        (site, gone) for number, gone in removal.items() for site in _uses(model, groups, number)
    ]
    seen = _observe(model, [site for site, _ in sites], batches)
    found = _Found(model, groups, removal, seen)
    for number, (site, gone) in enumerate(sites):
        if seen.values[number] > 1:  # a single value is always the same
            found.add(site, _constants(*seen.ranges[number], site.index[gone].ravel()))
    return Folding(found.shifts, found.folded, found.notes)


def shift_of(layer: Any, constants: Tensor) -> Tensor:
    """What constant input channels add to each output of a linear or convolution layer.

    Args:
        layer: the layer, grouped or not; its padding is not looked at.
        constants: the value of each input channel, ``(inputs,)``.

    Returns:
        Shape ``(outputs,)``.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> torch.equal(shift_of(layer, torch.tensor([0.0, 2.0])), 2 * layer.weight[:, 1])
        True
    """
    weight = layer.weight.detach()
    sums = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    parts = getattr(layer, "groups", 1)
    by_part: Tensor = sums.view(parts, -1, sums.shape[1]) @ constants.to(sums).view(parts, -1, 1)
    return by_part.flatten()


@dataclass
class _Seen:
    """What a look at the running network brought.

    Attributes:
        ranges: number of a site -> smallest and largest value at each index.
        values: how many values each of them comes from.
        norms: layer -> the batch normalizations that read its output as it is.
        calls: layer -> calls in one forward pass.
    """

    ranges: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    values: Counter[int] = field(default_factory=Counter)
    norms: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class _Found:
    """Shifts as they add up over the channels of all groups."""

    model: nn.Module
    groups: Groups
    removal: Removal
    seen: _Seen
    shifts: dict[str, Tensor] = field(default_factory=dict)
    folded: Counter[str] = field(default_factory=Counter)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, site: Site, constants: dict[int, float]) -> None:
        """Fold what one layer would miss: input index -> its constant, none of them zero."""
        if not constants:
            return
        layer: Any = self.model.get_submodule(site.module)
        target, sign = self._target(site.module, layer)
        if not target:
            self.notes[site.module] = (
                f"{len(constants)} constants not folded: no bias, and no running mean behind it"
            )
            return
        if _pads_with_zeros(layer):
            self.notes[site.module] = "constants folded; approximate at the zero-padded border"
        width = layer.weight.shape[1] * getattr(layer, "groups", 1)
        values = layer.weight.detach().new_zeros(width)
        values[list(constants)] = values.new_tensor(list(constants.values()))
        shift = sign * shift_of(layer, values)[self._stays(target)]
        self.shifts[target] = self.shifts[target] + shift if target in self.shifts else shift
        self.folded[target] += len(constants)

    def _target(self, name: str, layer: Any) -> tuple[str, float]:
        """The bias, or the running mean from which the sum is taken; a name and a sign."""
        if self.seen.calls[name] != 1:
            return "", 0.0  # one bias cannot serve several inputs
        if layer.bias is not None:
            return f"{name}.bias", 1.0
        norms = self.seen.norms[name]
        return (f"{next(iter(norms))}.running_mean", -1.0) if len(norms) == 1 else ("", 0.0)

    def _stays(self, target: str) -> Tensor:
        """Which entries of a bias or mean the cut leaves."""
        stays = torch.ones(len(_tensor(self.model, target)), dtype=torch.bool)
        for number, gone in self.removal.items():
            for member in self.groups.groups[number].members:
                if member.tensor == target:
                    stays[torch.from_numpy(member.index[gone].ravel())] = False
        return stays


def _uses(model: nn.Module, groups: Groups, number: int) -> Iterator[Site]:
    """The inputs of linear and convolution layers that the channels of a group reach."""
    group = groups.groups[number]
    layers = {member.layer for member in group.with_role("uses")}
    for site in group.sites:
        known = isinstance(model.get_submodule(site.module), _LAYERS)
        if site.side == "input" and site.module in layers and known:
            yield site


def _observe(model: nn.Module, sites: list[Site], batches: Iterable[Any]) -> _Seen:
    """Run the batches; note the range of each channel at each site, and who follows whom."""
    seen, outputs = _Seen(), dict[str, Tensor]()
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, site in enumerate(sites):
        numbers[site.module].append(number)

    def layer_hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = output
            seen.calls[name] += 1
            for number in numbers[name]:
                _widen(seen, number, args[0], sites[number].dim)

        return hook

    def norm_hook(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            for layer, output in outputs.items():
                if args[0] is output:
                    seen.norms[layer].add(name)

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        for name in numbers:
            handle = model.get_submodule(name).register_forward_hook(layer_hook(name))
            stack.callback(handle.remove)
        for name, module in model.named_modules():
            if getattr(module, "running_mean", None) is not None:
                handle = module.register_forward_pre_hook(norm_hook(name))
                stack.callback(handle.remove)
        for inputs in batches:
            seen.calls.clear()
            answer(model, inputs)
    return seen


def _widen(seen: _Seen, number: int, activation: Tensor, dim: int) -> None:
    values = activation.movedim(dim, 0).flatten(1)
    low, high = seen.ranges.get(number, (values[:, 0], values[:, 0]))
    seen.ranges[number] = torch.minimum(low, values.amin(1)), torch.maximum(high, values.amax(1))
    seen.values[number] += values.shape[1]


def _constants(lowest: Tensor, highest: Tensor, index: np.ndarray) -> dict[int, float]:
    """Input index -> value, of those that never vary and are not zero."""
    low, high = (t.double().cpu().numpy()[index] for t in (lowest, highest))
    constant = (high - low <= _SAME * np.maximum(1.0, np.abs(high))) & (low != 0)
    return dict(zip(index[constant].tolist(), low[constant].tolist(), strict=True))


def _pads_with_zeros(layer: Any) -> bool:
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _tensor(model: nn.Module, name: str) -> Tensor:
    layer, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(layer), leaf)
    return tensor
