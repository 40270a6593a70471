"""Several tasks in one network: a backbone that is there once, and what each task sees of it.

A *pack* belongs to a network, and goes where the network goes: into copies, checkpoints and the compressed
file. It knows the weights of all tasks together, which of them each task sees, and the tensors that a task
has for itself (its last layer). The network itself always is one of its tasks; :func:`switch` makes it
another.

Two kinds of bookkeeping (one a pack):

- *owners*: a weight belongs to the task that trained it, or is free. Task k sees what belongs to tasks 1 to
  k.
- *masks*: every task has a mask of its own over the whole backbone.

As long as there is one task, whatever trains is that task's, also weights that were free.

The surprising rule: tensors that are neither (biases, normalization) are shared by all tasks. With two
tasks or more, whatever changes what is shared is refused when the network is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.select import Weight
from ..errors import InputError, ModelMismatch, UnknownName

#: A plain attribute of the root module, as the plan of a thinned network is.
_ATTRIBUTE = "lilliput_pack"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Pack:
    """What a network knows of its tasks; never changed, but replaced.

    Attributes:
        kind: ``"owners"`` or ``"masks"``.
        tasks: their names, in the order in which they came.
        current: the task that the network is now.
        weights: of the backbone, those of all tasks together.
        owners: number of the task that a weight belongs to, from 1; 0 is free. uint8.
        masks: by task, which weights it sees, bool.
        own: by task, the tensors that are its own.
        shared: all other tensors, as the tasks know them.
    """

    kind: str
    tasks: tuple[str, ...] = ()
    current: str = ""
    weights: Tensors = field(default_factory=dict)
    owners: Tensors = field(default_factory=dict)
    masks: dict[str, Tensors] = field(default_factory=dict)
    own: dict[str, Tensors] = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Pack:
        return self

    def number(self, task: str) -> int:
        """Of a task, from 1.

        Raises:
            UnknownName: the network has no such task.
        """
        if task not in self.tasks:
            raise UnknownName("task of this network", task, self.tasks)
        return self.tasks.index(task) + 1

    def sees(self, task: str) -> Tensors:
        """Which weights a task sees, bool."""
        number = self.number(task)
        if self.kind == "masks":
            return self.masks[task]
        return {n: (owner > 0) & (owner <= number) for n, owner in self.owners.items()}

    def state(self, task: str) -> Tensors:
        """The tensors of a task that differ from those of another: its weights, and its own."""
        return {
            **{n: torch.where(seen, self.weights[n], 0.0) for n, seen in self.sees(task).items()},
            **self.own[task],
        }

    def without(self, task: str) -> Pack:
        """The pack after a task has gone.

        Raises:
            InputError: later tasks see its weights, or it is the only one.
        """
        number, owners = self.number(task), self.owners
        if len(self.tasks) == 1:
            raise InputError(
                f"{task} is the only task of this network: there would be nothing left."
            )
        if self.kind == "owners" and number < len(self.tasks):
            later = ", ".join(self.tasks[number:])
            raise InputError(
                f"{task} cannot be removed before the tasks that build on its weights: {later}. Remove those "
                "first, the last one first."
            )
        if self.kind == "owners":
            owners = {n: owner.masked_fill(owner == number, 0) for n, owner in owners.items()}
        rest = tuple(name for name in self.tasks if name != task)
        weights = (
            {n: w * (owners[n] > 0) for n, w in self.weights.items()} if owners else self.weights
        )
        return replace(
            self, tasks=rest, current=self.current if self.current != task else rest[-1], owners=owners,
            weights=weights, masks={k: v for k, v in self.masks.items() if k != task},
            own={k: v for k, v in self.own.items() if k != task},
        )  # fmt: skip

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Pack:
        """The pack with ``change(name, tensor)`` in place of every tensor."""
        return self._over(lambda tensors: {n: change(n, t) for n, t in tensors.items()})

    def only(self, stays: Callable[[str], bool]) -> Pack:
        """The pack without the tensors of which ``stays(name)`` is false."""
        return self._over(lambda tensors: {n: t for n, t in tensors.items() if stays(n)})

    def _over(self, change: Callable[[Tensors], Tensors]) -> Pack:
        return replace(
            self, weights=change(self.weights), owners=change(self.owners), shared=change(self.shared),
            masks={task: change(tensors) for task, tensors in self.masks.items()},
            own={task: change(tensors) for task, tensors in self.own.items()},
        )  # fmt: skip

    def as_tree(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {**vars(self), "tasks": list(self.tasks)}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Pack:
        """The pack of :meth:`as_tree`."""
        return cls(**{**tree, "tasks": tuple(tree["tasks"])})


# -- the pack of a network ------------------------------------------------------------------------


def pack_of(model: nn.Module) -> Pack | None:
    """The pack that belongs to a network."""
    pack: Pack | None = vars(model).get(_ATTRIBUTE)
    return pack


def set_pack(model: nn.Module, pack: Pack | None) -> None:
    """Let a pack belong to a network, or none."""
    vars(model).pop(_ATTRIBUTE, None)
    if pack is not None:
        setattr(model, _ATTRIBUTE, pack)


def tasks_of(model: nn.Module) -> list[str]:
    """The tasks of a network, in the order in which they were added; none for an ordinary network.

    Example:
        >>> tasks_of(nn.Linear(2, 2))
        []
    """
    pack = pack_of(model)
    return [] if pack is None else list(pack.tasks)


def switch(model: nn.Module, task: str) -> nn.Module:
    """Let a network do another of its tasks, in place.

    Its last layer may get another width. Nothing is lost: every task can be switched back to.

    Args:
        model: with tasks; as :func:`lilliput.load` or :func:`lilliput.compress` returned it.
        task: one of :func:`tasks_of`.

    Returns:
        The model.

    Raises:
        InputError: the network has no tasks, or still trains; nothing is changed.
        UnknownName: it has no such task.
    """
    pack = _pack_that_is_there(model)
    state = pack.state(task)
    _refuse_encoded(model, state)
    fit(model, state)
    _store(model, state)
    set_pack(model, replace(pack, current=task))
    return model


def remove_task(model: nn.Module, task: str) -> nn.Module:
    """Forget a task of a network, in place; its weights are free again where no other task sees them.

    Args:
        model: with tasks.
        task: one of :func:`tasks_of`. If it is the current one the network becomes the last that is left.

    Raises:
        InputError: later tasks see its weights, it is the only one, or the network still trains; nothing is
            changed.
        UnknownName: the network has no such task.
    """
    pack = _pack_that_is_there(model)
    rest = pack.without(task)
    set_pack(model, rest)
    try:
        return switch(model, rest.current)
    except BaseException:
        set_pack(model, pack)
        raise


def settled(model: nn.Module, state: Tensors) -> Pack | None:
    """A network's pack with what has changed in the network since, for saving.

    Args:
        model: with or without a pack.
        state: its effective tensors.

    Raises:
        ModelMismatch: what several tasks share is no longer what they know.
    """
    pack = pack_of(model)
    if pack is None:
        return None
    pack = pack.mapped(lambda name, tensor: tensor.to(state[name].device))
    task, several = pack.current, len(pack.tasks) > 1
    pack = pack if several else _grown(pack, state)
    own = {name: state[name].detach().clone() for name in pack.own[task]}
    mine = {name: _mine(pack, name, several) for name in pack.weights}
    weights = {
        name: torch.where(mine[name], state[name], known) for name, known in pack.weights.items()
    }
    shared = {n: t for n, t in state.items() if n not in own and n not in weights}
    now = replace(pack, weights=weights, shared=shared, own={**pack.own, task: own})
    if several:
        _refuse_changed(pack, now.state(task), state)
    return now


def _grown(pack: Pack, state: Tensors) -> Pack:
    """The pack of an only task, which also sees what has been trained beside its weights since."""
    task, number = pack.current, pack.number(pack.current)
    beside = {n: (state[n] != 0) & ~seen for n, seen in pack.sees(task).items()}
    if pack.kind == "owners":
        return replace(
            pack, owners={n: o.masked_fill(beside[n], number) for n, o in pack.owners.items()}
        )
    return replace(pack, masks={task: {n: m | beside[n] for n, m in pack.masks[task].items()}})


def _mine(pack: Pack, name: str, several: bool) -> Tensor:
    """Which weights nobody but the current task sees."""
    if pack.kind == "owners":
        return pack.owners[name] == pack.number(pack.current)
    return (
        torch.full_like(pack.masks[pack.current][name], not several)
        & pack.masks[pack.current][name]
    )


def _refuse_changed(pack: Pack, expected: Tensors, state: Tensors) -> None:
    for name, known in {**pack.shared, **expected}.items():
        if not torch.equal(known, state[name].to(known)):
            raise ModelMismatch(
                f"{name} has changed, which the tasks {', '.join(pack.tasks)} share: the others would no "
                "longer be what they were. Train only through a method that adds a task, or save the task as "
                "a network of its own: remove the other tasks first (lilliput.remove_task)."
            )


# -- tensors and widths ---------------------------------------------------------------------------


def fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network's layers as many outputs as they have in a state.

    Nothing else is changed: inputs that are more than in the state may go by a plan later, and whoever fills
    the network compares all shapes and names.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        old = None if module is None else module._parameters.get(leaf)
        if module is None or old is None or old.ndim != value.ndim or not value.numel():
            continue
        if len(old) != len(value):
            wide = old.new_empty(len(value), *old.shape[1:])
            module._parameters[leaf] = nn.Parameter(wide, old.requires_grad)
            if isinstance(module, nn.Linear) and leaf == "weight":
                module.out_features = len(value)


def tensors_inside(model: nn.Module, layers: list[str]) -> Iterator[str]:
    """The names of the parameters and buffers of some modules, of encoded ones those that they stand for."""
    for layer in layers:
        module = model.get_submodule(layer)
        if parametrize.is_parametrized(module):
            stacks: Any = module.parametrizations
            yield from (f"{layer}.{leaf}".lstrip(".") for leaf in stacks)
        for leaf in (*module._parameters, *module._buffers):
            if module._parameters.get(leaf) is not None or module._buffers.get(leaf) is not None:
                yield f"{layer}.{leaf}".lstrip(".")


def _tensors_of(model: nn.Module) -> Tensors:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _refuse_encoded(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = _tensors_of(model)
    for name in state:
        if name not in own:
            layer, _, leaf = name.rpartition(".")
            kinds = [e.kind for e in Weight(layer, model.get_submodule(layer), leaf).encodings()]
            raise InputError(
                f"{name} is encoded ({', '.join(kinds)}): the network still trains. Switch the network that "
                "compress returned, or one that was loaded."
            )


@torch.no_grad()
def _store(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = _tensors_of(model)
    for name, value in state.items():
        own[name].copy_(value)


def _pack_that_is_there(model: nn.Module) -> Pack:
    pack = pack_of(model)
    if pack is None:
        raise InputError(
            f"this {type(model).__name__} holds no tasks. A network gets them by the methods packnet and "
            "piggyback, and lilliput.load keeps them."
        )
    return pack
