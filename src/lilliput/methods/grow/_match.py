"""Which channel of a smaller network each index of a larger one is.

Both networks are traced (:mod:`lilliput.mechanisms.groups`). A group of the larger one and a group of the
smaller one are partners where both lie in the same dim of the same tensor, in the same place among the groups
there; so channels are followed through residual sums, concatenations and flattened maps. An index carries the
number of its channel in the smaller network, so that "the same channel" is a comparison of numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelMismatch
from ...mechanisms.groups import Groups

Ints: TypeAlias = NDArray[np.int64]
#: A group's number and the indices ``(channels, repeats)`` of its channels in one dim.
Block: TypeAlias = tuple[int, Ints]
#: ``(tensor, dim)``.
Place: TypeAlias = tuple[str, int]
#: The groups in some dims of one tensor.
DimBlocks: TypeAlias = dict[int, list[Block]]
K = TypeVar("K", bound=Hashable)

#: Channels are numbered in steps of this, so that a channel's repeats have numbers of their own.
_REPEATS = 1 << 20


@dataclass(frozen=True, eq=False)
class Match:
    """The channels of two networks, side by side.

    Attributes:
        small: groups of the smaller network.
        large: groups of the larger one.
        partner: group of the larger network -> group of the smaller one.
        mapping: group of the larger network -> g, the channel of the partner for each of its channels.
    """

    small: Groups
    large: Groups
    partner: Mapping[int, int]
    mapping: Mapping[int, Ints]
    _first: Ints = field(init=False)

    def __post_init__(self) -> None:
        ends = np.cumsum([group.channels for group in self.small.groups], dtype=np.int64)
        object.__setattr__(self, "_first", np.concatenate([np.zeros(1, np.int64), ends]))

    def of_small(self, size: int, blocks: Iterable[Block]) -> Ints:
        """The number of each index of a dim of the smaller network; of no group: counted down from -1."""
        return self._numbers(size, blocks, lambda group, count: (group, np.arange(count)))

    def of_large(self, size: int, blocks: Iterable[Block]) -> Ints:
        """The number of each index of a dim of the larger network."""
        return self._numbers(
            size, blocks, lambda group, _: (self._partner(group), self.mapping[group])
        )

    def copies(self, size: int, blocks: Iterable[Block]) -> Ints:
        """How many channels of the larger network are the same channel as that of each index."""
        found = np.ones(size, dtype=np.int64)
        for group, index in blocks:
            g = self.mapping[group]
            found[index] = np.bincount(g)[g][:, None]
        return found

    def _numbers(
        self, size: int, blocks: Iterable[Block], look: Callable[[int, int], tuple[int, Ints]]
    ) -> Ints:
        numbers = np.zeros(size, dtype=np.int64)
        for group, index in blocks:
            partner, channels = look(group, len(index))
            first = 1 + self._first[partner] + channels
            numbers[index] = first[:, None] * _REPEATS + np.arange(index.shape[1])
        others = np.flatnonzero(numbers == 0)
        numbers[others] = -1 - np.arange(len(others))
        return numbers

    def _partner(self, group: int) -> int:
        if group not in self.partner:
            name = self.large.groups[group].name
            raise ModelMismatch(
                f"net2net: the channels of {name!r} have no counterpart in the smaller network: no layer of "
                "it makes or uses them. A layer can be added where its input and output are one layer's "
                "channels."
            )
        return self.partner[group]


def blocks_of(groups: Groups) -> dict[Place, list[Block]]:
    """The groups in each dim of each tensor, in the order of their first index."""
    return _sorted(
        ((member.tensor, member.dim), (number, member.index))
        for number, group in enumerate(groups.groups)
        for member in group.members
    )


def answers_of(groups: Groups) -> dict[tuple[str, int], DimBlocks]:
    """For each module and the number of its call, the groups in each dim of its first output."""
    found = _sorted(
        ((site.module, site.call, site.dim), (number, site.index))
        for number, group in enumerate(groups.groups)
        for site in group.sites
        if site.side == "output" and site.position == 0
    )
    nested: dict[tuple[str, int], DimBlocks] = defaultdict(dict)
    for (module, call, dim), blocks in found.items():
        nested[module, call][dim] = blocks
    return nested


def partners(
    small: Mapping[Place, Sequence[Block]],
    large: Mapping[Place, Sequence[Block]],
    passed_on: Iterable[tuple[Place, Place]],
) -> dict[int, int]:
    """The group of the smaller network for each group of the larger one.

    Args:
        small: see :func:`blocks_of`.
        large: see :func:`blocks_of`.
        passed_on: the dims (in, out) of weights that only the larger network has, and that pass their input
            on: what they make are the channels that they read.

    Raises:
        ModelMismatch: the groups of a dim cannot be told apart, or contradict those of another dim.
    """
    found: dict[int, int] = {}
    for place in sorted(small.keys() & large.keys()):
        _refuse_different(place, small[place], large[place])
        for (own, _), (other, _) in zip(large[place], small[place], strict=True):
            _agree(found, own, other, place)
    _follow(found, large, list(passed_on))
    return found


def _refuse_different(place: Place, small: Sequence[Block], large: Sequence[Block]) -> None:
    tensor, dim = place
    repeats = [[index.shape[1] for _, index in blocks] for blocks in (small, large)]
    if repeats[0] != repeats[1]:
        raise ModelMismatch(
            f"net2net: {tensor} has other groups of channels in dim {dim} than the same tensor of the "
            f"smaller network ({len(large)} and {len(small)}, each channel at {repeats[1]} and {repeats[0]} "
            "places): what is connected with it must be the same in both networks."
        )


def _agree(found: dict[int, int], own: int, other: int, place: Place) -> None:
    if found.setdefault(own, other) != other:
        raise ModelMismatch(
            f"net2net: in dim {place[1]} of {place[0]} the larger network ties channels that are different "
            "ones in the smaller network: both must be connected in the same way."
        )


def _follow(
    found: dict[int, int],
    large: Mapping[Place, Sequence[Block]],
    passed_on: Sequence[tuple[Place, Place]],
) -> None:
    """Groups between two new layers: what a new layer makes is what it reads."""
    ends = [(large.get(a, ()), large.get(b, ())) for a, b in passed_on]
    pairs = [(a[0][0], b[0][0]) for a, b in ends if len(a) == 1 and len(b) == 1]
    for _ in pairs:
        for own, other in [*pairs, *((b, a) for a, b in pairs)]:
            if own in found:
                found.setdefault(other, found[own])


def _sorted(items: Iterable[tuple[K, Block]]) -> dict[K, list[Block]]:
    found: dict[K, list[Block]] = defaultdict(list)
    for key, block in items:
        found[key].append(block)
    return {key: sorted(blocks, key=lambda b: int(b[1].min())) for key, blocks in found.items()}


def lookup(wanted: Ints, there: Ints) -> Ints | None:
    """Where each number stands; None where one of either side has no counterpart on the other.

    Example:
        >>> lookup(np.array([7, 5, 7]), np.array([5, 7])).tolist()
        [1, 0, 1]
    """
    order = np.argsort(there, kind="stable")
    at = np.searchsorted(there[order], wanted).clip(max=len(there) - 1)
    place: Ints = order[at] if len(there) else at
    if not len(there) or (there[place] != wanted).any() or len(set(place.tolist())) < len(there):
        return None
    return place
