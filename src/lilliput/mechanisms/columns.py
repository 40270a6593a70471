"""Columns of a weight get their final values one after another, and those that follow make up for it.

With H the Hessian of the squared error of a layer's output (the mean of ``x x^T`` over its inputs), a change
e of column c is made up for best by moving each later column d by ``-e U_cd / U_cc``, where U is the upper
Cholesky factor of the inverse of H. That is Optimal Brain Surgeon for all filters at once, in a fixed order
(Frantar et al. 2022 and 2023). What the final value is, zero or the nearest integer, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError


def inverted(hessian: Tensor) -> Tensor:
    """The inverse of a Hessian.

    Raises:
        InputError: it is singular.
    """
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise InputError("the Hessian is singular: raise damping, or give more samples.")
    return torch.cholesky_inverse(factor)


def factor_of(hessian: Tensor) -> Tensor:
    """U, for a Hessian ``(columns, columns)`` that is damped."""
    factor: Tensor = torch.linalg.cholesky(inverted(hessian), upper=True)
    return factor


def settle_columns(
    weights: Tensor,
    factor: Tensor,
    columns: range,
    final: Callable[[int, Tensor], Tensor],
) -> None:
    """Settle some columns, each moving what lies to its right; in place.

    They see one another's errors at once, the columns beyond them all of the errors together.

    Args:
        weights: ``(filters, columns)``.
        factor: of :func:`factor_of`.
        columns: which; next to each other.
        final: what a column becomes, from its number and its present values.
    """
    first, last = columns.start, columns.stop
    errors = torch.zeros_like(weights[:, first:last])
    for column in columns:
        value = final(column, weights[:, column])
        errors[:, column - first] = (weights[:, column] - value) / factor[column, column]
        weights[:, column:last] -= errors[:, column - first, None] * factor[column, column:last]
        weights[:, column] = value
    weights[:, last:] -= errors @ factor[first:last, last:]
