"""What one forward pass says about a network's dims.

:class:`Trace` collects labels of every tensor, what weights do with their dims, which activations
leaf modules see, and which numbers in the code follow from which dims. The rules (:mod:`.rules`) write
into it, :mod:`.tracing` drives it, :mod:`.components` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import InputError
from .classes import Role
from .labels import Context, Dim, Dims, Labels, Solution
from .widths import Kept, Width, after, leaves

#: How the channels of attention are counted: inside the heads, or the heads themselves.
Heads = Literal["channels", "whole"]

#: When roles compete for a dim (a tied embedding), the higher one wins.
_RANK: dict[Role, int] = {"along": 0, "uses": 1, "makes": 2}


@dataclass
class Entry:
    """One parameter or buffer of the model.

    Attributes:
        name: dotted; of tied tensors the first.
        dims: its labels.
        roles: one a dim.
    """

    name: str
    dims: Dims
    roles: list[Role]


class Sighting(NamedTuple):
    """An activation that a leaf module took in or gave out."""

    module: str
    side: Literal["input", "output"]
    call: int
    position: int
    dims: Dims


class Check(NamedTuple):
    """Two numbers that must be equal after any removal, for the code to run.

    Attributes:
        value: what the code asks for.
        target: labels whose count it should be, or another number of the code.
        context: where.
        source: int64 ``(k, len(target))``, labels that would make them equal if equated with the
            target; None where nothing is known that would.
    """

    value: int
    target: Dim | int
    context: Context
    source: Dim | None = None

    def fails(self, kept: Kept) -> bool:
        """Whether the two differ when only some labels are kept."""
        try:
            other = after(self.target, kept) if isinstance(self.target, int) else kept(self.target)
            return after(self.value, kept) != other
        except ZeroDivisionError:  # by a width of which nothing is left: surgery keeps one channel
            return False


@dataclass(eq=False)
class Trace:
    """Labels of every tensor of one forward pass, and what operators said about them.

    Attributes:
        heads: which axis of an attention split carries the channels.
        outer: numbers of the splits whose outer axis does, found by an earlier trace.
        labels: the store.
        entries: parameters and buffers in the order of the model.
        places: all their dims, in the order of their labels.
        sightings: activations at leaf modules in the order of the forward pass.
        checks: relations between numbers of the code and dims.
        splits: how many dims have been split so far.
        attention: numbers of the splits that have turned out to be attention heads.
        unknown: operators without a rule, and how often they came.
    """

    heads: Heads = "channels"
    outer: frozenset[int] = frozenset()
    labels: Labels = field(default_factory=Labels)
    entries: list[Entry] = field(default_factory=list)
    places: list[tuple[Entry, int]] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    attributes: dict[str, Dim] = field(default_factory=dict)
    numbers: list[tuple[Width, Context]] = field(default_factory=list)
    splits: int = 0
    attention: set[int] = field(default_factory=set)
    unknown: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # By the tensors' ids; the tensors are kept, for an id must not be given out twice.
        self._known: dict[int, tuple[Tensor, Dims, bool]] = {}
        self._names: dict[int, str] = {}
        self._unmet: set[int] = set()
        self._watched = True
        self._modules: list[tuple[str, nn.Module]] = []
        self._marks: dict[Role, list[Dim]] = {}
        self._calls: dict[str, int] = {}

    # Tensors

    def declare(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Give labels to the model's tensors; must come before anything else."""
        for name, tensor in named:
            dims = [self.labels.new(size) for size in tensor.shape]
            entry = Entry(name, dims, ["along"] * len(dims))
            self.entries.append(entry)
            self.places += [(entry, k) for k in range(len(dims))]
            self.put(tensor, dims, static=True)
            self._names[id(tensor)] = name
            if isinstance(tensor, nn.Parameter):
                self._unmet.add(id(tensor))

    def put(self, tensor: Tensor, dims: Dims, static: bool = False) -> None:
        """Remember the labels of a tensor; ``static`` ones are computed from parameters alone."""
        self._known[id(tensor)] = tensor, dims, static

    def dims(self, tensor: Tensor) -> Dims:
        """The labels of a tensor; one that was not met before stays as it is."""
        self._unmet.discard(id(tensor))
        known = self._known.get(id(tensor))
        return self._meet(tensor) if known is None else known[1]

    def _meet(self, tensor: Tensor) -> Dims:
        if tensor.is_meta:
            raise InputError(
                f"in {self.module or type(tensor).__name__!r} a tensor of shape "
                f"{tuple(tensor.shape)} appears that passed by torch's dispatcher, so it is not "
                "known which channels it carries. Take that part (a transform such as vmap, or "
                "a tensor kept from an earlier call) out of the model."
            )
        dims = [self.labels.still(size) for size in tensor.shape]
        self.put(tensor, dims, static=True)
        return dims

    def name_of(self, tensor: Tensor) -> str:
        """The name of a parameter or buffer of the model; empty for any other tensor."""
        return self._names.get(id(tensor), "")

    def has_unmet(self) -> bool:
        """Whether a parameter has taken part in nothing so far."""
        return bool(self._unmet)

    def is_static(self, tensor: Tensor) -> bool:
        """Whether the tensor is computed from parameters and constants alone."""
        known = self._known.get(id(tensor))
        return known is None or known[2]

    def fresh(self, shape: Sequence[int], why: str = "") -> Dims:
        """Labels that no other tensor has; with a reason, labels that must stay."""
        dims = [self.labels.new(size) for size in shape]
        if why:
            for labels in dims:
                self.labels.fix(labels, why)
        return dims

    def mark(self, labels: Dim, role: Role) -> None:
        """Note what the parameters to which the labels belong do with their channels."""
        self._marks.setdefault(role, []).append(labels)

    def assign_roles(self) -> None:
        """Tell the parameters, at the end, what their dims do; of two roles the higher one wins."""
        sizes = [len(entry.dims[k]) for entry, k in self.places]
        owner = np.repeat(np.arange(len(sizes)), sizes)
        for role in sorted(self._marks, key=_RANK.__getitem__):
            labels = np.concatenate(self._marks[role])
            own = labels[(labels > 0) & (labels <= len(owner))]  # parameters were declared first
            marked = np.zeros(len(sizes), dtype=bool)
            marked[owner[own - 1]] = True
            for number in np.flatnonzero(marked):
                entry, k = self.places[number]
                entry.roles[k] = role

    # Modules

    @property
    def module(self) -> str:
        """The module at work."""
        return self._modules[-1][0] if self._modules else ""

    @property
    def owner(self) -> nn.Module | None:
        """The same, as an object."""
        return self._modules[-1][1] if self._modules else None

    def enter(self, name: str, module: nn.Module) -> None:
        """A module begins."""
        self._modules.append((name, module))

    def leave(self) -> None:
        """The module at work ends."""
        self._modules.pop()

    def begin_unwatched(self) -> None:
        """Another pass, of which the activations do not count."""
        self._modules.clear()
        self._watched = False

    def count_call(self, name: str) -> int:
        """How many times the module was called before."""
        self._calls[name] = self._calls.get(name, -1) + 1
        return self._calls[name]

    def see(self, side: Literal["input", "output"], tensors: Iterable[Tensor]) -> None:
        """Remember what the leaf module at work takes in or gives out."""
        call = self._calls[self.module]
        for position, tensor in enumerate(tensors if self._watched else ()):
            self.sightings.append(Sighting(self.module, side, call, position, self.dims(tensor)))

    # Numbers in the code

    def own(self, value: Any) -> Width | None:
        """The width, if the number remembers its origin and it lies in this trace."""
        return value if isinstance(value, Width) and value.ledger is self else None

    def require(self, value: int, target: Dim) -> None:
        """The code gives ``value`` as the size of the dim that has the labels ``target``."""
        width = self.own(value)
        if width is None:
            if self.labels.is_live(target):
                self.checks.append(Check(value, target, self.labels.context))
            return
        source = width.source if width.source is not None else self._follow(width, target)
        if source is None or source.shape[1] == len(target):
            self.checks.append(Check(value, target, self.labels.context, source))

    def require_same(self, value: int) -> None:
        """The code uses a number in a way that does not allow it to change."""
        if self.own(value) is not None:
            self.checks.append(Check(value, int(value), self.labels.context))

    def equate(self, check: Check) -> None:
        """Make a check hold by equating the dims between which the number mediates."""
        if check.source is not None and not isinstance(check.target, int):
            self.labels.context = check.context
            self.labels.equate(check.source, check.target[None])

    def attribute(self, path: str, value: int, kept: Kept) -> int:
        """What an attribute will be when only some labels are kept."""
        return kept(self.attributes[path]) if path in self.attributes else value

    def same(self, left: Width, right: int) -> None:
        """The code has found two numbers equal, and may rely on it."""
        if left.ledger is not self:
            return
        for one, other in ((left, right), (right, left)):
            width = self.own(one)
            if width is not None and width.source is not None and len(width.source) == 1:
                self.require(other, width.source[0])
                return
        self.checks.append(Check(left, right, self.labels.context))

    def number(self, width: Width) -> None:
        """The code computes a number that is no width from a width, such as a scale."""
        if width.ledger is self:
            self.numbers.append((width, self.labels.context))

    def mix_numbers(self) -> None:
        """Note, at the end, over which labels the numbers of the code are computed."""
        for width, context in self.numbers:
            self.labels.context = context
            for labels in self.labels_of(width):
                self.labels.mix(labels, "a number computed from the width")

    def labels_of(self, value: int) -> Iterator[Dim]:
        """The labels from which a number of the code was computed."""
        for leaf in leaves(value):
            if leaf.source is not None:
                yield leaf.source.reshape(-1)
            elif leaf.path in self.attributes:
                yield self.attributes[leaf.path]

    def _follow(self, width: Width, target: Dim) -> Dim | None:
        """Let the attribute in a number follow the target, if it does not follow another dim yet.

        Returns:
            What would have to be equated with the target, for the number to be right.
        """
        attributes = [leaf for leaf in width.leaves if leaf.path]
        if not attributes or not len(target):
            return None
        largest = max(attributes)
        size, path = int(largest), largest.path
        if size % len(target) == 0:
            known = self.attributes.setdefault(path, np.tile(target, size // len(target)))
            return known.reshape(-1, len(target)) if len(known) == size else None
        if len(target) % size == 0:
            self.attributes.setdefault(path, target[:size])  # whether it is so, the check will say
        return None


def kept_by(keeps: NDArray[np.bool_], solution: Solution) -> Kept:
    """Counts of kept labels, given a flag for each component."""
    return lambda labels: int(keeps[solution.of[np.maximum(labels, 0)]].sum())
