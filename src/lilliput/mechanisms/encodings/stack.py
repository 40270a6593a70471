"""The encodings that lie on a weight: find them, and find what trains beneath them."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor
from torch.nn.utils import parametrize

from ...core.select import Weight
from .base import Encoding

E = TypeVar("E", bound=Encoding)


def encoding_of(weight: Weight, kind: type[E]) -> E | None:
    """The weight's encoding of one kind, if it has one."""
    return next((e for e in weight.encodings() if isinstance(e, kind)), None)


def original_of(weight: Weight) -> Tensor:
    """What trains: the innermost encoding's original, or the weight itself."""
    if parametrize.is_parametrized(weight.module, weight.tensor):
        stacks: Any = weight.module.parametrizations
        original: Tensor = stacks[weight.tensor].original
        return original
    return weight.value
