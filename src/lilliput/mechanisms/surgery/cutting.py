"""The cut itself: from channels to remove to a network without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...core.collector import paused_collector
from ...core.types import Change
from ...errors import InputError, LilliputError, SurgeryFailed
from .check import SelfCheck
from .plan import Plan, perform, plan_of, remember
from .planning import planned
from .refusals import refuse
from .transaction import transaction

if TYPE_CHECKING:
    from ..groups.classes import Groups, Removal


@dataclass(frozen=True)
class Cut:
    """What a cut did.

    Attributes:
        plan: what is left of the network as it was before this cut.
        changes: the width of each layer that makes channels, before and after.
        error: the largest difference that the self-check found, relative to the largest output; None
            where nothing was, or could be, compared.
        unchecked: groups whose removal cannot be compared with silencing, each with the reason.
    """

    plan: Plan
    changes: list[Change]
    error: float | None
    unchecked: tuple[str, ...]


@paused_collector()
def cut(
    model: nn.Module,
    groups: Groups,
    removal: Removal,
    *,
    inputs: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    edit: Callable[[nn.Module], object] | None = None,
    tolerance: float | None = 1e-5,
) -> Cut:
    """Remove channels from a network, in place: all of it or nothing.

    Args:
        model: any module; its parameters stay the same objects.
        groups: of this model as it is now.
        removal: number of a group -> numbers of the channels to remove, ascending.
        inputs: an example for the self-check, which takes two forward passes (three, where only a part
            of the groups can be compared); None leaves it out.
        optimizer: what trains the model; its state is cut along.
        edit: changes values afterwards, through :func:`replace`, as a part of the transaction.
        tolerance: relative error that the self-check allows; None leaves it out.

    Returns:
        What was done. :func:`plan_of` has the sum of all cuts so far.

    Raises:
        InputError: the removal, the model, the optimizer or the moment does not allow it.
        ModelMismatch: the groups are not this model's, or it cannot run on the inputs.
        SurgeryFailed: anything else went wrong, the check included. In every case, also when Ctrl-C
            interrupts, the model and the optimizer are bit for bit as they were.

    Example:
        >>> from lilliput.mechanisms.groups import find_groups
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> x = torch.randn(3, 4)
        >>> done = cut(net, find_groups(net, x), {0: np.array([1, 2])}, inputs=x)
        >>> net[0].weight.shape, done.error < 1e-5, done.changes[0].after
        (torch.Size([4, 4]), True, 4)
    """
    refuse(model, optimizer)
    removal = _checked(groups, removal)
    plan = planned(model, groups, removal)
    if not removal:
        return Cut(plan, [], None, ())
    with (
        transaction(model, optimizer) as before,
        torch.inference_mode(False),
        _told(groups, removal),
    ):
        changes, error = _changes(groups, removal, plan), None
        if inputs is None or tolerance is None:
            perform(model, plan, optimizer)
        else:
            check = SelfCheck(model, groups, inputs, tolerance, before)
            error = check.perform(removal, plan, optimizer)
        done = plan_of(model)
        remember(model, plan if done is None else done.then(plan))
        if edit is not None:
            edit(model)
        return Cut(plan, changes, error, _unchecked(groups, removal))


@contextmanager
def _told(groups: Groups, removal: Removal) -> Iterator[None]:
    """Say of an unforeseen error that it was in surgery, and where."""
    try:
        yield
    except LilliputError:
        raise
    except Exception as error:
        names = [groups.groups[number].name for number in removal]
        shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        raise SurgeryFailed(
            f"cutting channels of {shown} failed: {type(error).__name__}: {error}. The model is as it was."
        ) from error


def _checked(groups: Groups, removal: Removal) -> dict[int, np.ndarray]:
    """The removal without what is empty, after a look at all of it."""
    return {
        number: index
        for number, gone in removal.items()
        if len(index := _checked_group(groups, number, np.asarray(gone)))
    }


def _checked_group(groups: Groups, number: int, gone: np.ndarray) -> np.ndarray:
    if not 0 <= number < len(groups.groups):
        raise InputError(
            f"there is no group {number}: the network has {len(groups.groups)}, counted from 0."
        )
    group = groups.groups[number]
    known = f"the {group.channels} channels of {group.name}, counted from 0"
    if gone.ndim != 1 or (gone.size and gone.dtype.kind not in "iu"):
        raise InputError(f"the removal of {known}, is {gone!r:.60}: give their numbers.")
    gone = gone.astype(np.int64)
    if gone.size and (gone[0] < 0 or gone[-1] >= group.channels or (gone[1:] <= gone[:-1]).any()):
        raise InputError(
            f"the removal of {known}, is {gone!r:.60}: give ascending numbers, each once."
        )
    if len(gone) == group.channels:
        raise InputError(f"all of {known}, would go: the network would be empty there. Keep one.")
    return gone


def _changes(groups: Groups, removal: Removal, plan: Plan) -> list[Change]:
    """One of each layer that makes removed channels."""
    found: dict[str, Change] = {}
    for number in removal:
        for member in groups.groups[number].with_role("makes"):
            before = plan.sizes[member.tensor][member.dim]
            after = len(plan.kept[member.tensor][member.dim])
            found.setdefault(member.layer, Change(member.layer, "channels", before, after))
    return list(found.values())


def _unchecked(groups: Groups, removal: Removal) -> tuple[str, ...]:
    return tuple(
        f"{group.name}: {', '.join(group.mixed_by)}"
        for number in removal
        for group in [groups.groups[number]]
        if group.mixed_by
    )
