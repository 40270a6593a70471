"""From labels to groups: all index work is numpy, linear in the number of indices.

A component that touches the same dims of the same tensors equally often as another is of the same
group. Of each component one sum of random numbers, one a dim, is compared, not the dims themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .classes import Group, Member, Site
from .labels import Dim, Note, Solution
from .trace import Trace

Ints = NDArray[np.int64]

#: Of one dim, the groups that it carries, each with the indices ``(channels, repeats)``.
_Blocks = list[tuple[int, Ints]]


@dataclass
class _Table:
    """All indices of many dims, one after the other, without those that must stay.

    Attributes:
        dim: number of the dim of each index.
        position: of the index in its dim.
        component: of the index.
    """

    dim: Ints
    position: Ints
    component: Ints

    @classmethod
    def of(cls, dims: Sequence[Dim], solution: Solution) -> _Table:
        sizes = np.array([len(d) for d in dims], dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        labels = np.concatenate([*dims, np.zeros(0, dtype=np.int64)])
        live = np.flatnonzero(solution.live(labels))
        dim = np.repeat(np.arange(len(dims)), sizes)[live]
        return cls(dim, live - starts[dim], solution.of[labels[live]])

    def select(self, chosen: NDArray[np.bool_]) -> _Table:
        return _Table(self.dim[chosen], self.position[chosen], self.component[chosen])


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
    members = _Table.of([entry.dims[k] for entry, k in trace.places], solution)
    made = np.array([entry.roles[k] == "makes" for entry, k in trace.places], dtype=bool)
    assembly = _assembly(members, made, len(solution.fixed))
    mixed = _touched(trace.labels.mixed, solution, assembly)
    pairs = _touched(trace.labels.pairs, solution, assembly)
    its_members, its_sites = _members(trace, members, assembly), _sites(trace, solution, assembly)
    groups = tuple(
        Group(
            int(count),
            tuple(its_members[n]),
            tuple(its_sites[n]),
            tuple(dict.fromkeys(str(note.reason) for note in mixed[n])),
            bool(pairs[n]),
        )
        for n, count in enumerate(assembly.count)
    )
    return groups, assembly


def _assembly(members: _Table, made: NDArray[np.bool_], total: int) -> Assembly:
    component = members.component
    makes = np.flatnonzero(made[members.dim])
    first = np.full(total, len(component))
    np.minimum.at(first, component[makes], makes)
    chosen = np.flatnonzero(first < len(component))
    order = chosen[np.argsort(first[chosen], kind="stable")]
    footprint = _footprints(members, total)[order]
    _, start, inverse = np.unique(footprint, return_index=True, return_inverse=True)
    appearance = np.argsort(np.argsort(start))[inverse]  # groups in the order of their first maker
    group = np.full(total, -1)
    rank = np.zeros(total, dtype=np.int64)
    group[order] = appearance
    by_group = order[np.argsort(appearance, kind="stable")]
    count = np.bincount(appearance, minlength=0)
    rank[by_group] = np.arange(len(by_group)) - np.repeat(np.cumsum(count) - count, count)
    return Assembly(group, rank, count)


def _footprints(members: _Table, total: int) -> Ints:
    """A number for each component, equal for those that touch the same dims equally often."""
    limits = np.iinfo(np.int64)
    of_dim = np.random.default_rng(0).integers(
        limits.min, limits.max, size=int(members.dim.max(initial=0)) + 1
    )
    sums = np.zeros(total, dtype=np.int64)
    np.add.at(sums, members.component, of_dim[members.dim])  # it may overflow: a sum modulo 2^64
    return sums


def _members(trace: Trace, table: _Table, assembly: Assembly) -> list[list[Member]]:
    """The members of each group, in the order of the model."""
    found: list[list[Member]] = [[] for _ in assembly.count]
    all_blocks = _blocks(table, len(trace.places), assembly)
    for (entry, k), blocks in zip(trace.places, all_blocks, strict=True):
        for number, index in blocks:
            found[number].append(Member(entry.name, k, entry.roles[k], index))
    return found


def _sites(trace: Trace, solution: Solution, assembly: Assembly) -> list[list[Site]]:
    """The sites of each group; most activations have the very dims of an earlier one."""
    found: list[list[Site]] = [[] for _ in assembly.count]
    dims = {id(dim): dim for sighting in trace.sightings for dim in sighting.dims}
    table = _Table.of(list(dims.values()), solution)
    blocks = dict(zip(dims, _blocks(table, len(dims), assembly), strict=True))
    for module, side, call, position, its in trace.sightings:
        for k, dim in enumerate(its):
            for number, index in blocks[id(dim)]:
                found[number].append(Site(module, side, call, position, k, index))
    return found


def _blocks(table: _Table, count: int, assembly: Assembly) -> list[_Blocks]:
    """For each of so many dims, the groups that it carries with their indices there."""
    table = table.select(assembly.group[table.component] >= 0)
    group, rank = assembly.group[table.component], assembly.rank[table.component]
    width = int(assembly.count.max(initial=1))
    key = (table.dim * len(assembly.count) + group) * width + rank
    order = np.argsort(key, kind="stable")  # positions ascend already
    dim, group, position = table.dim[order], group[order], table.position[order]
    edges = np.flatnonzero((np.diff(dim) != 0) | (np.diff(group) != 0)) + 1
    begins = np.concatenate([np.zeros(min(len(dim), 1), dtype=np.int64), edges])
    ends = [*edges.tolist(), len(dim)]
    found: list[_Blocks] = [[] for _ in range(count)]
    blocks = zip(dim[begins].tolist(), group[begins].tolist(), begins.tolist(), ends, strict=False)
    for k, number, a, b in blocks:
        found[k].append((number, position[a:b].reshape(assembly.count[number], -1)))
    return found


def _touched(notes: list[Note], solution: Solution, assembly: Assembly) -> list[list[Note]]:
    """The notes that concern each group."""
    found: list[list[Note]] = [[] for _ in assembly.count]
    for note in notes:
        for number in np.unique(assembly.group[solution.of[np.maximum(note.labels, 0)]]):
            if number >= 0:
                found[number].append(note)
    return found


def unprunable(trace: Trace, solution: Solution) -> dict[str, str]:
    """Why channels that a weight makes must stay, for each dim where some must."""
    made = [(entry, k) for entry, k in trace.places if entry.roles[k] == "makes"]
    left = np.bincount(
        _Table.of([entry.dims[k] for entry, k in made], solution).dim, minlength=len(made)
    )
    return {
        f"{entry.name} dim {k}": solution.reason(entry.dims[k])
        for (entry, k), live in zip(made, left, strict=True)
        if live < len(entry.dims[k])
    }
