"""Whole modules taken away: an identity stands in the place of each.

The surprising rule: an optimizer keeps a parameter group that becomes empty. Schedulers and checkpoints
count groups, and must find as many as before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import ModelMismatch


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """The names without those that lie inside of another one, in alphabetical order.

    Example:
        >>> outermost(["b.c", "a", "b", "b.c.d"])
        ('a', 'b')
    """
    found: list[str] = []
    for name in sorted(set(names), key=lambda n: n.split(".")):  # what is inside comes next
        if not found or not within(found[-1:])(name):
            found.append(name)
    return tuple(sorted(found))


def within(modules: Collection[str]) -> Callable[[str], bool]:
    """Tells of the name of a tensor, an attribute or a module whether one of the modules holds it.

    Example:
        >>> [within(["a.b"])(name) for name in ("a.b", "a.b.weight", "a.bc")]
        [True, True, False]
    """
    starts = tuple(f"{name}." for name in modules)
    return lambda name: f"{name}.".startswith(starts)


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """A module below the model; None where there is none, and for the parts of a parametrization."""
    found: nn.Module | None = model
    for part in name.split("."):
        if found is None or (part == "parametrizations" and parametrize.is_parametrized(found)):
            return None
        found = found._modules.get(part)
    return found


def remove_modules(
    model: nn.Module, names: Collection[str], optimizer: torch.optim.Optimizer | None
) -> None:
    """Put identities in the places of modules, and let the optimizer forget their parameters.

    Raises:
        ModelMismatch: there is no such module, or a tensor of it is used elsewhere too.
    """
    if not names:
        return
    gone = {name: _found(model, name) for name in names}
    _refuse_shared(model, names)
    for name, module in gone.items():
        path, _, leaf = name.rpartition(".")
        parent = find_module(model, path) if path else model
        assert parent is not None
        parent._modules[leaf] = nn.Identity().train(module.training)
    if optimizer is not None:
        _forget(optimizer, {id(p) for module in gone.values() for p in module.parameters()})


def _found(model: nn.Module, name: str) -> nn.Module:
    module = find_module(model, name)
    if module is None or module is model:
        raise ModelMismatch(
            f"{type(model).__name__} has no module {name!r:.100} inside that could be taken away: the "
            "plan is of another network."
        )
    return module


def _refuse_shared(model: nn.Module, names: Collection[str]) -> None:
    """Raise where a tensor of the modules has another name outside: half of it would go."""
    leaves = within(names)
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    going = {id(tensor): name for name, tensor in tensors if leaves(name)}
    for name, tensor in tensors:
        if id(tensor) in going and not leaves(name):
            raise ModelMismatch(
                f"{going[id(tensor)]} is tied: {name} is the same tensor, and would stay. Take all "
                "modules away that use it, or none."
            )


def _forget(optimizer: torch.optim.Optimizer, gone: set[int]) -> None:
    for group in optimizer.param_groups:
        parameters: list[Tensor] = group["params"]
        stays = [id(parameter) not in gone for parameter in parameters]
        lists: list[list[Any]] = [parameters, *([n] if (n := group.get("param_names")) else [])]
        for each in lists:
            each[:] = [item for item, left in zip(each, stays, strict=True) if left]
    for parameter in [p for p in optimizer.state if id(p) in gone]:
        del optimizer.state[parameter]
