"""Whole modules taken away where they only pass their input on.

The surprising rule: a module goes as a whole, or not at all. Where it adds a constant to its input, the
constant is first silenced (``silenced``) or brought elsewhere (``edit``); the network without the module is
then compared with that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.collector import paused_collector
from ...errors import InputError, LilliputError, ModelMismatch, SurgeryFailed, did_you_mean
from .check import answers, relative_error
from .modules import find_module, outermost, within
from .plan import Plan, perform, plan_of, remember
from .refusals import refuse
from .transaction import rehearsal, transaction

Edit = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Bypass:
    """What taking modules away did.

    Attributes:
        plan: what is left of the network as it was before.
        error: the largest difference between the network without the modules and the one with them,
            relative to the largest output; None where nothing was compared.
        moved: how far silencing moved the output, in the same unit; None where nothing was silenced.
    """

    plan: Plan
    error: float | None
    moved: float | None


@paused_collector()
def bypass(
    model: nn.Module,
    names: str | Collection[str],
    inputs: Any = None,
    *,
    silenced: Collection[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
    edit: Edit | None = None,
    tolerance: float | None = 1e-5,
) -> Bypass:
    """Take modules away that only pass their input on, in place: all of them or nothing.

    Each makes room for ``nn.Identity()``. Its parameters, encodings and optimizer state are dropped.

    Args:
        model: any module; the parameters that stay are the same objects.
        names: of modules inside it, such as ``"layer1.1"``.
        inputs: an example for the self-check; None leaves it out.
        silenced: modules inside of those, whose answers count as zeros in the comparison.
        optimizer: what trains the model.
        edit: changes values of what stays, through :func:`replace`, as a part of the transaction; it
            is rehearsed first, so it is called twice.
        tolerance: relative error that the self-check allows; None leaves it out.

    Returns:
        What was done. :func:`plan_of` has the sum of all cuts so far.

    Raises:
        InputError: the names, the model, the optimizer or the moment do not allow it.
        ModelMismatch: a tensor of a module is used outside too, or the model cannot run on the inputs.
        SurgeryFailed: without a module the network would do something else, or anything else went
            wrong. In every case, also when Ctrl-C interrupts, the model and the optimizer are bit for
            bit as they were.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU()))
        >>> bypass(net, "2", torch.randn(4, 2)).error
        0.0
        >>> net[2], plan_of(net).removed
        (Identity(), ('2',))
    """
    refuse(model, optimizer)
    gone = _checked(model, [names] if isinstance(names, str) else names, silenced)
    plan = Plan({}, removed=gone)
    with transaction(model, optimizer), torch.inference_mode(False), _told(gone):
        error = moved = None
        if inputs is not None and tolerance is not None:
            error, moved = _self_check(model, plan, inputs, silenced, edit, tolerance)
        perform(model, plan, optimizer)
        done = plan_of(model)
        remember(model, plan if done is None else done.then(plan))
        if edit is not None:
            edit(model)
        return Bypass(plan, error, moved)


def _checked(
    model: nn.Module, names: Collection[str], silenced: Collection[str]
) -> tuple[str, ...]:
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for name in (*names, *silenced):
        if find_module(model, name) is None:
            raise InputError(
                f"there is no module {name!r} in {type(model).__name__} that could be taken away."
                f"{did_you_mean(name, known)}"
            )
    gone = outermost(names)
    if not gone:
        raise InputError("no module to take away: name at least one.")
    if outside := [name for name in silenced if not within(gone)(name)]:
        raise InputError(
            f"{outside[0]} is to be silent and would stay: only what lies inside of a module that goes "
            "can be silenced."
        )
    return gone


@contextmanager
def _told(names: tuple[str, ...]) -> Iterator[None]:
    """Say of an unforeseen error that it was in surgery, and where."""
    try:
        yield
    except LilliputError:
        raise
    except Exception as error:
        raise SurgeryFailed(
            f"taking {_listed(names)} away failed: {type(error).__name__}: {error}. The model is as it was."
        ) from error


def _self_check(
    model: nn.Module,
    plan: Plan,
    inputs: Any,
    silenced: Collection[str],
    edit: Edit | None,
    tolerance: float,
) -> tuple[float, float | None]:
    """Rehearse it: two forward passes, three where something is silenced.

    Returns:
        The error, and how far silencing moved the output.
    """
    reference, seen = _with(model, plan.removed, silenced, inputs)
    moved = relative_error(reference, answers(model, inputs)) if silenced else None
    error, problem = math.nan, None
    try:
        error = relative_error(_without(model, plan, edit, inputs), reference)
    except LilliputError:
        raise
    except Exception as failure:
        problem = failure
    if problem is not None or not error <= tolerance:
        raise _explained(seen, error, tolerance, problem) from problem
    return error, moved


def _with(
    model: nn.Module, names: tuple[str, ...], silenced: Collection[str], inputs: Any
) -> tuple[list[Tensor], dict[str, float]]:
    """The network's answers, and how far those of each module are from what went in."""
    seen: dict[str, float] = {}
    with rehearsal(model):  # at its end, the hooks are gone
        for name in silenced:
            _module(model, name).register_forward_hook(_silence)
        for name in names:
            _compare_ends(_module(model, name), name, seen)
        try:
            found = answers(model, inputs)
        except LilliputError:
            raise
        except Exception as error:
            raise ModelMismatch(
                f"the model cannot run on the example inputs: {type(error).__name__}: {error}. Give "
                "inputs as its forward takes them, or leave them out to skip the self-check."
            ) from error
    _refuse_unused(names, seen)
    return found, seen


def _without(model: nn.Module, plan: Plan, edit: Edit | None, inputs: Any) -> list[Tensor]:
    """The answers of the network that is left."""
    gone, ran = {name: _module(model, name) for name in plan.removed}, set[str]()
    with rehearsal(model):
        perform(model, plan, None)
        if edit is not None:
            edit(model)
        for name, module in gone.items():
            module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
        found = answers(model, inputs)
    if ran:
        raise SurgeryFailed(
            f"the network holds {_listed(sorted(ran))} in another place too and calls it there: an "
            "identity would change nothing. The model is as it was. Leave it in the network."
        )
    return found


def _compare_ends(module: nn.Module, name: str, seen: dict[str, float]) -> None:
    """Note the largest relative difference between answer and input over all calls of a module."""
    entered: list[list[Tensor]] = []

    def enter(module: nn.Module, args: Any, named: Any) -> None:
        # A copy: the module may work in place.
        entered.append([t.clone() for t in pytree.tree_leaves((args, named)) if torch.is_tensor(t)])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        left = [t for t in pytree.tree_leaves(output) if torch.is_tensor(t)]
        error = relative_error(left, entered.pop())
        seen[name] = max(seen.get(name, 0.0), math.inf if math.isnan(error) else error)

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


def _silence(module: nn.Module, args: Any, output: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.zeros_like, output)


def _refuse_unused(names: tuple[str, ...], seen: dict[str, float]) -> None:
    unused = [name for name in names if name not in seen]
    if unused:
        raise SurgeryFailed(
            f"{_listed(unused)} does not run on the example inputs, so nothing can be said of the "
            "network without it. The model is as it was. Give inputs on which it runs."
        )


def _explained(
    seen: dict[str, float], error: float, tolerance: float, problem: Exception | None
) -> SurgeryFailed:
    """The error for a network that needs a module: the first one that does not pass its input on."""
    name = next((n for n, own in seen.items() if not own <= tolerance), next(iter(seen)))
    how = f"relative error {error:.1e}, where {tolerance:.0e} is allowed"
    if problem is not None:
        how = f"{type(problem).__name__}: {problem}"
    own = f"differs from its input by {seen[name]:.1e}"
    if math.isinf(seen[name]):
        own = "has another shape than its input"
    return SurgeryFailed(
        f"without {name} the network would not do the same: {how}. On the example inputs the module's "
        f"answer {own}. The model is as it was. Leave the module in the network, or name what inside "
        "it is to be silenced."
    )


def _module(model: nn.Module, name: str) -> nn.Module:
    module = find_module(model, name)
    assert module is not None
    return module


def _listed(names: Collection[str]) -> str:
    shown = list(names)[:5]
    return ", ".join(shown) + (" …" if len(names) > len(shown) else "")
