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

Handler: TypeAlias = Callable[[Trace, Any, Sequence[Any], dict[str, Any]], Any]

_HANDLERS: dict[str, Handler] = {}
_SHAPE: Any = torch.Tensor.shape
_SHAPE = _SHAPE.__get__


def handler(name: str) -> Handler | None:
    """The handler of a function, by its name."""
    return _HANDLERS.get(name)


def _handle(*names: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        for name in names:
            _HANDLERS[name] = function
        return function

    return register


# Reading widths


@_handle("__get__")
def _get(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    result = function(*args, **kwargs)
    return _widths(trace, args[0], result) if function == _SHAPE else result


@_handle("size")
def _size(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    result = function(*args, **kwargs)
    if isinstance(result, torch.Size):
        return _widths(trace, args[0], result)
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    return _width(trace, trace.dims(args[0])[dim])


@_handle("numel", "nelement")
def _numel(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    result = function(*args, **kwargs)
    sizes = [_width(trace, dim) for dim in trace.dims(args[0])]
    return sizes[0] if len(sizes) == 1 else math.prod(sizes) if sizes else result


def _widths(trace: Trace, tensor: Tensor, shape: torch.Size) -> torch.Size:
    dims = trace.dims(tensor)
    if not any(trace.labels.is_live(dim) for dim in dims):
        return shape
    return torch.Size([_width(trace, dim) for dim in dims])


def _width(trace: Trace, dim: Dim) -> int:
    return Width.of_dim(trace, dim) if trace.labels.is_live(dim) else len(dim)


# Giving sizes


def _context(trace: Trace, name: str) -> None:
    trace.labels.context = Context(name, trace.module)


def _sizes(arguments: Sequence[Any]) -> list[Any]:
    """Sizes given one by one or as one sequence."""
    if len(arguments) == 1 and isinstance(arguments[0], list | tuple):
        return list(arguments[0])
    return list(arguments)


def _require(trace: Trace, name: str, sizes: Iterable[Any], dims: Iterable[Dim]) -> None:
    """The code gives the sizes of dims; -1 leaves one to torch."""
    _context(trace, name)
    for size, dim in zip(sizes, dims, strict=False):
        if isinstance(size, int) and size != -1:
            trace.require(size, dim)


@_handle("view", "reshape", "expand", "broadcast_to", "_unsafe_view")
def _view(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    sizes = _sizes(args[1:]) or list(kwargs.get("shape", kwargs.get("size", ())))
    if not (sizes and isinstance(sizes[0], torch.dtype)):
        _require(trace, function.__name__, sizes, trace.dims(out))
    return out


@_handle("unflatten")
def _unflatten(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    if isinstance(dim, int):
        _require(trace, "unflatten", sizes, trace.dims(out)[dim % args[0].dim() :])
    return out


@_handle("repeat", "tile")
def _repeat(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    times, before, after = _sizes(args[1:]), trace.dims(args[0]), trace.dims(out)
    grown = len(after) - len(before)
    _context(trace, "repeat")
    for k, count in enumerate(times, len(after) - len(times)):
        if k < grown or len(before[k - grown]) == 1:
            trace.require(count, after[k])
        elif trace.own(count):
            trace.require(count, trace.labels.still(int(count)))
    return out


@_handle("zeros", "ones", "empty", "rand", "randn", "full")
def _factory(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    given = args[:1] if function.__name__ == "full" else args
    sizes = _sizes(given) if given else list(kwargs.get("size", ()))
    _require(trace, function.__name__, sizes, trace.dims(out))
    return out


@_handle("new_zeros", "new_ones", "new_empty", "new_full")
def _new(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    given = args[1:2] if function.__name__ == "new_full" else args[1:]
    sizes = _sizes(given) if given else list(kwargs.get("size", ()))
    _require(trace, function.__name__, sizes, trace.dims(out))
    return out


@_handle("arange", "linspace", "eye", "randperm", "one_hot", "tril_indices", "triu_indices")
def _counted(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    _context(trace, function.__name__)
    for value in args:
        if trace.own(value):
            trace.require(value, trace.labels.still(int(value)))
    return function(*args, **kwargs)


@_handle("split", "split_with_sizes", "unsafe_split")
def _split(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    outs = function(*args, **kwargs)
    given = [args[1]] if len(args) > 1 else [v for k, v in kwargs.items() if k.startswith("split")]
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    sizes = _sizes(given)
    _require(trace, "split", sizes, [trace.dims(out)[dim] for out in outs])
    return outs


@_handle("narrow")
def _narrow(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    names = ("input", "dim", "start", "length")
    _, dim, start, length = (*args, *(kwargs[name] for name in names[len(args) :]))
    if isinstance(start, int):
        _require(trace, "narrow", (length,), [trace.dims(out)[dim]])
        _require(trace, "narrow", (start,), [trace.dims(args[0])[dim][:start]])
    return out


@_handle("__getitem__")
def _getitem(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    _slices(trace, args[0], args[1])
    return out


@_handle("__setitem__")
def _setitem(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    _slices(trace, args[0], args[1])
    return out


def _slices(trace: Trace, tensor: Tensor, index: Any) -> None:
    """Begin and end of slices follow the dims that they cut."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(isinstance(part, slice) and (part.start, part.stop) != (None, None) for part in parts):
        return
    _context(trace, "slice")
    dims = trace.dims(tensor)
    for part, dim in zip(parts, _indexed(parts, dims), strict=True):
        if isinstance(part, slice) and dim is not None:
            for edge in (part.start, part.stop):
                _edge(trace, edge, dim)


def _indexed(parts: list[Any], dims: Dims) -> list[Dim | None]:
    """The dim that each part of an index applies to."""
    found: list[Dim | None] = []
    k = 0
    for n, part in enumerate(parts):
        if part is Ellipsis:
            later = [p for p in parts[n + 1 :] if p is not None]
            k = len(dims) - sum(_consumed(p) for p in later)
        found.append(None if part is None or part is Ellipsis else dims[k])
        k += 0 if part is None or part is Ellipsis else _consumed(part)
    return found


def _consumed(part: Any) -> int:
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _edge(trace: Trace, edge: Any, dim: Dim) -> None:
    if isinstance(edge, int) and 0 < edge < len(dim):
        trace.require(edge, dim[:edge])
    elif isinstance(edge, int) and -len(dim) < edge < 0:
        trace.require(-edge, dim[edge:])


@_handle("pad")
def _pad(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    amounts = args[1] if len(args) > 1 else kwargs["pad"]
    _context(trace, "pad")
    for k, dim in enumerate(reversed(trace.dims(out)[-(len(amounts) // 2) :] if amounts else [])):
        before, after = amounts[2 * k : 2 * k + 2]
        if before > 0:
            trace.require(before, dim[:before])
        if after > 0:
            trace.require(after, dim[len(dim) - after :])
    return out


@_handle("layer_norm", "rms_norm")
def _layer_norm(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    _require(trace, "layer_norm", shape, trace.dims(args[0])[-len(shape) :])
    return out


@_handle("group_norm")
def _group_norm(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    groups, channels = args[1], trace.dims(args[0])[1]
    target = channels if plain(groups) == len(channels) else trace.labels.still(int(groups))
    _require(trace, "group_norm", [groups], [target])
    return out


@_handle("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
    if isinstance(trace.owner, nn.modules.conv._ConvNd) or plain(groups) == 1:  # surgery sees to it
        return out
    channels = trace.dims(args[0])[-1 - (out.dim() - 2) if out.dim() > 2 else 1]
    target = channels if plain(groups) == len(channels) else trace.labels.still(int(groups))
    _require(trace, function.__name__, [groups], [target])
    return out


# Calls whose meaning would be lost


@_handle("scaled_dot_product_attention")
def _attention(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = function(*args, **kwargs)
    query = args[0] if args else kwargs["query"]
    if kwargs.get("scale") is None:
        _context(trace, "scaled_dot_product_attention")
        trace.labels.mix(trace.dims(query)[-1], "the scale is computed from its width")
    return out


@_handle("multi_head_attention_forward")
def _multi_head(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The code takes the width of the heads together from the queries'."""
    out = function(*args, **kwargs)
    _context(trace, "multi_head_attention_forward")
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
    return out


@_handle("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(trace: Trace, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A hidden unit is a row of every gate, and a column of the recurrent weight."""
    packed = not isinstance(args[3], bool)
    x, hidden, weights, biases, layers = args[0], *args[2 if packed else 1 :][:4]
    two_ways = bool(args[8] if packed else args[7])
    states = list(hidden) if isinstance(hidden, list | tuple) else [hidden]
    _context(trace, function.__name__)
    unit, given = _hidden_units(trace, list(weights), bool(biases), trace.dims(x)[-1], two_ways)
    ways = 2 if two_ways else 1
    out = x.new_empty(*(int(n) for n in x.shape[:-1]), ways * len(given))
    trace.put(out, [*trace.dims(x)[:-1], np.tile(given, ways)])
    finals = [state.new_empty([int(n) for n in state.shape]) for state in states]
    for state, final, labels in zip(states, finals, (given, unit), strict=False):
        trace.labels.equate(trace.dims(state)[-1], labels)
        trace.put(final, [*trace.dims(state)[:-1], labels])
    return (out, *finals)


def _hidden_units(
    trace: Trace, weights: list[Tensor], biases: bool, x: Dim, two_ways: bool
) -> tuple[Dim, Dim]:
    """Equate everything that belongs to a hidden unit; all layers have equally many.

    Returns:
        Labels of the hidden units, and of what a layer gives out: the same, unless it is projected.
    """
    step = _tensors_a_layer(trace, weights, biases)
    unit, given = _one_layer(trace, weights[:step], x)
    ways = 2 if two_ways else 1
    for number in range(step, len(weights), step):
        first_layer = number // step < ways
        below = x if first_layer else np.tile(given, ways)
        mine, out = _one_layer(trace, weights[number : number + step], below)
        trace.labels.equate(unit, mine)
        trace.labels.equate(given, out)
    return unit, given


def _tensors_a_layer(trace: Trace, weights: list[Tensor], biases: bool) -> int:
    """Input weight, recurrent weight, two biases, projection."""
    plain_count = 4 if biases else 2
    projected = len(weights) > plain_count and weights[plain_count].shape[0] != weights[0].shape[0]
    alone = len(weights) == plain_count + 1
    return plain_count + int(projected or alone)


def _one_layer(trace: Trace, weights: list[Tensor], x: Dim) -> tuple[Dim, Dim]:
    matrices = [t for t in weights if t.dim() == 2]
    from_input, from_hidden = (trace.dims(t) for t in matrices[:2])
    labels = trace.labels
    projected = trace.dims(matrices[2]) if len(matrices) > 2 else None
    gates = 1 if projected is None else 4
    width = len(from_hidden[1]) if projected is None else len(projected[1])
    gates = len(from_hidden[0]) // width
    rows = from_input[0].reshape(gates, -1)
    labels.equate(rows[:1], rows)
    for tensor in weights[1:]:
        if len(trace.dims(tensor)[0]) == len(from_input[0]) and tensor is not matrices[-1]:
            labels.equate(trace.dims(tensor)[0], from_input[0])
    labels.equate(from_hidden[0], from_input[0])
    labels.equate(from_input[1], x)
    unit = rows[0]
    given = unit if projected is None else projected[0]
    labels.equate(from_hidden[1], given)
    if projected is not None:
        labels.equate(projected[1], unit)
        trace.mark(projected[0], "makes")
        trace.mark(projected[1], "uses")
    for dims in (from_input, from_hidden):
        trace.mark(dims[0], "makes")
        trace.mark(dims[1], "uses")
    return unit, given
