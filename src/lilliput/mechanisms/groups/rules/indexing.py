"""Looking up, gathering and scattering by index tensors."""

from __future__ import annotations

from torch import Tensor

from ..labels import Dim, Dims
from .base import Call, Outputs, rule


@rule("embedding")
def embedding(call: Call) -> Outputs:
    """Rows are looked up by number, so they stay; what a row holds is made by the table."""
    table, places = call.dims(0), call.dims(1)
    call.trace.labels.fix(table[0], "its rows are looked up by number")
    call.trace.mark(table[1], "makes")
    return [*places, table[1]]


@rule("_embedding_bag", "embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> Outputs:
    """Rows are looked up by number and summed."""
    table = call.dims(0)
    call.trace.labels.fix(table[0], "its rows are looked up by number")
    call.trace.mark(table[1], "makes")
    return [[call.trace.labels.still(call.out[0].shape[0]), table[1]],
            *(call.still(t) for t in call.out[1:])]  # fmt: skip


@rule("index", "_unsafe_index")
def index(call: Call) -> Outputs:
    """Indexed dims stay; in their place stand the dims of the index tensors."""
    x, given = call.dims(0), call.args[1]
    at = [k for k, part in enumerate(given) if part is not None]
    for k in at:
        call.trace.labels.fix(x[k], "its entries are looked up by number")
    if any(given[k].dtype.is_floating_point or "bool" in str(given[k].dtype) for k in at):
        return call.still(call.out)
    places = _meet(call, [given[k] for k in at])
    adjacent = at == list(range(at[0], at[-1] + 1)) if at else True
    begin = at[0] if at and adjacent else 0
    rest = [dim for k, dim in enumerate(x) if k not in at]
    return [*rest[:begin], *places, *rest[begin:]]


def _meet(call: Call, indices: list[Tensor]) -> Dims:
    """The labels of index tensors broadcast to each other."""
    width = max((t.dim() for t in indices), default=0)
    out: list[Dim | None] = [None] * width
    for tensor in indices:
        dims = call.trace.dims(tensor)
        for k, dim in enumerate(dims, width - len(dims)):
            known = out[k]
            if known is None or len(known) == 1:
                out[k] = dim
            elif len(dim) == len(known):
                call.trace.labels.equate(known, dim)
    return [dim for dim in out if dim is not None]


@rule("index_select")
def index_select(call: Call) -> Outputs:
    """Chosen entries of one dim."""
    x = list(call.dims(0))
    if x:
        at = call.args[1] % len(x)
        call.trace.labels.fix(x[at], "its entries are looked up by number")
        x[at] = call.trace.dims(call.args[2])[0]
    return x


@rule("gather", "take_along_dim")
def gather(call: Call) -> Outputs:
    """Chosen entries, for every place on its own."""
    x, places, labels = call.dims(0), call.dims(2), call.trace.labels
    at = call.args[1] % len(x)
    labels.fix(x[at], "its entries are looked up by number")
    for k, (mine, theirs) in enumerate(zip(x, places, strict=True)):
        if k != at and len(mine) == len(theirs):
            labels.equate(mine, theirs)
        elif k != at:
            labels.fix(mine, "only some of its entries are gathered")
    return list(places)


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill",
      "index_put", "_index_put_impl", "put", "take", "masked_select", "nonzero", "nonzero_static",
      "bincount", "one_hot", "searchsorted", "bucketize", "unique_dim", "_unique2", "histc")  # fmt: skip
def by_number(call: Call) -> Outputs:
    """Everything that takes part stays."""
    why = "entries are addressed by number"
    for tensor in call.tensors:
        for dim in call.trace.dims(tensor):
            call.trace.labels.fix(dim, why)
    if isinstance(call.out, Tensor):
        return call.still(call.out)
    return [call.still(t) if isinstance(t, Tensor) else None for t in call.out]


@rule("slice_scatter")
def slice_scatter(call: Call) -> Outputs:
    """A part is replaced by another tensor."""
    x, part = list(call.dims(0)), call.dims(1)
    at = call.arg(2, 0) % len(x)
    for k, (mine, theirs) in enumerate(zip(x, part, strict=True)):
        call.trace.labels.equate(
            mine[call.arg(3) : call.arg(4) : call.arg(5, 1)] if k == at else mine, theirs
        )
    return x


@rule("select_scatter")
def select_scatter(call: Call) -> Outputs:
    """One entry is replaced by another tensor."""
    x, part = list(call.dims(0)), call.dims(1)
    at = call.args[2] % len(x)
    call.trace.labels.fix(x[at], "one entry of it is replaced")
    for mine, theirs in zip((*x[:at], *x[at + 1 :]), part, strict=True):
        call.trace.labels.equate(mine, theirs)
    return x


@rule("cdist", "_cdist_forward")
def cdist(call: Call) -> Outputs:
    """Distances between vectors."""
    a, b, labels = call.dims(0), call.dims(1), call.trace.labels
    labels.equate(a[-1], b[-1])
    labels.mix(a[-1], "a distance over it")
    return [*a[:-2], a[-2], b[-2]]
