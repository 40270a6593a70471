"""Products that sum over a dim: convolutions, matrix products, attention.

A weight ``makes`` its output dim and ``uses`` the dim it sums over. Where both factors are activations
the sum makes channels pairwise: a queries' channel goes together with the keys' channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..labels import Dim, Dims
from .base import Call, Outputs, rule


@rule("mm", "bmm", "matmul", "mv", "dot", "_int_mm")
def product(call: Call) -> Outputs:
    """Matrix product."""
    return _product(call, call.args[0], call.args[1])


@rule("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation")
def product_with_bias(call: Call) -> Outputs:
    """Matrix product plus a bias, which has one number along each column."""
    out = _product(call, call.args[1], call.args[2])
    bias = call.dims(0)
    for mine, theirs in zip(reversed(bias), reversed(out), strict=False):
        if len(mine) == len(theirs):
            call.trace.labels.equate(mine, theirs)
    return out


@rule("linear")
def linear(call: Call) -> Outputs:
    """Product with a transposed weight."""
    x, weight = call.dims(0), call.dims(1)
    _contract(call, (call.args[0], x[-1]), (call.args[1], weight[-1]))
    if len(weight) == 1:
        return x[:-1]
    _make(call, call.args[1], call.args[0], weight[0])
    if call.arg(2) is not None:
        call.trace.labels.equate(call.dims(2)[0], weight[0])
    return [*x[:-1], weight[0]]


@rule("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(call: Call) -> Outputs:
    """Sum over the input channels of each group; positions stay."""
    x, weight, labels = call.dims(0), call.dims(1), call.trace.labels
    transposed, groups = bool(call.arg(6, False)), int(call.arg(8, 1))
    for dim in (*x[2:], *weight[2:]):
        labels.fix(dim, "a convolution slides over it")
    forms = _transposed_channels if transposed else _channels
    out = forms(call, x[1], weight, groups)
    if call.arg(2) is not None:
        labels.equate(call.dims(2)[0], out)
    return [x[0], out, *(labels.still(size) for size in call.shape[2:])]


def _channels(call: Call, x: Dim, weight: Dims, groups: int) -> Dim:
    """Labels of a convolution's output channels, given those of its input."""
    labels, (made, used) = call.trace.labels, weight[:2]
    if groups == 1:
        _contract(call, (call.args[0], x), (call.args[1], used))
        _make(call, call.args[1], call.args[0], made)
        return made
    if len(used) == 1:  # depthwise: every output channel belongs to one input channel
        labels.equate(made.reshape(groups, -1), x[:, None])
        return made
    _contract_groups(call, x, used, groups)
    rows = made.reshape(groups, -1)
    labels.equate(rows[:1], rows)
    _make(call, call.args[1], call.args[0], made)
    return made


def _transposed_channels(call: Call, x: Dim, weight: Dims, groups: int) -> Dim:
    """The same for a transposed convolution, whose weight is ``(in, out / groups, ...)``."""
    labels, (used, made) = call.trace.labels, weight[:2]
    if groups == 1:
        _contract(call, (call.args[0], x), (call.args[1], used))
        _make(call, call.args[1], call.args[0], made)
        return made
    labels.equate(x, used)
    if groups == len(x) and len(made) == 1:
        return used
    if groups == len(x):  # a multiplier: several output channels of one input channel
        labels.fix(made, "each input channel has its own outputs there")
        return np.repeat(used, len(made))
    call.trace.mark(used, "uses")
    rows = used.reshape(groups, -1)
    labels.equate(rows[:1], rows)
    _make(call, call.args[1], call.args[0], made)
    return np.tile(made, groups)


def _contract_groups(call: Call, x: Dim, used: Dim, groups: int) -> None:
    """Every group sums over its own channels, with the same columns of the weight."""
    call.trace.labels.equate(x.reshape(groups, -1), used[None])
    if call.trace.is_static(call.args[1]):
        call.trace.mark(used, "uses")
    else:
        call.trace.labels.pair(used)


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    "scaled_dot_product_attention",
)
def attention(call: Call) -> Outputs:
    """Queries and keys are contracted, values are averaged over the positions."""
    labels = call.trace.labels
    query, key, value = (call.dims(k) for k in range(3))
    labels.equate(query[-1], key[-1])
    labels.pair(query[-1])
    labels.equate(key[-2], value[-2])
    labels.mix(key[-2], "softmax over it")
    for its in (query, key, value):
        for dim in its[:-2]:
            _note_heads(call, dim)
    for k in range(len(query) - 2):
        labels.equate(key[k], value[k])
        _same_or_shared(call, query[k], key[k])
    out: Dims = [*query[:-1], value[-1]]
    if isinstance(call.out, Tensor):
        return out
    return [out, *(call.still(t) if isinstance(t, Tensor) else None for t in call.out[1:])]


def _same_or_shared(call: Call, query: Dim, key: Dim) -> None:
    """Heads of queries and keys; in grouped-query attention several queries share a key."""
    labels = call.trace.labels
    if len(query) == len(key) or 1 in (len(query), len(key)):
        labels.equate(query, key)
        return
    labels.fix(query, "heads share keys")
    labels.fix(key, "heads share keys")


def _product(call: Call, left: Tensor, right: Tensor) -> Dims:
    """Labels of a (batched) matrix product."""
    a, b = call.trace.dims(left), call.trace.dims(right)
    _contract(call, (left, a[-1]), (right, b[-2] if len(b) > 1 else b[0]))
    batch = _batch(call, a[:-2], b[:-2])
    rows = [a[-2]] if len(a) > 1 else []
    columns = [b[-1]] if len(b) > 1 else []
    for factor, other, dims in ((left, right, rows), (right, left, columns)):
        for dim in dims:
            _make(call, factor, other, dim)
    return [*batch, *rows, *columns]


def _batch(call: Call, a: Dims, b: Dims) -> Dims:
    """The batch dims of two factors, broadcast to each other."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    out = list(longer)
    offset = len(longer) - len(shorter)
    for k, dim in enumerate(shorter, offset):
        _note_heads(call, dim)
        _note_heads(call, out[k])
        if len(out[k]) == len(dim):
            call.trace.labels.equate(out[k], dim)
        elif len(out[k]) == 1:
            out[k] = dim
    return out


def _contract(call: Call, left: tuple[Any, Dim], right: tuple[Any, Dim]) -> None:
    """Sum over two dims that are thereby the same channels."""
    trace = call.trace
    trace.labels.equate(left[1], right[1])
    static = [trace.is_static(tensor) for tensor, _ in (left, right)]
    if static == [False, False]:
        trace.labels.pair(left[1])
    for (_, dim), alone in zip((left, right), static, strict=True):
        if alone and not all(static):
            trace.mark(dim, "uses")


def _make(call: Call, weight: Tensor, other: Tensor, dim: Dim) -> None:
    """Note that the dim of a weight becomes a dim of the product with an activation."""
    if call.trace.is_static(weight) and not call.trace.is_static(other):
        call.trace.mark(dim, "makes")


def _note_heads(call: Call, dim: Dim) -> None:
    """A batch dim of a product that came out of a split: the split made attention heads."""
    if len(dim) and dim[0] < 0:
        call.trace.attention.add(-int(dim[0]))
