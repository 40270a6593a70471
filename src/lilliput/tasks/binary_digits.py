"""Handwritten digits with two classes instead of ten: the easy task before the hard one.

The images and their split are those of ``digits``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..core.registry import task
from ..core.task import Task
from ..errors import InputError
from .digits import digits


@task
def binary_digits(positive: Sequence[int] = (5, 6, 7, 8, 9), **arguments: Any) -> Task:
    """Handwritten digits, 8x8 grey, 2 classes: is it one of some digits; ships with scikit-learn.

    Args:
        positive: the digits of class 1; the others are class 0.
        **arguments: those of ``digits``.

    Raises:
        InputError: these are no digits, or none or all of them.

    Example:
        >>> batch = next(iter(binary_digits(positive=[0], batch_size=4).train))
        >>> set(batch.target.tolist()) <= {0, 1}
        True
    """
    if not 0 < len(set(positive)) < 10 or not set(positive) <= set(range(10)):
        raise InputError(f"positive={list(positive)}: give one to nine of the digits 0 to 9.")
    plain = digits(**arguments)
    is_positive = torch.tensor([int(digit in positive) for digit in range(10)])

    def relabeled(batches: Any) -> Any:
        own = copy.copy(batches)
        if own is not None:
            own.target = is_positive[own.target]
        return own

    parts = {part: relabeled(getattr(plain, part)) for part in ("train", "validation", "test")}
    return replace(plain, **parts, name="binary digits")
