"""What becomes of a layer's output before another layer reads it: normalized, clipped, added, or else.

Integers pay where one layer hands them to the next. A rectifier, a pooling by maxima or a view between two
layers leaves integers what they are; a mean or a sigmoid does not, and needs a quantizer before it. The sums
of residual networks can stay integers, if both summands and the sum have quantizers. One forward pass under
a dispatch mode tells which it is.

The surprising rule: a batch normalization belongs to its layer, for it can be multiplied into it, and the
values that count are those behind it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
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
#: Those of them that take maxima.
_POOLING = {operator for operator in _PASSING if "max_pool" in operator}
#: Those of them after which channels may be elsewhere.
_MOVING = _PASSING - _POOLING - {
    "clone", "detach", "alias", "contiguous", "_to_copy", "dropout", "native_dropout", "feature_dropout",
}  # fmt: skip
_CONVOLUTIONS = nn.modules.conv._ConvNd


@dataclass
class Flow:
    """Where a layer's output goes.

    Attributes:
        norm: the batch normalization that reads it channel by channel, if nothing else does and it
            reads nothing else.
        readers: the layers of the list that read it.
        to_layers: whether nobody else does.
        low: 0 where all of them come behind a rectifier.
        high: 6 where all of them come behind a ReLU6.
        place: the module behind which it is what all readers see; where there is none, the normalization or
            the layer itself.
        limits: to what readers clip what comes from that place, of this layer and of others that share it.
        in_place: whether every channel still is where it was, for all readers.
        calls: of the layer, in one pass.
    """

    norm: str | None = None
    readers: tuple[str, ...] = ()
    to_layers: bool = True
    low: float = math.inf
    high: float = -math.inf
    place: str = ""
    limits: tuple[float, float] = (-math.inf, math.inf)
    in_place: bool = field(default=True, compare=False)
    calls: int = field(default=0, compare=False)


@dataclass
class Flows:
    """Where tensors go that layers make or read.

    Attributes:
        layers: of each layer that was called, in the order of the calls.
        sums: module -> layers that read its output, which is a sum of what a convolution made and of
            something else: the blocks of residual networks.
    """

    layers: dict[str, Flow]
    sums: dict[str, tuple[str, ...]]


class _Way(NamedTuple):
    """What a tensor is: a layer's output, changed only in ways that integers survive."""

    layer: str
    output: Tensor
    low: float = -math.inf
    high: float = math.inf
    normalized: bool = False
    pooled: bool = False
    moved: bool = False


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
        >>> found["0"].readers, found["0"].place, found["2"].to_layers
        (('2',), '1', False)
    """
    layers, shared = tuple(layers), frozenset[str]()
    while True:  # once more, where a normalization turned out to be called twice
        with evaluation(model), _Watch(model, layers, shared) as watch:
            output = answer(model, inputs)
        if not (again := watch.shared_norms()):
            return watch.result(output)
        shared |= again


class _Watch(TorchDispatchMode):
    """Books who reads the outputs of layers. Tensors are told apart by their ids, and kept alive for it."""

    def __init__(self, model: nn.Module, layers: Iterable[str], shared: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.layers, self.shared = model, frozenset(layers), shared
        self.found: dict[str, Flow] = {}
        self._kept: list[Any] = []
        self._handles: list[Any] = []
        self._running: list[str] = []
        self._calls: Counter[str] = Counter()
        self._ways: dict[int, _Way] = {}
        self._sums: set[int] = set()
        self._made: dict[int, list[str]] = {}  # by which modules, the innermost first
        self._met: dict[int, set[str]] = defaultdict(set)  # by which layers
        # What readers of a layer's output see: a tensor, and which modules gave it.
        self._read: dict[str, set[tuple[int, tuple[str, ...]]]] = defaultdict(set)
        self._plain: set[str] = set()  # layers whose output somebody reads as it is

    # -- the forward pass -----------------------------------------------------------------------------

    def __enter__(self) -> _Watch:
        for name, module in self.model.named_modules():
            enter, leave = partial(self._enter, name), partial(self._leave, name)
            enters = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            self._handles.append(enters)
            self._handles.append(module.register_forward_hook(leave))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        self._running.append(name)
        self._calls[name] += 1
        if name in self.layers:
            self._met[id(next(iter((*inputs, *named.values()))))].add(name)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()
        self._kept.append(output)
        if name in self.layers and isinstance(output, Tensor):
            self.found.setdefault(name, Flow())
            self._ways[id(output)] = _Way(name, output)
        self._made.setdefault(id(output), []).append(name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func.overloadpacket.__name__)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        ways = [self._seen(t) for t in tensors if id(t) in self._ways]
        summed = any(id(t) in self._sums for t in tensors)
        output = func(*args, **(kwargs or {}))
        self._kept.append((tensors, output))
        if name.endswith("_"):  # in place: that tensor is another one now
            self._forget(args[0])
        if ways or summed:
            whole = sum(isinstance(output, Tensor) and t.shape == output.shape for t in tensors)
            self._see(name, args, ways, summed, output, whole)
        return output

    def _seen(self, tensor: Tensor) -> tuple[_Way, tuple[int, tuple[str, ...]]]:
        """What a tensor is and where it comes from, before an operator in place makes another one of it."""
        return self._ways[id(tensor)], (id(tensor), tuple(self._made.get(id(tensor), ())))

    def _forget(self, tensor: Tensor) -> None:
        self._ways.pop(id(tensor), None)
        self._made.pop(id(tensor), None)
        self._met.pop(id(tensor), None)
        self._sums.discard(id(tensor))

    # -- who reads what ---------------------------------------------------------------------------------

    def _see(
        self, operator: str, args: Any, ways: list[Any], summed: bool, output: Any, whole: int
    ) -> None:
        outputs = [id(t) for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        within = next((name for name in reversed(self._running) if name in self.layers), None)
        after = None
        if within is None and len(ways) == 1:
            after = self._after(operator, args, ways[0][0])
        if after is not None:
            self._ways |= dict.fromkeys(outputs, after)
            return
        for way, origin in ways:
            self._book(way, origin, within)
        passing = operator in _PASSING or _limits(operator, args) is not None
        added = whole > 1 and self._is_sum(operator, [way for way, _ in ways])
        if within is None and (added or (summed and passing)):
            self._sums |= set(outputs)

    def _is_sum(self, operator: str, ways: list[_Way]) -> bool:
        made = (self.model.get_submodule(way.layer) for way in ways)
        return operator in ("add", "add_") and any(isinstance(m, _CONVOLUTIONS) for m in made)

    def _book(self, way: _Way, origin: tuple[int, tuple[str, ...]], reader: str | None) -> None:
        """A reader of a layer's output: a layer of the list or anything else."""
        flow = self.found[way.layer]
        flow.low, flow.high = min(flow.low, way.low), max(flow.high, way.high)
        flow.in_place = flow.in_place and not way.moved
        self._read[way.layer].add(origin)
        if reader is None:
            flow.to_layers = False
        else:
            flow.readers = (*flow.readers, reader)
        if not way.normalized:
            self._plain.add(way.layer)
            flow.norm = None

    def _after(self, operator: str, args: Any, way: _Way) -> _Way | None:
        """What an operator makes of a layer's output; None where it is more than integers survive."""
        if operator in _PASSING:
            return way._replace(
                pooled=way.pooled or operator in _POOLING, moved=way.moved or operator in _MOVING
            )
        if (limits := _limits(operator, args)) is not None:
            low, high = limits
            return way._replace(
                low=min(max(way.low, low), high), high=max(min(way.high, high), low)
            )
        norm = self._running[-1] if self._running else ""
        fresh = (way.low, way.high, way.normalized) == (-math.inf, math.inf, False)
        flow = self.found[way.layer]
        alone = way.layer not in self._plain and flow.norm is None
        if "batch_norm" in operator and fresh and alone and self._owns(way, norm, args[0]):
            flow.norm = norm
            return way._replace(normalized=True)
        return None

    def _owns(self, way: _Way, name: str, seen: Tensor) -> bool:
        """Whether a normalization multiplies each channel that the layer made by a number of its own."""
        norm: Any = self.model.get_submodule(name)
        if name in self.shared or not _normalizes(norm):
            return False
        if way.pooled and norm.weight is not None and bool((norm.weight < 0).any()):
            return False  # the largest times a negative number is the smallest
        axis = -1 if isinstance(self.model.get_submodule(way.layer), nn.Linear) else 1
        if way.moved:  # where to, only the numbers tell: flattened, transposed, shuffled
            return _same_channels(way.output.movedim(axis, 1), seen)
        return axis % way.output.ndim == 1

    def shared_norms(self) -> frozenset[str]:
        """Normalizations that were taken for a layer's own, and are called more than once."""
        norms = (flow.norm for flow in self.found.values())
        return frozenset(norm for norm in norms if norm is not None and self._calls[norm] > 1)

    # -- the result ---------------------------------------------------------------------------------------

    def result(self, output: Any) -> Flows:
        """What was booked, and that the network's own output has a reader too."""
        for tensor in pytree.tree_leaves(output):
            if id(tensor) in self._ways:
                self._book(*self._seen(tensor), None)
        clipped: dict[str, tuple[float, float]] = {}
        for layer, flow in self.found.items():
            flow.calls = self._calls[layer]
            read = list(self._read[layer])
            own = self._owner(read[0][1]) if len(read) == 1 else None
            flow.place = own or flow.norm or layer
            if own is None:
                low, high = clipped.get(flow.place, (math.inf, -math.inf))
                clipped[flow.place] = min(low, flow.low), max(high, flow.high)
        for flow in self.found.values():
            flow.limits = clipped.get(flow.place, flow.limits)
        owners = {key: self._owner(self._made.get(key, ())) for key in self._sums}
        sums = {
            own: tuple(sorted(self._met[key])) for key, own in owners.items() if own is not None
        }
        return Flows(self.found, dict(sorted(sums.items())))

    def _owner(self, made: Iterable[str]) -> str | None:
        """The innermost module that gave a tensor, and is called only once: behind it stands nothing else."""
        return next((name for name in made if name and self._calls[name] == 1), None)


def _normalizes(module: nn.Module) -> bool:
    """Whether a module is batch normalization by constants, in eval mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def _same_channels(made: Tensor, seen: Tensor) -> bool:
    """Whether the second dims of two tensors hold the same numbers, each in its place."""
    if made.numel() != seen.numel() or made.shape[1] != seen.shape[1]:
        return False
    first, second = (t.double().transpose(0, 1).flatten(1).sum(1) for t in (made, seen))
    return torch.allclose(first, second)


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
