"""From labels to groups: all index work is numpy, linear in the number of indices.

A component that touches the same dims of the same tensors equally often as another is of the same
group. Of each component one sum of random numbers, one a dim, is compared, not the dims themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .classes import Group, Member, Site
from .labels import Dim, Note, Solution
from .trace import Entry, Sighting, Trace

Key = TypeVar("Key")
Ints = NDArray[np.int64]


@dataclass
class _Table(Generic[Key]):
    """All indices of many dims, one after the other.

    Attributes:
        keys: what each dim is.
        dim: number of the dim of each index.
        position: of the index in its dim.
        label: of the index.
    """

    keys: list[Key]
    dim: Ints
    position: Ints
    label: Ints

    @classmethod
    def of(cls, keys: list[Key], dims: Sequence[Dim]) -> _Table[Key]:
        sizes = np.array([len(d) for d in dims], dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        number = np.repeat(np.arange(len(dims)), sizes)
        label = np.concatenate([*dims, np.zeros(0, dtype=np.int64)])
        return cls(keys, number, np.arange(len(label)) - starts[number], label)

    def select(self, chosen: NDArray[np.bool_]) -> _Table[Key]:
        return _Table(self.keys, self.dim[chosen], self.position[chosen], self.label[chosen])


@dataclass
class Assembly:
    """Which component is which channel of which group.

    Attributes:
        group: of each component, -1 where it is in none.
        rank: of each component in its group.
        count: channels of each group.
    """

    group: Ints
    rank: Ints
    count: Ints


def assemble(trace: Trace, solution: Solution) -> tuple[tuple[Group, ...], Assembly]:
    """All groups of a trace, in the order of the first layer that makes them."""
    keys = [(entry, k) for entry in trace.entries for k in range(len(entry.dims))]
    members = _Table.of(keys, [entry.dims[k] for entry, k in keys])
    members = members.select(solution.live(members.label))
    made = np.array([entry.roles[k] == "makes" for entry, k in keys], dtype=bool)
    assembly = _assembly(members, made, solution)
    seen = [
        (s, k) for s in trace.sightings for k, d in enumerate(s.dims) if trace.labels.is_live(d)
    ]
    sites = _Table.of(seen, [s.dims[k] for s, k in seen])
    sites = sites.select(solution.live(sites.label))
    return _groups(trace, solution, assembly, members, sites), assembly


def _assembly(
    members: _Table[tuple[Entry, int]], made: NDArray[np.bool_], solution: Solution
) -> Assembly:
    component = solution.of[members.label]
    total = len(solution.fixed)
    makes = made[members.dim] if len(made) else np.zeros(0, dtype=bool)
    roots = np.zeros(total, dtype=bool)
    roots[component[makes]] = True
    first = np.full(total, len(component))
    np.minimum.at(first, component[makes], np.nonzero(makes)[0])
    number = _same_footprint(component, members.dim, total)
    chosen = np.nonzero(roots)[0]
    order = chosen[np.argsort(first[chosen], kind="stable")]
    _, start, inverse = np.unique(number[order], return_index=True, return_inverse=True)
    appearance = np.argsort(np.argsort(start))[inverse]  # groups in the order of their first maker
    group = np.full(total, -1)
    rank = np.zeros(total, dtype=np.int64)
    group[order] = appearance
    by_group = order[np.argsort(appearance, kind="stable")]
    count = np.bincount(appearance, minlength=0)
    rank[by_group] = np.arange(len(by_group)) - np.repeat(np.cumsum(count) - count, count)
    return Assembly(group, rank, count)


def _same_footprint(component: NDArray[np.int32], dim: Ints, total: int) -> Ints:
    """A number for each component, equal for those that touch the same dims equally often."""
    generator = np.random.default_rng(0)
    keys = generator.integers(1, 2**31, size=(2, int(dim.max()) + 1 if len(dim) else 1))
    sums = [np.bincount(component, weights=k[dim], minlength=total) for k in keys]
    _, number = np.unique(np.stack(sums, axis=1), axis=0, return_inverse=True)
    return np.asarray(number.reshape(-1), dtype=np.int64)


def _groups(
    trace: Trace,
    solution: Solution,
    assembly: Assembly,
    members: _Table[tuple[Entry, int]],
    sites: _Table[tuple[Sighting, int]],
) -> tuple[Group, ...]:
    count = len(assembly.count)
    its_members: list[list[Member]] = [[] for _ in range(count)]
    for number, (entry, k), index in _blocks(members, solution, assembly):
        its_members[number].append(Member(entry.name, k, entry.roles[k], index))
    its_sites: list[list[Site]] = [[] for _ in range(count)]
    for number, (s, k), index in _blocks(sites, solution, assembly):
        its_sites[number].append(Site(s.module, s.side, s.call, s.position, k, index))
    mixed = _touched(trace.labels.mixed, solution, assembly)
    pairs = _touched(trace.labels.pairs, solution, assembly)
    return tuple(
        Group(
            int(assembly.count[n]),
            tuple(its_members[n]),
            tuple(its_sites[n]),
            tuple(dict.fromkeys(str(note) for note in mixed[n])),
            bool(pairs[n]),
        )
        for n in range(count)
    )


def _blocks(
    table: _Table[Key], solution: Solution, assembly: Assembly
) -> list[tuple[int, Key, Ints]]:
    """For each group and dim that meet, the indices ``(channels, repeats)``."""
    component = solution.of[table.label]
    inside = assembly.group[component] >= 0
    component, table = component[inside], table.select(inside)
    group, rank = assembly.group[component], assembly.rank[component]
    width = int(assembly.count.max(initial=1))
    key = (table.dim * len(assembly.count) + group) * width + rank
    order = np.argsort(key, kind="stable")  # positions ascend already
    dim, group, position = table.dim[order], group[order], table.position[order]
    edges = np.nonzero((np.diff(dim) != 0) | (np.diff(group) != 0))[0] + 1
    begins = [0, *edges.tolist()] if len(dim) else []
    ends = [*edges.tolist(), len(dim)]
    return [
        (n, table.keys[dim[a]], position[a:b].reshape(assembly.count[n], -1))
        for a, b in zip(begins, ends, strict=False)
        for n in (int(group[a]),)
    ]


def _touched(notes: list[Note], solution: Solution, assembly: Assembly) -> list[list[Note]]:
    """The notes that concern each group."""
    found: list[list[Note]] = [[] for _ in assembly.count]
    for note in notes:
        for number in np.unique(assembly.group[solution.of[note.labels]]):
            if number >= 0:
                found[number].append(note)
    return found


def unprunable(trace: Trace, solution: Solution) -> dict[str, str]:
    """Why channels that a weight makes must stay, for each dim where some must."""
    reasons = {}
    for entry in trace.entries:
        for k, (dim, role) in enumerate(zip(entry.dims, entry.roles, strict=True)):
            if role == "makes" and not solution.live(dim).all():
                reasons[f"{entry.name} dim {k}"] = solution.reason(dim)
    return reasons
