"""Shapes of what common operators return, without asking torch.

Torch computes the shapes of normalizations and activations in Python, which would take most of the
time of a trace. Here are those whose output is plainly like their input; everything else runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten

#: One tensor in, one like it out.
_LIKE_INPUT = {
    getattr(_ATEN, name).default
    for name in (
        "relu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu",
        "sigmoid", "tanh", "rsqrt", "sqrt", "exp", "neg", "abs", "softplus",
    )
}  # fmt: skip
_LIKE_INPUT |= {_ATEN.masked_fill.Scalar, _ATEN.mul.Scalar, _ATEN.add.Scalar, _ATEN.div.Scalar}

#: Two tensors in; like them if they are alike.
_LIKE_BOTH = {_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor}

_IN_PLACE = {
    getattr(_ATEN, name).default
    for name in (
        "relu_", "silu_", "mish_", "hardswish_", "hardsigmoid_", "hardtanh_", "leaky_relu_", "elu_",
        "sigmoid_", "tanh_",
    )
} | {_ATEN.add_.Tensor, _ATEN.mul_.Tensor, _ATEN.sub_.Tensor, _ATEN.div_.Tensor}  # fmt: skip

_BATCH_NORM = {_ATEN.native_batch_norm.default, _ATEN._native_batch_norm_legit_no_training.default}


def shape_only(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What the operator returns, as empty meta tensors; NotImplemented where it has to be run."""
    x = args[0] if args else None
    if not (isinstance(x, Tensor) and x.is_meta and x.is_floating_point()):
        return NotImplemented
    if operator in _BATCH_NORM:
        return _batch_norm(operator, args)
    if operator is _ATEN.native_layer_norm.default:
        return _layer_norm(x, len(args[1]))
    if operator in _LIKE_BOTH or operator in _IN_PLACE:
        return _alike(operator, args)
    if operator in _LIKE_INPUT and _same_kind(args):
        return torch.empty_like(x)
    return NotImplemented


def _batch_norm(operator: Any, args: Sequence[Any]) -> Any:
    uses_batch = operator is _ATEN.native_batch_norm.default and args[5]
    if uses_batch:
        return NotImplemented
    nothing = args[0].new_empty(0)
    return torch.empty_like(args[0]), nothing, nothing.detach()


def _layer_norm(x: Tensor, inner: int) -> Any:
    statistic = x.new_empty((*x.shape[: x.dim() - inner], *[1] * inner))
    return torch.empty_like(x), statistic, torch.empty_like(statistic)


def _alike(operator: Any, args: Sequence[Any]) -> Any:
    x, other = args[0], args[1] if len(args) > 1 else None
    if isinstance(other, Tensor) and (
        not other.is_meta or other.shape != x.shape or other.dtype != x.dtype
    ):
        return NotImplemented
    return x if operator in _IN_PLACE else torch.empty_like(x)


def _same_kind(args: Sequence[Any]) -> bool:
    """Whether no argument could change the type or the shape of the result."""
    return all(
        not isinstance(a, complex) and (not isinstance(a, Tensor) or a.shape == args[0].shape)
        for a in args
    )
