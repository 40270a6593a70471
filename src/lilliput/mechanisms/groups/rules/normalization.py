"""Normalizations: a number along each channel, and perhaps a statistic over all of them."""

from __future__ import annotations

from torch import Tensor

from ..labels import Dim
from .base import Call, Outputs, rule


def _along(call: Call, position: int, dim: Dim) -> None:
    """A vector argument that holds one number a channel."""
    if isinstance(call.arg(position), Tensor):
        call.trace.labels.equate(call.dims(position)[0], dim)


def _with_statistics(call: Call) -> Outputs:
    """The input's labels for the result; what is returned beside it stays."""
    x = list(call.dims(0))
    if isinstance(call.out, Tensor):
        return x
    return [x, *(call.still(t) for t in call.out[1:])]


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "batch_norm", "_batch_norm_no_update", "_batch_norm_with_update",
    "instance_norm", "miopen_batch_norm",
)  # fmt: skip
def batch_norm(call: Call) -> Outputs:
    """One number along each channel; statistics are per channel."""
    x = call.dims(0)
    for position in range(1, 5):
        _along(call, position, x[1])
    if not isinstance(call.arg(3), Tensor) or call.arg(5) is True:  # statistics of the batch itself
        for dim in (x[0], *x[2:]):
            call.trace.labels.mix(dim, "batch statistics over it")
    return _with_statistics(call)


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm", "_native_rms_norm")
def layer_norm(call: Call) -> Outputs:
    """A statistic over the last dims, with one number along each of their entries."""
    x, labels = call.dims(0), call.trace.labels
    inner = x[len(x) - len(call.args[1]) :]
    for dim in inner:
        labels.mix(dim, "normalized over it")
    for position in (2, 3):
        if isinstance(call.arg(position), Tensor):
            for mine, theirs in zip(call.dims(position), inner, strict=True):
                labels.equate(mine, theirs)
    return _with_statistics(call)


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> Outputs:
    """Every group keeps as many channels as every other, so they are tied at the same offset."""
    x, labels = call.dims(0), call.trace.labels
    native = len(call.args) > 6
    groups = call.args[6] if native else call.args[1]
    rows = x[1].reshape(groups, -1)
    labels.equate(rows[:1], rows)
    if groups < len(x[1]):
        labels.mix(x[1], "normalized over it")
    for position in (1, 2) if native else (2, 3):
        _along(call, position, x[1])
    return _with_statistics(call)


@rule("renorm", "_weight_norm", "_weight_norm_interface")
def weight_norm(call: Call) -> Outputs:
    """The norm is taken over all dims but one."""
    x, size = call.dims(0), call.dims(1)
    kept = call.arg(2, 0) % len(x)
    for k, dim in enumerate(x):
        if k == kept:
            call.trace.labels.equate(size[kept if len(size) == len(x) else 0], dim)
        else:
            call.trace.labels.mix(dim, "a norm over it")
    if isinstance(call.out, Tensor):
        return list(x)
    return [list(x), list(size)]
