"""What becomes of a layer's output before another layer reads it: normalized, clipped, or used otherwise.

Integers pay where one layer hands them to the next. A rectifier, a pooling by maxima or a view between two
layers leaves integers what they are; an addition, a mean or a sigmoid does not, and needs a quantizer of its
own before it. One forward pass under a dispatch mode tells which it is.

The surprising rule: a batch normalization belongs to its layer, for it can be multiplied into it, and the
values that count are those behind it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.task import answer, evaluation

_PASSING = frozenset({
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "flatten",
    "clone", "detach", "alias", "contiguous", "_to_copy", "slice", "select", "expand", "max_pool2d",
    "max_pool2d_with_indices", "max_pool1d", "max_pool3d_with_indices", "mkldnn_max_pool2d", "dropout",
    "_reshape_alias", "native_dropout", "feature_dropout", "split", "chunk", "pixel_shuffle",
    "channel_shuffle",
})  # fmt: skip


@dataclass
class Flow:
    """Where a layer's output goes.

    Attributes:
        norm: the batch normalization that reads it, if nothing else does.
        low: no reader sees a value below this: 0 where all of them come behind a rectifier.
        high: nor above this: 6 where all of them come behind a ReLU6.
        readers: the layers of the list that read it.
        to_layers: whether nobody else does.
    """

    norm: str | None = None
    low: float = math.inf
    high: float = -math.inf
    readers: tuple[str, ...] = ()
    to_layers: bool = True


@dataclass
class Flows:
    """Where tensors go that layers make or read.

    Attributes:
        layers: of each layer that was called, in the order of the calls.
        sums: module -> layers that read its output, which also is a summand of something else: the skip
            connections of residual networks.
    """

    layers: dict[str, Flow]
    sums: dict[str, tuple[str, ...]]


class _Way(NamedTuple):
    """What a tensor is: a layer's output, changed only in ways that integers survive."""

    layer: str
    low: float = -math.inf
    high: float = math.inf
    normalized: bool = False


@torch.no_grad()
def flows(model: nn.Module, layers: Iterable[str], inputs: Any) -> Flows:
    """Follow the outputs of some layers through one forward pass, in eval mode.

    Args:
        model: left as it is.
        layers: names of modules that take one tensor and give one.
        inputs: of the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = flows(net, ["0", "2"], torch.ones(1, 4)).layers
        >>> found["0"].readers, found["0"].low, found["2"].to_layers
        (('2',), 0.0, False)
    """
    with evaluation(model), _Watch(model, layers) as watch:
        output = answer(model, inputs)
    for way in watch.ways(output):
        watch.read(way)
    return Flows(watch.found, watch.sums())


class _Watch(TorchDispatchMode):
    """Books who reads the outputs of layers."""

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, Flow] = {}
        self.model, self.layers = model, frozenset(layers)
        self._ways: dict[
            int, tuple[Tensor, _Way]
        ] = {}  # with the tensor, lest its id is given out twice
        self._running: list[str] = []
        self._plain: set[str] = set()  # layers whose output somebody reads as it is
        self._calls: Counter[str] = Counter()
        self._made: dict[
            int, tuple[Tensor, list[str]]
        ] = {}  # other tensors, and which modules gave them
        self._met: dict[int, set[str]] = defaultdict(set)  # which layers read them
        self._added: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for name, module in self.model.named_modules():
            enter = partial(self._enter, name)
            self._handles += [
                module.register_forward_pre_hook(enter, prepend=True),
                module.register_forward_hook(partial(self._leave, name)),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._running.append(name)
        self._calls[name] += 1
        if name in self.layers and isinstance(inputs[0], Tensor):
            self._met[id(inputs[0])].add(name)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()
        if name in self.layers and isinstance(output, Tensor):
            self.found.setdefault(name, Flow())
            self._put(output, _Way(name))
        elif isinstance(output, Tensor):
            self._made.setdefault(id(output), (output, []))[1].append(name)

    def _put(self, tensor: Tensor, way: _Way) -> None:
        self._ways[id(tensor)] = tensor, way

    def sums(self) -> dict[str, tuple[str, ...]]:
        """See :class:`Flows`; a module that is called several times has no output of its own."""
        found = {}
        for key, (_, modules) in self._made.items():
            own = next((name for name in modules if name and self._calls[name] == 1), None)
            if own is not None and key in self._added and self._met[key]:
                found[own] = tuple(sorted(self._met[key]))
        return found

    def ways(self, values: Any) -> list[_Way]:
        """Which of some tensors come from layers."""
        leaves = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
        return [self._ways[id(t)][1] for t in leaves if id(t) in self._ways]

    def read(self, way: _Way, reader: str | None = None) -> None:
        """Book a reader, a layer of the list or anything else."""
        flow = self.found[way.layer]
        flow.low, flow.high = min(flow.low, way.low), max(flow.high, way.high)
        if reader is None:
            flow.to_layers = False
        else:
            flow.readers = (*flow.readers, reader)
        if not way.normalized:
            self._plain.add(way.layer)
            flow.norm = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        met = self.ways((args, kwargs))
        if func.overloadpacket.__name__ in ("add", "add_"):
            self._added |= {id(t): t for t in args if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.endswith("_"):  # in place: that tensor is another one now
            self._forget(args[0])
        if met:
            self._see(str(func.overloadpacket.__name__), args, met, output)
        return output

    def _forget(self, tensor: Tensor) -> None:
        for known in (self._ways, self._made, self._met, self._added):
            known.pop(id(tensor), None)

    def _see(self, operator: str, args: Any, met: list[_Way], output: Any) -> None:
        within = next((name for name in reversed(self._running) if name in self.layers), None)
        if within is not None:
            for way in met:
                self.read(way, within)
        elif len(met) == 1 and (after := self._after(operator, args, met[0])) is not None:
            for tensor in pytree.tree_leaves(output):
                if isinstance(tensor, Tensor):
                    self._put(tensor, after)
        else:
            for way in met:
                self.read(way)

    def _after(self, operator: str, args: Any, way: _Way) -> _Way | None:
        """What an operator makes of a layer's output; None where it is more than integers survive."""
        if operator in _PASSING:
            return way
        if (limits := _limits(operator, args)) is not None:
            low, high = limits
            return way._replace(
                low=min(max(way.low, low), high), high=max(min(way.high, high), low)
            )
        flow, norm = self.found[way.layer], self._running[-1] if self._running else ""
        fresh = (way.low, way.high, way.normalized) == (-math.inf, math.inf, False)
        owned = isinstance(self.model.get_submodule(norm), nn.modules.batchnorm._BatchNorm)
        if "batch_norm" in operator and fresh and owned and way.layer not in self._plain:
            flow.norm = norm
            return way._replace(normalized=True)
        return None


def _limits(operator: str, args: Any) -> tuple[float, float] | None:
    """To what an operator clips; None for one that does not."""
    name = operator.rstrip("_")
    if name == "relu":
        return 0.0, math.inf
    if name == "hardtanh":
        low, high = (*args[1:], *(-1.0, 1.0)[len(args) - 1 :])[:2]
    elif name in ("clamp", "clamp_min"):
        low, high = (*args[1:], None, None)[:2]
    elif name == "clamp_max":
        low, high = None, args[1]
    else:
        return None
    if not all(isinstance(v, int | float | None) for v in (low, high)):
        return None
    return -math.inf if low is None else low, math.inf if high is None else high
