"""Hard masks that follow a criterion while a stage trains; shared by the magnitude papers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...core.select import Weight
from ...core.types import Change
from ...mechanisms.encodings import Mask, encode, encoding_of


def put_masks(weights: list[Weight]) -> None:
    """Give every weight a hard mask that lets through what is not zero yet, unless it has a mask."""
    for weight in weights:
        if encoding_of(weight, Mask) is None:
            encode(weight, Mask(weight.value.detach() != 0))


def mask_of(weight: Weight) -> Mask:
    """The mask of a weight that :func:`put_masks` has treated."""
    mask = encoding_of(weight, Mask)
    assert mask is not None
    return mask


def changes(
    method: str, weights: list[Weight], before: dict[str, int], note: Callable[[Weight], str]
) -> list[Change]:
    """What the masks took away, one entry a weight."""
    return [
        Change(w.name, "nonzeros", before[w.name], nonzeros(w.value), method, note(w))
        for w in weights
        if before[w.name] != nonzeros(w.value)
    ]


def nonzeros(value: Tensor) -> int:
    """How many entries are not zero."""
    return int(value.count_nonzero())
