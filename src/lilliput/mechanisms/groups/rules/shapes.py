"""Operators that rearrange: views, permutations, concatenation, splits, slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..labels import Dim, Dims
from ..trace import Trace
from .base import Call, Outputs, rule

#: A view is followed index by index only up to this many of them; a larger one must stay.
LARGEST = 2**24


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "view_copy",
      "squeeze", "unsqueeze", "squeeze_copy", "unsqueeze_copy", "ravel", "_reshape_copy")  # fmt: skip
def view(call: Call) -> Outputs:
    """Indices keep their order, so dims fall apart into blocks that merge, split or stay."""
    x = call.dims(0)
    out: Dims = []
    for before, after in blocks([len(d) for d in x], call.shape):
        if len(before) == len(after) == 1:
            out.append(x[before[0]])
        else:
            out += _regroup(call.trace, [x[k] for k in before], [call.shape[k] for k in after])
    return out


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dims of one shape become which of another, in pieces as small as possible.

    Example:
        >>> blocks([2, 6, 5], [2, 2, 3, 5])
        [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    found = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = (
            list(range(i, min(i + 1, len(before)))),
            list(range(j, min(j + 1, len(after)))),
        )
        i, j = i + 1, j + 1
        m, n = (before[left[0]] if left else 1), (after[right[0]] if right else 1)
        while m != n:
            if m < n:
                m, left, i = m * before[i], [*left, i], i + 1
            else:
                n, right, j = n * after[j], [*right, j], j + 1
        found.append((left, right))
    return found


def _regroup(trace: Trace, dims: Dims, sizes: list[int]) -> Dims:
    """The labels of one block, whose dims are merged and then split in row-major order."""
    labels = trace.labels
    live = [k for k, dim in enumerate(dims) if len(dim) > 1 and labels.is_live(dim)]
    if not live:
        split = min((int(d[0]) for d in dims if len(d)), default=0)
        return [np.full(n, split) if split < 0 else labels.still(n) for n in sizes]
    carrier = _only_one(trace, dims, live)
    merged = _merge(dims, carrier)
    if merged.size > LARGEST:
        labels.fix(dims[carrier], "too large a view")
        return [labels.still(n) for n in sizes]
    return _split(trace, merged, sizes)


def _only_one(trace: Trace, dims: Dims, live: list[int]) -> int:
    """A merged index can go for one dim only; the others must stay."""
    whole = trace.heads == "whole"
    carrier = live[0] if whole else max(live, key=lambda k: (len(dims[k]), k))
    for k in live:
        if k != carrier:
            trace.labels.fix(dims[k], "it is merged with a dim of more channels")
    return carrier


def _merge(dims: Dims, carrier: int) -> Dim:
    """One label for each index of the merged dim."""
    shape = [len(dim) for dim in dims]
    along = [1] * len(shape)
    along[carrier] = shape[carrier]
    return np.broadcast_to(dims[carrier].reshape(along), shape).reshape(-1)


def _split(trace: Trace, merged: Dim, sizes: list[int]) -> Dims:
    """Labels of the dims into which one dim is split: one of them carries the channels."""
    labels = trace.labels
    if len(sizes) == 1:
        return [merged]
    grid = merged.reshape(sizes)
    varies = [k for k, n in enumerate(sizes) if n > 1 and _varies(grid, k)]
    if not varies:
        labels.fix(merged[:1], "it is split, and every part has the same channel")
        return [labels.still(n) for n in sizes]
    split = 0
    axis = varies[-1]
    if len(varies) > 1:
        trace.splits += 1
        split = trace.splits
        axis = varies[-2] if split in trace.outer else axis
    rows = np.moveaxis(grid, axis, 0).reshape(sizes[axis], -1)
    labels.equate(rows[:, :1], rows)
    still = [np.full(n, -split) if k in varies else labels.still(n) for k, n in enumerate(sizes)]
    return [rows[:, 0].copy() if k == axis else still[k] for k in range(len(sizes))]


def _varies(grid: Any, axis: int) -> bool:
    """Whether labels differ along an axis."""
    lower = np.take(grid, range(grid.shape[axis] - 1), axis)
    upper = np.take(grid, range(1, grid.shape[axis]), axis)
    return bool((lower != upper).any())


@rule("permute", "permute_copy")
def permute(call: Call) -> Outputs:
    """Dims change places."""
    x = call.dims(0)
    return [x[k] for k in call.args[1]]


@rule("transpose", "transpose_copy", "swapaxes", "swapdims")
def transpose(call: Call) -> Outputs:
    """Two dims change places."""
    x, (i, j) = list(call.dims(0)), call.args[1:3]
    x[i], x[j] = x[j], x[i]
    return x


@rule("t", "t_copy", "numpy_T", "adjoint", "mT", "mH")
def matrix_transpose(call: Call) -> Outputs:
    """The last two dims change places."""
    x = call.dims(0)
    return [*x[:-2], *x[-2:][::-1]]


@rule("movedim", "moveaxis")
def movedim(call: Call) -> Outputs:
    """Some dims move, the others keep their order."""
    x = call.dims(0)
    here, there = ([k] if isinstance(k, int) else list(k) for k in call.args[1:3])
    here, there = [k % len(x) for k in here], [k % len(x) for k in there]
    rest = iter(k for k in range(len(x)) if k not in here)
    order = [here[there.index(k)] if k in there else next(rest) for k in range(len(x))]
    return [x[k] for k in order]


@rule("expand", "expand_copy", "broadcast_to")
def expand(call: Call) -> Outputs:
    """A stretched dim takes on the width of whatever it meets."""
    x, labels = call.dims(0), call.trace.labels
    offset = len(call.shape) - len(x)
    return [
        x[k - offset] if k >= offset and len(x[k - offset]) == size else labels.new(size)
        for k, size in enumerate(call.shape)
    ]


@rule("repeat", "tile")
def repeat(call: Call) -> Outputs:
    """A repeated channel has several indices; a repeated single entry takes on any width."""
    x, labels = call.dims(0), call.trace.labels
    x = [labels.still(1)] * (len(call.shape) - len(x)) + list(x)
    return [
        labels.new(size) if len(dim) == 1 != size else np.tile(dim, size // max(len(dim), 1))
        for dim, size in zip(x, call.shape, strict=True)
    ]


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Outputs:
    """The same, entry by entry."""
    x, out = call.dims(0), []
    for dim, size in zip(x, call.shape, strict=False):
        out.append(np.repeat(dim, size // max(len(dim), 1)))
    if len(call.shape) == len(x) and all(len(d) == n for d, n in zip(out, call.shape, strict=True)):
        return out
    for dim in x:
        call.trace.labels.fix(dim, "its entries are repeated")
    return call.still(call.out)


@rule("cat", "concat", "concatenate", "_cat")
def cat(call: Call) -> Outputs:
    """Labels one after the other."""
    tensors = [
        t for t in call.args[0] if t.dim() == call.out.dim()
    ]  # an empty one may have one dim
    xs = [call.trace.dims(t) for t in tensors]
    at = call.arg(1, call.kwargs.get("dim", 0)) % len(xs[0])
    for k, dim in enumerate(xs[0]):
        for x in xs[1:]:
            if k != at:
                call.trace.labels.equate(dim, x[k])
    out = list(xs[0])
    out[at] = np.concatenate([x[at] for x in xs])
    return out


@rule("stack", "hstack", "vstack", "dstack")
def stack(call: Call) -> Outputs:
    """The tensors are alike, and how many there are stays."""
    xs = [call.trace.dims(t) for t in call.tensors]
    at = call.arg(1, call.kwargs.get("dim", 0)) % call.out.dim()
    for x in xs[1:]:
        for mine, theirs in zip(xs[0], x, strict=True):
            call.trace.labels.equate(mine, theirs)
    return [*xs[0][:at], call.trace.labels.still(len(xs)), *xs[0][at:]]


@rule("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "chunk", "tensor_split",
      "unsafe_chunk", "split_copy", "split_with_sizes_copy", "hsplit", "vsplit", "dsplit")  # fmt: skip
def split(call: Call) -> Outputs:
    """Equal parts stay equal: code that asked for equal parts would otherwise cut elsewhere."""
    x = call.dims(0)
    at = call.arg(2, call.kwargs.get("dim", 0)) % len(x)
    outs: list[Dims | None] = []
    begin = 0
    for tensor in call.out:
        part = list(x)
        part[at] = x[at][begin : begin + tensor.shape[at]]
        begin += tensor.shape[at]
        outs.append(part)
    parts = [part[at] for part in outs if part]
    if len({len(part) for part in parts}) == 1:
        for part in parts[1:]:
            call.trace.labels.equate(parts[0], part)
    elif isinstance(call.args[1], int):  # a remainder is left, whose size nobody states
        call.trace.labels.fix(x[at], "it is split into parts of unequal size")
    return outs


@rule("unbind", "unbind_copy")
def unbind(call: Call) -> Outputs:
    """One tensor for each entry of a dim."""
    x = call.dims(0)
    at = call.arg(1, 0) % len(x)
    call.trace.labels.fix(x[at], "its entries are taken apart")
    return [[*x[:at], *x[at + 1 :]] for _ in call.out]


@rule("select", "select_copy")
def select(call: Call) -> Outputs:
    """One entry; those before it could not go without shifting it."""
    x = call.dims(0)
    at, index = call.args[1] % len(x), call.args[2]
    others = x[at][: index + 1] if index >= 0 else x[at][index:]  # removing these would shift it
    call.trace.labels.fix(others, "one entry of it is taken")
    return [*x[:at], *x[at + 1 :]]


@rule("slice", "slice_copy")
def slice_(call: Call) -> Outputs:
    """A part of a dim."""
    x = list(call.dims(0))
    at = call.arg(1, 0) % len(x)
    begin, step = call.arg(2) or 0, call.arg(4, 1)
    if step != 1:
        aligned = begin // step * step if len(x[at]) % step == 0 else begin
        _tie_steps(call.trace, x[at][aligned:], step)
    x[at] = x[at][begin : call.arg(3) : step]
    return x


def _tie_steps(trace: Trace, dim: Dim, step: int) -> None:
    """Every n-th entry remains every n-th entry only if n neighbors go together."""
    whole = len(dim) // step * step
    rows = dim[:whole].reshape(-1, step)
    trace.labels.equate(rows[:, :1], rows)
    trace.labels.fix(dim[whole:], "every n-th entry of it is taken")


@rule("narrow", "narrow_copy")
def narrow(call: Call) -> Outputs:
    """A part of a dim."""
    x = list(call.dims(0))
    at, begin = call.args[1] % len(x), call.args[2]
    x[at] = x[at][begin : begin + call.args[3]]
    return x


@rule("flip", "fliplr", "flipud")
def flip(call: Call) -> Outputs:
    """The other way round."""
    x = list(call.dims(0))
    for k in call.args[1]:
        x[k] = x[k][::-1]
    return x


@rule("roll", "rot90")
def roll(call: Call) -> Outputs:
    """What is rolled depends on how many there are."""
    x, labels = call.dims(0), call.trace.labels
    rolled = {k % len(x) for k in call.arg(2, [])} or set(range(len(x)))
    for k in rolled:
        labels.fix(x[k], "it is rolled")
    return [labels.still(call.shape[k]) if k in rolled else dim for k, dim in enumerate(x)]


@rule("as_strided", "as_strided_copy")
def as_strided(call: Call) -> Outputs:
    """Used by torch to set the memory format; anything else picks entries."""
    x = call.dims(0)
    return x if [len(d) for d in x] == list(call.shape) else irregular(call)


@rule("diagonal", "diag", "diag_embed", "trace")
def irregular(call: Call) -> Outputs:
    """Entries picked by position."""
    for dim in call.dims(0):
        call.trace.labels.fix(dim, "entries are picked from it")
    return call.still(call.out)


@rule("unfold")
def windows(call: Call) -> Outputs:
    """``Tensor.unfold``: windows slide over one dim, their entries form a new last dim."""
    x, labels = list(call.dims(0)), call.trace.labels
    at = call.args[1] % len(x)
    labels.fix(x[at], "windows slide over it")
    x[at] = labels.still(call.shape[at])
    return [*x, labels.still(call.shape[-1])]


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Outputs:
    """Padding of a dim of channels are channels as well, which nothing else has to follow."""
    x, labels = list(call.dims(0)), call.trace.labels
    amounts = call.args[1]
    for k in range(len(amounts) // 2):
        before, after = amounts[2 * k], amounts[2 * k + 1]
        at = len(x) - 1 - k
        if before < 0 or after < 0:
            x[at] = x[at][max(-before, 0) : len(x[at]) - max(-after, 0)]
        if (before, after) != (0, 0) and labels.is_live(x[at]):
            ends = (labels.new(max(before, 0)), labels.new(max(after, 0)))
            x[at] = np.concatenate([ends[0], x[at], ends[1]])
        elif (before, after) != (0, 0):
            x[at] = labels.still(call.shape[at])
    return x


@rule("pixel_shuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(call: Call) -> Outputs:
    """The same offset in every part: ``(parts * channels)`` or ``(channels * parts)``."""
    x, labels = list(call.dims(0)), call.trace.labels
    channels, factor = len(x[-3]) if call.out.dim() < 4 else len(x[1]), call.args[1]
    at = len(x) - 3 if "pixel" in str(labels.context.operator) else 1
    if "pixel" in str(labels.context.operator):
        rows = x[at].reshape(channels // factor**2, -1)
        labels.equate(rows[:, :1], rows)
        for k in (-1, -2):
            labels.fix(x[k], "pixels are shuffled")
        return [*x[:at], rows[:, 0].copy(), *map(labels.still, call.shape[-2:])]
    rows = x[at].reshape(factor, -1)
    labels.equate(rows[:1], rows)
    x[at] = rows.T.reshape(-1)
    return x


@rule("pixel_unshuffle")
def unshuffle(call: Call) -> Outputs:
    """Every channel becomes several."""
    x, labels = list(call.dims(0)), call.trace.labels
    for k in (-1, -2):
        labels.fix(x[k], "pixels are shuffled")
    repeated = np.repeat(x[-3], call.args[1] ** 2)
    return [*x[:-3], repeated, *map(labels.still, call.shape[-2:])]


@rule("im2col")
def im2col(call: Call) -> Outputs:
    """``F.unfold``: every channel becomes its window's entries."""
    x, labels = call.dims(0), call.trace.labels
    for k in (-1, -2):
        labels.fix(x[k], "windows slide over it")
    channels = np.repeat(x[-3], call.shape[-2] // len(x[-3]))
    return [*x[:-3], channels, labels.still(call.shape[-1])]


@rule("col2im")
def col2im(call: Call) -> Outputs:
    """A window's entries become one channel again."""
    x, labels = call.dims(0), call.trace.labels
    rows = x[-2].reshape(call.shape[-3], -1)
    labels.equate(rows[:, :1], rows)
    labels.fix(x[-1], "windows are put together")
    return [*x[:-2], rows[:, 0].copy(), *map(labels.still, call.shape[-2:])]
