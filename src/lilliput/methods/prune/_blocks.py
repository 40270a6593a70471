"""Blocks that only pass their input on once layers inside are zero.

A residual block computes ``relu(x + f(x))``. Where ``f`` no longer depends on the input, it sends a constant,
often what a batch normalization makes of zeros. If that is zero, the block is an identity for the inputs
that really arrive, which are not negative behind a ReLU. If it is not, the block is one as soon as the
constant is silenced, or was brought to a layer in front of it.

The surprising rule: nothing is assumed of how a block is written. It is run on data, and what counts is
whether its output equals its input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.task import answer, evaluation
from ...mechanisms.surgery import outermost, replace, within

# Numbers that differ by less, relative to the largest, are the same.
_SAME = 1e-6

_BIASED = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Block:
    """A module that only passes its input on.

    Attributes:
        name: of the module.
        zero: the layers inside whose zeros make it so.
        silenced: modules inside that must send zeros first; they send the same whatever comes in.
        shift: name of a bias in front -> what to add to it so that nothing must be silenced; at most
            one. Whether it is exact must be tried.
    """

    name: str
    zero: tuple[str, ...]
    silenced: tuple[str, ...] = ()
    shift: dict[str, Tensor] = field(default_factory=dict)

    def fold(self, model: nn.Module) -> None:
        """Add the constant to the bias in front; inside the transaction of the bypass."""
        for name, shift in self.shift.items():
            bias = model.get_parameter(name)
            replace(bias, bias.detach() + shift.to(bias))


@torch.no_grad()
def find_blocks(model: nn.Module, layers: Sequence[str], batches: Sequence[Any]) -> list[Block]:
    """The smallest module around each layer that only passes its input on; the model itself is none.

    Args:
        model: with layers that are zero; it runs in eval mode and stays as it is.
        layers: names of those layers.
        batches: inputs; a batch of a single example says nothing.

    Returns:
        In the order of the forward pass; a layer without such a module is in none of them. Taken away
        in this order, each with its own ``silenced``, they leave the rest of the network as it was
        found.

    Example:
        >>> class Around(nn.Sequential):
        ...     def forward(self, x):
        ...         return torch.relu(x + super().forward(x))
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Around(nn.Linear(4, 4), nn.Linear(4, 4)))
        >>> bool(nn.init.zeros_(net[2][1].weight).any())
        False
        >>> find_blocks(net, ["2.1"], [torch.randn(8, 3)])
        [Block(name='2', zero=('2.1',), silenced=('2.1',), shift={})]
    """
    around = {layer: _around(layer) for layer in layers}
    candidates = {name for names in around.values() for name in names}
    plain = _look(model, candidates, (), batches)
    found = exact = _smallest(around, plain)
    outside, allowed = within(set(exact.values())), candidates
    silenced = {name for name in plain.constant if not outside(name)}
    while silenced:
        found = _smallest(around, _look(model, allowed, silenced, batches))
        needed = set(filter(within(set(found.values())), silenced))
        if needed == silenced:
            break
        silenced, allowed = needed, set(found.values())  # what stays must send what it sends
    else:
        found = exact
    return [_block(model, n, found, silenced, plain) for n in _in_order(plain, found)]


def _around(layer: str) -> list[str]:
    """The modules that hold a layer, from the inside out, without the model."""
    parts = layer.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _smallest(around: dict[str, list[str]], seen: _Seen) -> dict[str, str]:
    """Layer -> the first module around it that passes its input on."""
    passing = seen.passing
    first = {layer: next((n for n in names if n in passing), "") for layer, names in around.items()}
    return {layer: name for layer, name in first.items() if name}


def _in_order(seen: _Seen, found: dict[str, str]) -> list[str]:
    chosen = outermost(found.values())
    return [name for name in seen.same if name in chosen]


def _block(
    model: nn.Module, name: str, found: dict[str, str], silenced: set[str], seen: _Seen
) -> Block:
    inside = within([name])
    silent = tuple(sorted(filter(inside, silenced)))
    return Block(
        name, tuple(filter(inside, found)), silent, _shift(model, name, seen) if silent else {}
    )


def _shift(model: nn.Module, name: str, seen: _Seen) -> dict[str, Tensor]:
    """The bias in front of a block that adds one number a channel to its input, and those numbers."""
    front, added = seen.front[name], seen.added.get(name)
    if added is None or not front:
        return {}
    layer, (shift, scale) = model.get_submodule(front), added
    dim = -1 if isinstance(layer, nn.Linear) else 0
    by_channel = shift.movedim(dim, 0).flatten(1)
    mean = by_channel.mean(1)
    uniform = bool((by_channel - mean[:, None]).abs().max() <= _SAME * scale)
    fits = mean.shape == layer.get_parameter("bias").shape
    return {f"{front}.bias": mean} if uniform and fits else {}


@dataclass
class _Seen:
    """What a look at the running network brought.

    Attributes:
        same: module -> whether it answered what it was given, in every call; in the order of calls.
        varied: those whose input is not the same for all examples.
        steady: any module inside of those -> whether its answer is.
        front: module -> the last layer with a bias that ran before its first call.
        added: module -> what it adds to its input, the same for all examples, with the input's scale.
    """

    same: dict[str, bool] = field(default_factory=dict)
    varied: set[str] = field(default_factory=set)
    steady: dict[str, bool] = field(default_factory=dict)
    front: dict[str, str] = field(default_factory=dict)
    added: dict[str, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    last: str = ""

    @property
    def passing(self) -> set[str]:
        """The modules that only pass their input on."""
        return {name for name, same in self.same.items() if same and name in self.varied}

    @property
    def constant(self) -> set[str]:
        """The modules whose answer does not depend on the input."""
        return {name for name, steady in self.steady.items() if steady}

    def compare(self, name: str, given: Any, output: Any) -> None:
        """Take in one call of a module that may only pass its input on."""
        alike = [isinstance(t, Tensor) and t.is_floating_point() for t in (given, output)]
        if not all(alike) or given.shape != output.shape or not given.numel():
            self.same[name], self.added[name] = False, None
            return
        scale, difference = given.abs().max(), output - given
        close = bool(difference.abs().max() <= _SAME * scale)
        self.same[name] = self.same.get(name, True) and close
        if _varies(given, scale):
            self.varied.add(name)
        if _varies(difference, scale):
            self.added[name] = None
        self.added.setdefault(name, (difference.mean(0), scale))


def _look(
    model: nn.Module, names: Collection[str], silenced: Iterable[str], batches: Sequence[Any]
) -> _Seen:
    """Run the batches, with some modules silenced, and watch others."""
    seen, inside = _Seen(), within(names)
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        for name in silenced:  # before the others, so that they see the zeros
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(_silence).remove)
        for name, module in model.named_modules():
            if isinstance(module, _BIASED) and isinstance(module.bias, nn.Parameter):
                stack.callback(module.register_forward_pre_hook(_noting(name, seen)).remove)
            if inside(name) and "parametrizations" not in name.split("."):  # those make weights
                stack.callback(module.register_forward_hook(_watching(name, seen)).remove)
        for name in names:
            _compare(model.get_submodule(name), name, seen, stack)
        for inputs in batches:
            answer(model, inputs)
    return seen


def _noting(name: str, seen: _Seen) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        seen.last = name

    return hook


def _watching(name: str, seen: _Seen) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensors = [t.float() for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        steady = not any(t.numel() and _varies(t, t.abs().max()) for t in tensors)
        seen.steady[name] = seen.steady.get(name, True) and steady

    return hook


def _compare(module: nn.Module, name: str, seen: _Seen, stack: ExitStack) -> None:
    entered: list[Any] = []

    def enter(module: nn.Module, args: Any, named: Any) -> None:
        seen.front.setdefault(name, seen.last)
        alone = len(args) == 1 and not named and isinstance(args[0], Tensor)
        entered.append(args[0].clone() if alone else None)  # a copy: it may work in place

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        seen.compare(name, entered.pop(), output)

    stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def _silence(module: nn.Module, args: Any, output: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.zeros_like, output)


def _varies(t: Tensor, scale: Tensor) -> bool:
    """Whether it differs between the examples of the batch; NaN does."""
    return not t.ndim or not bool((t - t[:1]).abs().max() <= _SAME * scale)
