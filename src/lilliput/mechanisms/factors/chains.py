"""The shapes of a chain's layers, how many weights they have, and the layer that they are together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ...errors import InputError

Kind: TypeAlias = Literal["svd", "channel", "spatial", "separable", "tucker", "cp"]
Ranks: TypeAlias = tuple[int, ...]

KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Shape:
    """What a layer multiplies, in one group of channels.

    Attributes:
        enters: input channels.
        leaves: output channels.
        kernel: its dims; none for a linear layer.
        groups: how many groups there are.
    """

    enters: int
    leaves: int
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, layer: Any) -> Shape:
        """That of a linear layer or convolution."""
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features, layer.out_features)
        groups = layer.groups
        return cls(
            layer.in_channels // groups, layer.out_channels // groups, layer.kernel_size, groups
        )

    @property
    def numbers(self) -> int:
        """Weights, the bias not counted."""
        return self.groups * self.enters * self.leaves * math.prod(self.kernel)


@dataclass(frozen=True)
class Link:
    """A thin layer of a chain, in one group.

    Attributes:
        enters: input channels.
        leaves: output channels.
        dims: those of the whole kernel's dims that it has.
        kernel: its own, 1 in all other dims.
        alone: whether every channel is by itself (depthwise).
    """

    enters: int
    leaves: int
    dims: tuple[int, ...]
    kernel: tuple[int, ...]
    alone: bool

    @property
    def numbers(self) -> int:
        """Weights of one group."""
        return self.leaves * (1 if self.alone else self.enters) * math.prod(self.kernel)


def full_ranks(shape: Shape, kind: str) -> Ranks:
    """The ranks at which a chain can be any layer of that shape, exactly.

    Example:
        >>> full_ranks(Shape(16, 32, (3, 3)), "spatial"), full_ranks(Shape(16, 32, (3, 3)), "tucker")
        ((48,), (16, 32))
    """
    i, o, kernel = shape.enters, shape.leaves, shape.kernel
    if kind == "spatial":
        return (min(i * kernel[0], o * kernel[1]),)
    taps = math.prod(kernel)
    if kind == "separable":
        return (min(o, taps),)
    if kind == "tucker":
        return min(i, o * taps), min(o, i * taps)
    if kind == "cp":
        return (i * o * taps // max(i, o, *kernel),)
    return (min(o, i * taps),)


def chain(shape: Shape, kind: str, ranks: Ranks) -> list[Link]:
    """The thin layers, from input to output.

    Example:
        >>> [link.numbers for link in chain(Shape(16, 32, (3, 3)), "tucker", (4, 8))]
        [64, 288, 256]
    """
    dims = tuple(range(len(shape.kernel)))
    having: dict[str, list[tuple[int, ...]]] = {
        "svd": [(), ()],
        "channel": [dims, ()],
        "spatial": [(0,), (1,)],
        "separable": [dims, ()],
        "tucker": [(), dims, ()],
        "cp": [(), *((dim,) for dim in dims), ()],
    }
    own = having[kind]
    inner = ranks if kind == "tucker" else ranks * (len(own) - 1)
    if kind == "separable":  # so many kernels for each channel
        inner = (ranks[0] * shape.enters,)
    widths = (shape.enters, *inner, shape.leaves)
    return [
        Link(
            enters, leaves, mine, tuple(k if d in mine else 1 for d, k in enumerate(shape.kernel)),
            alone=kind in ("separable", "cp") and bool(mine),
        )
        for (enters, leaves), mine in zip(pairwise(widths), own, strict=True)
    ]  # fmt: skip


def numbers(shape: Shape, kind: str, ranks: Ranks) -> int:
    """Weights of the whole chain, the bias not counted."""
    return shape.groups * sum(link.numbers for link in chain(shape, kind, ranks))


def compose(weights: Sequence[Tensor], groups: int = 1, enters: int | None = None) -> Tensor:
    """The weight of the layer that a chain is.

    Args:
        weights: of the thin layers, from input to output, each ``(out, in of a group, *kernel)``.
        groups: of the layer.
        enters: input channels of a group, where the first thin layer has every channel by itself.

    Returns:
        Shape ``(out, in of a group, *kernel)``.

    Example:
        >>> compose([torch.ones(2, 3), torch.ones(4, 2)]).shape
        torch.Size([4, 3])
    """
    whole, *rest = (w.unflatten(0, (groups, -1)) for w in weights)
    if enters is not None and whole.shape[2] < enters:
        whole = _spread(whole, enters)
    for link in rest:
        if link.shape[2] == 1 and whole.shape[1] > 1:  # every channel by itself
            whole = link * whole
        else:  # sums over channels; of two kernels one has size 1 in each dim
            inner = whole.movedim((1, 2), (-2, -1))
            whole = (link.movedim((1, 2), (-2, -1)) @ inner).movedim((-2, -1), (1, 2))
    found: Tensor = whole.flatten(0, 1).contiguous()
    return found


def _spread(alone: Tensor, enters: int) -> Tensor:
    """The weight of a convolution of every channel by itself as that of an ordinary one, mostly zeros."""
    channel = torch.arange(alone.shape[1], device=alone.device) // (alone.shape[1] // enters)
    own = channel[:, None] == torch.arange(enters, device=alone.device)
    return alone * own.view(1, *own.shape, *[1] * (alone.ndim - 3))


def check_ranks(shape: Shape, kind: str, ranks: Ranks) -> None:
    """Raise InputError for a rank below 1 or above the full one, or for another number of ranks."""
    full = full_ranks(shape, kind)
    fits = len(ranks) == len(full)
    if fits and all(1 <= rank <= most for rank, most in zip(ranks, full, strict=True)):
        return
    each = f" in each of its {shape.groups} groups" if shape.groups > 1 else ""
    size = f"{shape.leaves} x {shape.enters}" + "".join(f" x {k}" for k in shape.kernel)
    two = " (of the input, of the output)" if len(full) > 1 else ""
    raise InputError(
        f"the rank {_listed(ranks)} does not fit a weight of {size}{each}: a chain of kind {kind} has "
        f"the rank 1 to {_listed(full)}{two}. Give less, or leave the layer out."
    )


def _listed(ranks: Ranks) -> str:
    return str(ranks[0]) if len(ranks) == 1 else str(list(ranks))
