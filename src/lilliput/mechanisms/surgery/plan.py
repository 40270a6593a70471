"""Which channels and modules of a network are left: enough to thin a fresh instance of its class.

A plan counts from the network as its class builds it, however many cuts led to it. It travels with the
model (as the plain attribute ``lilliput_plan`` of the root module), with checkpoints and with artifacts.

The surprising rule: a plan from a file is not trusted. Whatever it says, a network is thinned by it
whole or not at all, and it can only take away.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import CorruptArtifact, ModelMismatch, SurgeryFailed
from ..packing import pack_of, set_pack
from .attributes import set_attributes, set_sizes
from .modules import find_module, outermost, remove_modules, within
from .refusals import refuse
from .tensors import Kept, cut_tensors, part, shape_of
from .transaction import transaction

_ATTRIBUTE = "lilliput_plan"
#: Indices that a plan in a file may name in all, so that a small file cannot ask for much memory.
_MOST_INDICES = 1 << 26
#: Modules that a plan in a file may take away, each name being compared with each tensor's.
_MOST_MODULES = 1 << 12
_KEYS = frozenset({"sets", "tensors", "attributes", "removed"})
_SET = re.compile(r"(?:([1-9][0-9]{0,8}):)?(?:([1-9][0-9]{0,8})\*)?([A-Za-z0-9+/]+)", re.ASCII)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is left of a network.

    Attributes:
        kept: tensor -> dim -> the indices that stay, int64, ascending. Names are those of the plain
            network, without encodings; of tied tensors the first.
        attributes: integers of modules that are no longer what their class sets.
        sizes: tensor -> dim -> its size in the whole network, where that is known.
        removed: modules that are gone, an identity in the place of each; none inside of another one,
            and nothing else in the plan inside of one.
    """

    kept: Kept = field(repr=False)
    attributes: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[int, int]] = field(default_factory=dict, repr=False)
    removed: tuple[str, ...] = ()

    def __deepcopy__(self, memo: Any) -> Plan:
        return self  # nobody changes it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    def then(self, later: Plan) -> Plan:
        """One plan for this one and another that counts from what this one leaves."""
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        for name, dims in later.kept.items():
            mine = kept.setdefault(name, {})
            for dim, index in dims.items():
                mine[dim] = mine[dim][index] if dim in mine else index
        names = {**self.sizes, **later.sizes}
        sizes = {n: {**later.sizes.get(n, {}), **self.sizes.get(n, {})} for n in names}
        both = Plan(kept, {**self.attributes, **later.attributes}, sizes)
        return both._without((*self.removed, *later.removed))

    def _without(self, removed: tuple[str, ...]) -> Plan:
        """The same once modules are gone: nothing is said of what was inside."""
        gone = within(removed)
        return Plan(
            {name: dims for name, dims in self.kept.items() if not gone(name)},
            {path: value for path, value in self.attributes.items() if not gone(path)},
            {name: dims for name, dims in self.sizes.items() if not gone(name)},
            outermost(removed),
        )

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form that is small: each set of indices is written once, as a bitmap."""
        sets: dict[str, int] = {}
        tensors = {
            name: [
                sets.setdefault(self._text(name, dim), len(sets)) if dim in dims else None
                for dim in range(max(dims) + 1)
            ]
            for name, dims in self.kept.items()
        }
        plan: dict[str, Any] = {"sets": list(sets), "tensors": tensors}
        plan |= {"attributes": dict(self.attributes)} if self.attributes else {}
        return plan | ({"removed": sorted(self.removed)} if self.removed else {})

    def _text(self, name: str, dim: int) -> str:
        return _to_text(self.kept[name][dim], self.sizes.get(name, {}).get(dim, 0))

    @classmethod
    def from_dict(cls, value: Any) -> Plan:
        """Read what :meth:`as_dict` wrote, with distrust.

        Raises:
            CorruptArtifact: it is something else.
        """
        if not isinstance(value, dict) or not value.keys() <= _KEYS:
            raise _corrupt(f"it is {value!r:.60}")
        texts, tensors = value.get("sets"), value.get("tensors")
        attributes = value.get("attributes", {})
        if not isinstance(texts, list) or not isinstance(tensors, dict):
            raise _corrupt("its sets or its tensors are missing")
        if not isinstance(attributes, dict) or not all(type(v) is int for v in attributes.values()):
            raise _corrupt(f"its attributes are {attributes!r:.60}")
        sets = _from_texts(texts)
        chosen = {name: _dims(name, row, sets) for name, row in tensors.items()}
        kept = {n: {dim: index for dim, (index, _) in dims.items()} for n, dims in chosen.items()}
        sizes = {
            n: {d: size for d, (_, size) in dims.items() if size} for n, dims in chosen.items()
        }
        return cls(kept, attributes, sizes, _names(value.get("removed", []), kept, attributes))


def plan_of(model: nn.Module) -> Plan | None:
    """What is left of the model since its class built it, its thinned parts included; None for a whole one.

    Example:
        >>> plan_of(nn.Linear(2, 2)) is None
        True
    """
    own = last_plan(model)
    if own is not None:
        return own
    parts = [(f"{n}.", plan) for n, m in model.named_modules() if (plan := last_plan(m)) and n]
    outer = [(n, p) for n, p in parts if not any(n != o and n.startswith(o) for o, _ in parts)]
    return _inside(outer) if outer else None


def checked_plan(model: nn.Module) -> Plan | None:
    """What :func:`plan_of` says, after a look whether the model still is as the plan says.

    Raises:
        ModelMismatch: it is not; a fresh network that is thinned by the plan would be another one.
    """
    plan = plan_of(model)
    stale = None if plan is None else next(_stale(model, plan), None)
    if stale is not None:
        raise ModelMismatch(
            f"{stale} differs from the plan of what is left of this {type(model).__name__}: that part was "
            "cut or replaced on its own after the network around it was cut, and what would be saved now "
            "could not be loaded. Cut the network as a whole instead, or save the part alone."
        )
    return plan


def _stale(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Tensors and modules that are other than the plan says, or that a later plan of a part names."""
    gone = within(plan.removed)
    for name, dims in plan.kept.items():
        try:
            shape = shape_of(model, name)
        except ModelMismatch:  # its module is another one now
            shape = torch.Size()
        if any(shape[dim : dim + 1] != (len(index),) for dim, index in dims.items()):
            yield name
    yield from (n for n in plan.removed if type(find_module(model, n)) is not nn.Identity)
    for path, module in model.named_modules():
        own = last_plan(module)
        if own is None or not path:
            continue
        inner = _inside([(f"{path}.", own)])
        yield from (n for n in inner.removed if not gone(n))
        for name, dims in inner.kept.items():
            if not gone(name) and not dims.keys() <= plan.kept.get(name, {}).keys():
                yield name


def last_plan(model: nn.Module) -> Plan | None:
    """What the last cut of the model itself has left: after every cut another object."""
    plan = vars(model).get(_ATTRIBUTE)
    return plan if isinstance(plan, Plan) else None


def _inside(parts: list[tuple[str, Plan]]) -> Plan:
    """The plans of thinned networks that became parts of another one."""
    return Plan(
        {name + tensor: dims for name, plan in parts for tensor, dims in plan.kept.items()},
        {name + path: value for name, plan in parts for path, value in plan.attributes.items()},
        {name + tensor: dims for name, plan in parts for tensor, dims in plan.sizes.items()},
        tuple(sorted(name + module for name, plan in parts for module in plan.removed)),
    )


def remember(model: nn.Module, plan: Plan) -> None:
    """Let the model carry a plan."""
    setattr(model, _ATTRIBUTE, plan)


def apply_plan(
    model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Thin a fresh network, or one that was thinned by a part of the plan, as another one was.

    Encodings are cut along; what the tensors hold afterwards is a part of what they held.

    Args:
        model: an instance of the class of the network that the plan was made on.
        plan: what is to be left.
        optimizer: what trains the model; its state is cut along.

    Raises:
        ModelMismatch: the plan does not fit the model, which is as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> rows = {0: np.array([0, 2])}
        >>> apply_plan(net, Plan({"0.weight": rows, "0.bias": rows, "1.weight": {1: rows[0]}}))
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    refuse(model, None)
    with transaction(model, optimizer), torch.inference_mode(False):
        todo, done = _still_to_do(model, plan), plan_of(model)
        perform(model, todo, optimizer)
        remember(model, todo if done is None else done.then(todo))


def perform(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None) -> None:
    """Cut tensors, correct the numbers of their modules, take modules away; call it in a transaction.

    Raises:
        ModelMismatch: the plan does not fit.
        SurgeryFailed: a tensor or a layer cannot be cut.
    """
    _cut_pack(model, plan)
    cut_tensors(model, plan.kept, optimizer)
    set_attributes(model, plan.attributes)
    set_sizes(model, (name.rpartition(".")[0] for name in plan.kept))
    remove_modules(model, plan.removed, optimizer)


def _cut_pack(model: nn.Module, plan: Plan) -> None:
    """Cut what a network knows of its only task; of several it would have to be right for all of them."""
    pack, gone = pack_of(model), within(plan.removed)
    if pack is None or not (plan.kept or plan.removed):
        return
    if len(pack.tasks) > 1:
        raise SurgeryFailed(
            f"the network holds the tasks {', '.join(pack.tasks)}: what is removed for one of them the "
            "others would miss. Remove channels before the second task is added. The model is as it was."
        )
    known = pack.only(lambda name: not gone(name))
    set_pack(model, known.mapped(lambda name, t: part(t, t.shape, plan.kept.get(name, {}))))


def _still_to_do(model: nn.Module, plan: Plan) -> Plan:
    """The plan, counted from the model as it is now."""
    done, gone = plan_of(model) or Plan({}), within(plan.removed)
    for name, dims in done.kept.items():
        if not gone(name) and not dims.keys() <= plan.kept.get(name, {}).keys():
            raise _thinner(model, f"channels of {name}")
    for name in done.removed:
        if not gone(name):
            raise _thinner(model, name)
    kept: dict[str, dict[int, np.ndarray]] = {}
    sizes: dict[str, dict[int, int]] = {}
    for name, dims in plan.kept.items():
        shape = shape_of(model, name)
        sizes[name] = dict(enumerate(shape))
        before = done.kept.get(name, {})
        whole = {**sizes[name], **done.sizes.get(name, {})}
        for dim, size in plan.sizes.get(name, {}).items():
            if whole.get(dim) != size:
                raise ModelMismatch(
                    f"{name} has {whole.get(dim)} of {size} indices in dim {dim} in this "
                    f"{type(model).__name__}: it was not built as the network that the plan thins."
                )
        kept[name] = {d: _within(model, name, before.get(d), index) for d, index in dims.items()}
    left = tuple(name for name in plan.removed if name not in done.removed)
    return Plan(kept, plan.attributes, sizes, left)


def _within(model: nn.Module, name: str, done: np.ndarray | None, kept: np.ndarray) -> np.ndarray:
    if done is None:
        return kept
    places = np.searchsorted(done, kept)
    if places[-1] >= len(done) or not np.array_equal(done[places], kept):
        raise _thinner(model, f"channels of {name}")
    return places


def _thinner(model: nn.Module, what: str) -> ModelMismatch:
    return ModelMismatch(
        f"this {type(model).__name__} has already lost {what} that the plan keeps: give a fresh "
        "instance of its class."
    )


def _to_text(kept: np.ndarray, size: int) -> str:
    """``size:run*bitmap``: a bitmap in base64 of runs of equal bits, which is short after a flatten."""
    bits = np.zeros(size or int(kept[-1]) + 1, bool)
    bits[kept] = True
    run = int(np.gcd.reduce([*(np.flatnonzero(np.diff(bits)) + 1), len(bits)]))
    text = base64.b64encode(np.packbits(bits[::run]).tobytes()).decode().rstrip("=")
    return (f"{size}:" if size else "") + (f"{run}*" if run > 1 else "") + text


def _from_texts(texts: list[Any]) -> list[tuple[np.ndarray, int]]:
    """The indices of each set, and the size of its dim where that is known."""
    sets, room = [], _MOST_INDICES
    for text in texts:
        found = _SET.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise _corrupt(f"a set of indices is {text!r:.40}")
        size, run, bitmap = int(found[1] or 0), int(found[2] or 1), found[3]
        room -= run * 8 * len(bitmap)
        if room < 0:
            raise _corrupt("it names more indices than any network has")
        index = np.flatnonzero(np.repeat(_bits(bitmap), run))
        if len(index) == 0 or (size and index[-1] >= size):
            raise _corrupt(f"a set of indices is empty or too long: {text!r:.40}")
        sets.append((index, size))
    return sets


def _bits(bitmap: str) -> np.ndarray:
    try:
        data = base64.b64decode(bitmap + "=" * (-len(bitmap) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _corrupt(f"a set of indices is no base64: {bitmap!r:.40}") from error
    return np.unpackbits(np.frombuffer(data, np.uint8))


def _dims(
    name: str, row: Any, sets: list[tuple[np.ndarray, int]]
) -> dict[int, tuple[np.ndarray, int]]:
    if not isinstance(row, list) or not row or len(row) > 16:
        raise _corrupt(f"the dims of {name!r} are {row!r:.40}")
    for number in row:
        if number is not None and (type(number) is not int or not 0 <= number < len(sets)):
            raise _corrupt(f"{name!r} has the set {number!r:.40} of {len(sets)}")
    return {dim: sets[number] for dim, number in enumerate(row) if number is not None}


def _names(names: Any, kept: Kept, attributes: Mapping[str, int]) -> tuple[str, ...]:
    """The modules that a plan takes away: each once, and nothing else is said of what is inside."""
    if not isinstance(names, list) or len(names) > _MOST_MODULES:
        raise _corrupt(f"its removed modules are {names!r:.60}")
    if not all(isinstance(name, str) and name for name in names):
        raise _corrupt(f"its removed modules are {names!r:.60}, and not names")
    if len(outermost(names)) != len(names):
        raise _corrupt(f"of its removed modules {names!r:.60} one lies inside of another one")
    inside = next(filter(within(names), (*kept, *attributes)), None)
    if inside is not None:
        raise _corrupt(f"it says what is left of {inside!r:.60}, and that its module is gone")
    return outermost(names)


def _corrupt(what: str) -> CorruptArtifact:
    return CorruptArtifact(
        f"the plan of the network's channels is broken: {what}. Get the file again from its source, or "
        "save the model again."
    )
