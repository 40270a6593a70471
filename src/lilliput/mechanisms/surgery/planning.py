"""From channels to remove to the indices that stay: numpy over the members of all groups at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ...errors import ModelMismatch
from .plan import Plan
from .tensors import shape_of

if TYPE_CHECKING:
    from ..groups.classes import Groups, Member, Removal


def planned(model: nn.Module, groups: Groups, removal: Removal) -> Plan:
    """A removal in terms of tensors.

    Args:
        model: as it is now.
        groups: of this model.
        removal: number of a group -> numbers of the channels to remove, ascending.

    Raises:
        ModelMismatch: the groups are of another network, or of this one before an earlier cut.
    """
    members = [member for group in groups.groups for member in group.members]
    sizes = _sizes(model, members)
    ends = np.cumsum([0, *sizes.values()])  # of the dims, with all their indices in one row
    starts = dict(zip(sizes, ends.tolist(), strict=False))
    stays = np.ones(ends[-1], dtype=bool)
    stays[_indices(model, members, sizes, starts)[_going(groups, removal)]] = False
    kept = np.flatnonzero(stays)
    edges = np.searchsorted(kept, ends)
    kept -= np.repeat(ends[:-1], np.diff(edges))
    left: dict[str, dict[int, np.ndarray]] = {}
    whole: dict[str, dict[int, int]] = {}
    for ((tensor, dim), size), a, b in zip(
        sizes.items(), edges[:-1].tolist(), edges[1:].tolist(), strict=True
    ):
        if b - a < size:
            left.setdefault(tensor, {})[dim] = kept[a:b]
            whole.setdefault(tensor, {})[dim] = size
    return Plan(left, groups.attributes(removal), whole)


def _sizes(model: nn.Module, members: Sequence[Member]) -> dict[tuple[str, int], int]:
    """The size of each dim that carries channels, by tensor and dim."""
    shapes = {name: shape_of(model, name) for name in dict.fromkeys(m.tensor for m in members)}
    for member in members:
        if member.dim >= len(shapes[member.tensor]):
            raise _foreign(member, shapes[member.tensor])
    return {(m.tensor, m.dim): shapes[m.tensor][m.dim] for m in members}


def _indices(
    model: nn.Module,
    members: Sequence[Member],
    sizes: dict[tuple[str, int], int],
    starts: dict[tuple[str, int], int],
) -> np.ndarray:
    """Every index of every member, counted from where its dim starts."""
    none = np.zeros(0, dtype=np.int64)
    index = np.concatenate([*(m.index.reshape(-1) for m in members), none])
    counts = [m.index.size for m in members]
    beyond = index >= np.repeat([sizes[m.tensor, m.dim] for m in members], counts)
    if beyond.any():
        member = members[int(np.searchsorted(np.cumsum(counts), beyond.argmax(), side="right"))]
        raise _foreign(member, shape_of(model, member.tensor))
    moved: np.ndarray = index + np.repeat([starts[m.tensor, m.dim] for m in members], counts)
    return moved


def _going(groups: Groups, removal: Removal) -> np.ndarray:
    """Of every index of every member, whether it goes."""
    flags = [np.zeros(0, dtype=bool)]
    for number, group in enumerate(groups.groups):
        goes = np.zeros(group.channels, dtype=bool)
        if number in removal:
            goes[removal[number]] = True
        for repeats in (member.index.shape[1] for member in group.members):
            flags.append(goes if repeats == 1 else np.repeat(goes, repeats))
    return np.concatenate(flags)


def _foreign(member: Member, shape: torch.Size) -> ModelMismatch:
    return ModelMismatch(
        f"{member.tensor} has the shape {tuple(shape)}, and a group reaches index "
        f"{int(member.index.max())} of its dim {member.dim}: the groups were found on another network, "
        "or before an earlier cut. Call find_groups on the model as it is now."
    )
