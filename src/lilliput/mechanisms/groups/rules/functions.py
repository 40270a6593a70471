"""Calls that are met before torch decomposes them.

Two kinds: calls that are given numbers (``view``, ``zeros``, slices), because only here it can be seen
where the numbers come from; and calls whose meaning would be lost (recurrent layers, the scale of
attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..labels import Context, Dim, Dims
from ..trace import Trace
from ..widths import Width, plain

Args: TypeAlias = Sequence[Any]
Kwargs: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[[Trace, Any, Args, Kwargs], Any]
Note: TypeAlias = Callable[[Trace, Any, Args, Kwargs], None]

_HANDLERS: dict[str, Handler] = {}
_TENSOR: Any = Tensor
_SHAPE, _DATA = _TENSOR.shape.__get__, _TENSOR.data.__get__

#: With these a number of the code takes part in arithmetic; everywhere else it must not change.
_ARITHMETIC = frozenset(
    before + name + after
    for name in ("add", "sub", "mul", "div", "pow", "truediv", "rsub", "clamp", "true_divide")
    for before, after in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
)


def call_function(trace: Trace, function: Any, args: Args, kwargs: Kwargs) -> Any:
    """Run a function that the model's code calls, and note what it says about widths."""
    schema = getattr(function, "_schema", None)  # of an operator in an exported graph
    name = getattr(function, "__name__", "") if schema is None else schema.name.split("::")[1]
    handler = _HANDLERS.get(name)
    trace.labels.context = Context(name, trace.module)
    if handler is not None:
        return handler(trace, function, args, kwargs)
    for value in _numbers((*args, *kwargs.values())):
        if name in _ARITHMETIC:
            trace.number(value)
        else:
            trace.require_same(value)
    return function(*args, **kwargs)


def _numbers(values: Iterable[Any]) -> list[Width]:
    """The widths among arguments, those in lists included."""
    found: list[Width] = []
    for value in values:
        if type(value) is Width:
            found.append(value)
        elif type(value) in (list, tuple, torch.Size):
            found += _numbers(value)
    return found


def _handle(*names: str) -> Callable[[Handler], Handler]:
    """Register what is called instead of the functions of these names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            _HANDLERS[name] = handler
        return handler

    return register


def _after(*names: str) -> Callable[[Note], Note]:
    """Register what is called, with the output, after the functions of these names."""

    def register(note: Note) -> Note:
        def handler(trace: Trace, function: Any, args: Args, kwargs: Kwargs) -> Any:
            context = trace.labels.context
            out = function(*args, **kwargs)
            trace.labels.context = context
            note(trace, out, args, kwargs)
            return out

        for name in names:
            _HANDLERS[name] = handler
        return note

    return register


# Reading widths


@_handle("__get__")
def _get(trace: Trace, function: Any, args: Args, kwargs: Kwargs) -> Any:
    result = function(*args, **kwargs)
    if function == _SHAPE:
        return _widths(trace, args[0], result)
    if function == _DATA:  # passes by the dispatcher
        trace.put(result, trace.dims(args[0]), trace.is_static(args[0]))
    return result


@_handle("size", "sym_size")
def _size(trace: Trace, function: Any, args: Args, kwargs: Kwargs) -> Any:
    result = function(*args, **kwargs)
    if isinstance(result, torch.Size):
        return _widths(trace, args[0], result)
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    return _width(trace, trace.dims(args[0])[dim])


@_handle("numel", "nelement", "sym_numel")
def _numel(trace: Trace, function: Any, args: Args, kwargs: Kwargs) -> Any:
    sizes = [_width(trace, dim) for dim in trace.dims(args[0])]
    return sizes[0] if len(sizes) == 1 else math.prod(sizes)


def _widths(trace: Trace, tensor: Tensor, shape: torch.Size) -> torch.Size:
    dims = trace.dims(tensor)
    if not any(trace.labels.is_live(dim) for dim in dims):
        return shape
    return torch.Size([_width(trace, dim) for dim in dims])


def _width(trace: Trace, dim: Dim) -> int:
    return Width.of_dim(trace, dim) if trace.labels.is_live(dim) else len(dim)


# Giving sizes


def _sizes(given: Args, kwargs: Kwargs) -> list[Any]:
    """Sizes given one by one, as one sequence, or by name."""
    if not given:
        given = [kwargs.get("size", kwargs.get("shape", ()))]
    return list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else list(given)


def _require(trace: Trace, sizes: Iterable[Any], dims: Iterable[Dim]) -> None:
    """The code gives the sizes of dims; -1 leaves one to torch."""
    for size, dim in zip(sizes, dims, strict=False):
        if isinstance(size, int) and size != -1:
            trace.require(size, dim)


@_after("view", "reshape", "expand", "broadcast_to", "_unsafe_view")
def _view(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    _require(trace, _sizes(args[1:], kwargs), trace.dims(out))  # a dtype is no size


@_after("unflatten")
def _unflatten(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    if isinstance(dim, int):
        _require(trace, sizes, trace.dims(out)[dim % args[0].dim() :])


@_after("repeat", "tile")
def _repeat(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    times, before, after = _sizes(args[1:], kwargs), trace.dims(args[0]), trace.dims(out)
    grown = len(after) - len(before)
    for k, count in enumerate(times, len(after) - len(times)):
        if k < grown or len(before[k - grown]) == 1:
            trace.require(count, after[k])
        else:
            trace.require_same(count)


@_after("zeros", "ones", "empty", "rand", "randn")
def _made(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    _require(trace, _sizes(args, kwargs), trace.dims(out))


@_after("full")
def _full(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    _require(trace, _sizes(args[:1], kwargs), trace.dims(out))


@_after("new_zeros", "new_ones", "new_empty")
def _new(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    _require(trace, _sizes(args[1:], kwargs), trace.dims(out))


@_after("new_full")
def _new_full(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    _require(trace, _sizes(args[1:2], kwargs), trace.dims(out))


@_after("split", "split_with_sizes", "unsafe_split")
def _split(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    named = [v for k, v in kwargs.items() if k.startswith("split")]
    dim: Any = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    _require(trace, _sizes(args[1:2] or named, {}), [trace.dims(part)[dim] for part in out])


@_after("narrow")
def _narrow(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    names = ("input", "dim", "start", "length")
    x, dim, start, length = (*args, *(kwargs[name] for name in names[len(args) :]))
    if isinstance(start, int):
        edges = (trace.dims(out)[dim], trace.dims(x)[dim][:start])
        _require(trace, (length, start), edges)


@_after("__getitem__", "__setitem__")
def _index(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    parts = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    if any(isinstance(part, slice) for part in parts):
        for part, dim in zip(parts, _indexed(parts, trace.dims(args[0])), strict=True):
            if isinstance(part, slice) and dim is not None:
                _edge(trace, part.start, dim)
                _edge(trace, part.stop, dim)


@_after("slice")
def _slice(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    at: Any = args[1] if len(args) > 1 else 0
    dim = trace.dims(args[0])[at]
    for edge in args[2:4]:
        _edge(trace, edge, dim)


def _indexed(parts: list[Any], dims: Dims) -> list[Dim | None]:
    """The dim that each part of an index applies to."""
    found: list[Dim | None] = []
    k = 0
    for n, part in enumerate(parts):
        if part is Ellipsis:
            k = len(dims) - sum(_consumed(later) for later in parts[n + 1 :])
        count = _consumed(part)
        found.append(dims[k] if count else None)
        k += count
    return found


def _consumed(part: Any) -> int:
    """How many dims a part of an index applies to."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _edge(trace: Trace, edge: Any, dim: Dim) -> None:
    """A slice begins or ends in the middle of a dim."""
    if isinstance(edge, int) and 0 < edge < len(dim):
        trace.require(edge, dim[:edge])
    elif isinstance(edge, int) and -len(dim) < edge < 0:
        trace.require(-edge, dim[int(edge) :])


@_after("pad", "constant_pad_nd")
def _pad(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    amounts = list(args[1] if len(args) > 1 else kwargs["pad"])
    for dim in reversed(trace.dims(out)):
        before, after, *amounts = amounts or (0, 0)
        if before >= 0:
            trace.require(before, dim[:before])
        if after >= 0:
            trace.require(after, dim[len(dim) - after :])


@_after("layer_norm", "rms_norm")
def _layer_norm(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    _require(trace, shape, trace.dims(out)[-len(shape) :])


@_after("group_norm")
def _group_norm(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    _require_groups(trace, args[1] if len(args) > 1 else kwargs["num_groups"], trace.dims(out)[1])


@_after("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    groups: Any = kwargs.get("groups", args[6] if len(args) > 6 else 1)
    if not isinstance(trace.owner, nn.modules.conv._ConvNd):  # surgery sees to theirs
        weight = trace.dims(args[1] if len(args) > 1 else kwargs["weight"])
        _require_groups(trace, groups, trace.dims(args[0])[1 - len(weight)])


def _require_groups(trace: Trace, groups: int, channels: Dim) -> None:
    """One group for each channel follows the channels, any other number of groups stays."""
    if 1 != plain(groups) == len(channels):
        trace.require(groups, channels)
    else:
        trace.require_same(groups)


@_handle("batch_norm")
def _batch_norm(trace: Trace, function: Any, args: Args, kwargs: Kwargs) -> Any:
    """Torch makes an empty tensor beside each batch normalization, which nobody reads: it is left out."""
    if function is not nn.functional.batch_norm or len(args) != 8 or kwargs or args[5]:
        return function(*args, **kwargs)
    x, mean, variance, weight, bias, _, momentum, eps = args
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, momentum, eps)[0]


# Calls whose meaning would be lost


@_after("scaled_dot_product_attention")
def _attention(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    query = args[0] if args else kwargs["query"]
    if kwargs.get("scale") is None:
        trace.labels.mix(trace.dims(query)[-1], "the scale is computed from its width")


@_after("multi_head_attention_forward")
def _multi_head(trace: Trace, out: Any, args: Args, kwargs: Kwargs) -> None:
    """The code takes the width of the heads together from the queries'."""
    embedding, heads = trace.dims(args[0])[-1], int(args[4])
    packed = args[5] if len(args) > 5 else kwargs.get("in_proj_weight")
    if packed is not None:
        trace.labels.equate(trace.dims(packed)[0].reshape(3, -1), embedding[None])
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if kwargs.get(name) is not None:
            trace.labels.equate(trace.dims(kwargs[name])[0], embedding)
    if trace.outer:
        rows = embedding.reshape(heads, -1)
        trace.attributes[f"{trace.module}.num_heads".lstrip(".")] = rows[:, 0]
    else:
        trace.labels.mix(embedding, "the scale is computed from its width")


@_handle("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(trace: Trace, function: Any, args: Args, kwargs: Kwargs) -> Any:
    """A hidden unit is a row of every gate, and a column of the recurrent weight."""
    packed = not isinstance(args[3], bool)
    x, (hidden, weights, _, layers) = args[0], args[2 if packed else 1 :][:4]
    ways = 2 if args[8 if packed else 7] else 1
    states = list(hidden) if isinstance(hidden, list | tuple) else [hidden]
    context = trace.labels.context
    size = len(weights) // (int(layers) * ways)
    stacks = [list(weights[n : n + size]) for n in range(0, len(weights), size)]
    unit, given = _layer(trace, stacks[0], trace.dims(x)[-1])
    for number, stack in enumerate(stacks[1:], 1):  # all layers have equally many units
        below = trace.dims(x)[-1] if number < ways else np.tile(given, ways)
        for mine, other in zip(_layer(trace, stack, below), (unit, given), strict=True):
            trace.labels.equate(mine, other)
    out = x.new_empty([int(n) for n in x.shape[:-1]] + [ways * len(given)])
    finals = [state.new_empty([int(n) for n in state.shape]) for state in states]
    trace.labels.context = context
    trace.put(out, [*trace.dims(x)[:-1], np.tile(given, ways)])
    for state, final, labels in zip(states, finals, (given, unit), strict=False):
        trace.labels.equate(trace.dims(state)[-1], labels)
        trace.put(final, [*trace.dims(state)[:-1], labels])
    return (out, *finals)


def _layer(trace: Trace, tensors: list[Tensor], x: Dim) -> tuple[Dim, Dim]:
    """One layer in one direction: input weight, recurrent weight, perhaps biases and a projection.

    Returns:
        Labels of the hidden units, and of what the layer gives out: the same unless it is projected.
    """
    labels = trace.labels
    projection = trace.dims(tensors[-1]) if len(tensors) in (3, 5) else None
    of_input, of_hidden = trace.dims(tensors[0]), trace.dims(tensors[1])
    width = len(of_hidden[1]) if projection is None else len(projection[1])
    gates = of_input[0].reshape(-1, width)
    labels.equate(gates[:1], gates)
    for tensor in tensors[1:4] if len(tensors) > 3 else tensors[1:2]:
        labels.equate(trace.dims(tensor)[0], of_input[0])
    labels.equate(of_input[1], x)
    unit = gates[0]
    given = unit if projection is None else projection[0]
    labels.equate(of_hidden[1], given)
    if projection is not None:
        labels.equate(projection[1], unit)
    for made, used in (of_input, of_hidden, projection or of_hidden):
        trace.mark(made, "makes")
        trace.mark(used, "uses")
    return unit, given
