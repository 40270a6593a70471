"""Operators that treat every element alike, reductions, and tensors that are made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..labels import Dim, Dims
from .base import Call, Outputs, rule


@rule(
    "pointwise", "clone", "detach", "alias", "contiguous", "_to_copy", "to", "lift_fresh",
    "lift_fresh_copy", "lift", "bernoulli", "dropout", "native_dropout", "feature_dropout",
    "alpha_dropout", "_conj", "resolve_conj", "resolve_neg", "normal", "uniform", "random",
    "exponential", "fill", "zero", "masked_fill", "where", "rrelu_with_noise", "log_sigmoid_forward",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "quantize_per_tensor", "dequantize", "fake_quantize_per_tensor_affine", "isin", "nan_to_num",
    "hardswish", "rrelu", "floor_divide", "polar", "complex", "real", "imag", "__and__", "__or__",
    "__xor__", "_prelu_kernel", "mse_loss", "copy", "type_as", "frexp", "masked_scatter",
)  # fmt: skip
def broadcast(call: Call) -> Outputs:
    """Labels of operands that meet are equated; a dim of size 1 that is stretched says nothing."""
    if isinstance(call.out, Tensor):
        return _broadcast(call, call.tensors, call.shape)
    return [_broadcast(call, call.tensors, t.shape) for t in call.out]


def _broadcast(call: Call, tensors: Sequence[Tensor], shape: Sequence[int]) -> Dims:
    labels = call.trace.labels
    found: list[Dim | None] = [None] * len(shape)
    for tensor in tensors:
        dims = call.trace.dims(tensor)
        for k, mine in enumerate(dims, len(shape) - len(dims)):
            if k < 0 or len(mine) != shape[k]:
                continue
            theirs = found[k]
            if theirs is None:
                found[k] = mine
            elif theirs is not mine:
                labels.equate(theirs, mine)
    return [labels.still(n) if dim is None else dim for dim, n in zip(found, shape, strict=True)]


@rule("_local_scalar_dense", "equal", "is_same_size", "_assert_async", "_assert_scalar")
def nothing(call: Call) -> Outputs:
    """No tensor comes out, and widths play no part."""
    return []


@rule("_assert_tensor_metadata", "_has_compatible_shallow_copy_type", "record_stream")
def ignored(call: Call) -> Outputs:
    """Says nothing about widths."""
    return []


@rule(
    "mean", "sum", "nansum", "amax", "amin", "aminmax", "max", "min", "var", "std", "var_mean",
    "std_mean", "logsumexp", "prod", "any", "all", "count_nonzero",
    "median", "nanmedian", "mode",
)  # fmt: skip
def reduction(call: Call) -> Outputs:
    """What is left of a statistic over channels depends on how many there are."""
    if len(call.tensors) > 1:  # max and min of two tensors
        return broadcast(call)
    x = call.dims(0)
    first = call.out if isinstance(call.out, Tensor) else call.out[0]
    reduced = _reduced_dims(call, len(x), first.dim())
    for k in reduced:
        call.trace.labels.mix(x[k], "a statistic over it")
    keeps = first.dim() == len(x)
    still = call.trace.labels.still(1)
    out = [still if k in reduced else x[k] for k in range(len(x)) if keeps or k not in reduced]
    return out if isinstance(call.out, Tensor) else [out] * len(call.out)


def _reduced_dims(call: Call, ndim: int, left: int) -> set[int]:
    """The dims over which a reduction runs."""
    given = call.kwargs.get("dim")
    if given is None:
        given = next((a for a in call.args[1:] if _is_dims(a)), None)
    if given is None or given == []:
        return set(range(ndim))
    dims = [given] if isinstance(given, int) else given
    return {int(d) % max(ndim, 1) for d in dims}


def _is_dims(argument: Any) -> bool:
    """Whether an argument can be the dim or dims of a reduction; a norm's order is a scalar before."""
    if isinstance(argument, list | tuple):
        return True
    return isinstance(argument, int) and not isinstance(argument, bool)


@rule("norm", "linalg_vector_norm")
def norm(call: Call) -> Outputs:
    """The order of a norm comes before its dims."""
    inner = Call(call.trace, (call.args[0], *call.args[2:]), call.kwargs, call.out)
    return reduction(inner)


@rule("argmax", "argmin", "argsort", "sort", "kthvalue", "multinomial", "msort")
def ordering(call: Call) -> Outputs:
    """A position along the channels is part of the result."""
    return _position(call, "it is put in order")


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "diff")
def running(call: Call) -> Outputs:
    """Cumulative operators."""
    return _position(call, "each entry depends on those before it")


def _position(call: Call, why: str) -> Outputs:
    """The dim whose order matters stays; the others pass through."""
    x, labels = call.dims(0), call.trace.labels
    outs = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    given = call.kwargs.get("dim", next((a for a in call.args[1:] if _is_dims(a)), None))
    if given is None or outs[0].dim() != len(x):
        return _all_stay(call, why)
    at = given % len(x)
    labels.fix(x[at], why)
    result = [[*x[:at], labels.still(t.shape[at]), *x[at + 1 :]] for t in outs]
    return result[0] if isinstance(call.out, Tensor) else list(result)


@rule("tril", "triu", "topk")
def chosen(call: Call) -> Outputs:
    """Entries chosen by position or size."""
    return _all_stay(call, "entries are chosen by position")


def _all_stay(call: Call, why: str) -> Outputs:
    for dim in call.dims(0):
        call.trace.labels.fix(dim, why)
    outs = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    result = [call.still(t) for t in outs]
    return result[0] if isinstance(call.out, Tensor) else list(result)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "softmin")
def softmax(call: Call) -> Outputs:
    """Probabilities over channels depend on how many there are."""
    x = call.dims(0)
    call.trace.labels.mix(x[call.arg(1, -1)], "softmax over it")
    return list(x)


@rule(
    "zeros", "ones", "empty", "full", "rand", "randn", "empty_strided", "empty_memory_format",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided",
)  # fmt: skip
def made(call: Call) -> Outputs:
    """A tensor of given sizes whose entries are alike: it takes on the width of whatever it meets."""
    return call.trace.fresh(call.shape)


@rule(
    "arange", "linspace", "logspace", "eye", "randperm", "randint", "scalar_tensor", "tril_indices",
    "triu_indices", "hann_window", "_tensor_constant", "range", "vander",
)  # fmt: skip
def sequence(call: Call) -> Outputs:
    """Entries differ by position, so the dims stay."""
    return call.still(call.out)


@rule("meshgrid", "broadcast_tensors")
def grid(call: Call) -> Outputs:
    """Coordinates of a grid."""
    for tensor in call.tensors:
        for dim in call.trace.dims(tensor):
            call.trace.labels.fix(dim, "it becomes a grid")
    return [call.still(t) for t in call.out]


@rule("glu")
def glu(call: Call) -> Outputs:
    """One half gates the other."""
    x = list(call.dims(0))
    dim = call.arg(1, -1) % len(x)
    half = len(x[dim]) // 2
    call.trace.labels.equate(x[dim][:half], x[dim][half:])
    x[dim] = x[dim][:half]
    return x


@rule("view_as_real", "view_as_complex")
def complex_view(call: Call) -> Outputs:
    """A last dim of two appears or disappears."""
    x = call.dims(0)
    pair = call.trace.labels.still(2)
    if call.out.dim() > len(x):
        return [*x, pair]
    call.trace.labels.fix(x[-1], "real and imaginary part")
    return x[:-1]
