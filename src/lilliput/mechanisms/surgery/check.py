"""The self-check: a network that was cut against the whole one with the same channels silenced.

The surprising rule: a channel is silenced where it is *used*, not where it is made: its columns in the
next weights become zero. That is what its absence means, whatever lies between (a batch normalization
makes a constant of a zero, and the constant would arrive).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from ...core.select import Weight, example_device
from ...core.task import call
from ...errors import LilliputError, ModelMismatch, SurgeryFailed
from ..encodings import strip
from .tensors import owner
from .transaction import rehearsal, surely

if TYPE_CHECKING:
    from ..groups.classes import Groups, Removal

    _Remove = Callable[[nn.Module, Groups, Removal], None]

#: Of a call of a module without children: its name, and the tensors that it answered.
_Call = tuple[str, list[Tensor]]


def self_check(
    model: nn.Module,
    groups: Groups,
    removal: Removal,
    inputs: Any,
    tolerance: float,
    remove: _Remove,
) -> float | None:
    """Rehearse a removal: compare what can be compared, and run all of it.

    Groups over which an operator takes a statistic are left out of the comparison, for silenced
    channels still count there. Two forward passes, three where only a part can be compared.

    Returns:
        The largest difference relative to the largest output; None where nothing can be compared.

    Raises:
        ModelMismatch: the model cannot run on the inputs as it is.
        SurgeryFailed: without the channels it fails, or answers something else; the message names
            the first layer that does.
    """
    comparable = {n: gone for n, gone in removal.items() if not groups.groups[n].mixed_by}
    reference = _reference(model, groups, comparable, inputs)
    error = None
    if comparable:
        error = _compare(model, groups, comparable, inputs, tolerance, remove, reference)
    if len(comparable) < len(removal):
        _compare(model, groups, removal, inputs, math.inf, remove, reference)
    return error


def answers(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What a model answers in eval mode and full precision; it stays as it is."""
    from ..groups.classes import Groups

    with _rehearsed(model, Groups(()), {}):
        return _tensors(call(model, _widened(inputs)))


def relative_error(answer: list[Tensor], reference: list[Tensor]) -> float:
    """The largest difference over the largest magnitude, of all tensors; NaN where shapes differ."""
    if [a.shape for a in answer] != [r.shape for r in reference]:
        return math.nan
    return max((_difference(a, r) for a, r in zip(answer, reference, strict=True)), default=0.0)


def _reference(model: nn.Module, groups: Groups, silenced: Removal, inputs: Any) -> list[Tensor]:
    try:
        with _rehearsed(model, groups, silenced):
            return _tensors(call(model, _widened(inputs)))
    except LilliputError:
        raise
    except Exception as error:
        _, where, _ = _watched(model, groups, silenced, inputs)
        if not where:  # not the model failed
            raise
        raise ModelMismatch(
            f"the model cannot run on the example inputs: {_first_line(error)}, in {where}. Give inputs "
            "as its forward takes them, or leave them out to cut without the self-check."
        ) from error


def _compare(
    model: nn.Module,
    groups: Groups,
    removal: Removal,
    inputs: Any,
    tolerance: float,
    remove: _Remove,
    reference: list[Tensor],
) -> float:
    """The error without the channels; raise SurgeryFailed above the tolerance."""
    error, problem = math.nan, None
    with rehearsal(model):
        remove(model, groups, removal)
        try:
            with _rehearsed(model, groups, {}):
                error = relative_error(_tensors(call(model, _widened(inputs))), reference)
        except Exception as failure:
            problem = failure
    if problem is not None or not error <= tolerance:
        raise _explained(model, groups, removal, inputs, tolerance, remove) from problem
    return error


def _explained(
    model: nn.Module,
    groups: Groups,
    removal: Removal,
    inputs: Any,
    tolerance: float,
    remove: _Remove,
) -> SurgeryFailed:
    """The error of a network that runs differently without channels; both run again, watched."""
    before, _, _ = _watched(model, groups, removal, inputs)
    with rehearsal(model):
        remove(model, groups, removal)
        after, failing, reason = _watched(model, groups, {}, inputs)
    name, how = failing, reason
    if not failing:
        there = _removed_at_sites(groups, removal)
        name, how = _first_deviation(before, after, there, tolerance) or (
            type(model).__name__,
            "its layers agree, its output does not",
        )
    return SurgeryFailed(
        f"without the removed channels the network would not do the same; first in {name}: {how}. The "
        f"model is as it was. Leave {name} and the layers that it reads out of the removal, or skip the "
        "self-check (tolerance=None) if this is meant."
    )


@contextlib.contextmanager
def _rehearsed(model: nn.Module, groups: Groups, silenced: Removal) -> Iterator[None]:
    """The model in eval mode, in memory of its own and in full precision, until the block ends."""
    with (
        rehearsal(model),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(example_device(model).type, enabled=False),
        _true_float32(),
    ):
        model.eval()
        places = _used_places(groups, silenced)
        for name, _, _ in places:
            _make_plain(model, name)
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            tensor.data = _wide(tensor.detach()).clone()
        for name, dim, index in places:
            tensor = getattr(*owner(model, name))
            tensor.index_fill_(dim, torch.from_numpy(index).to(tensor.device), 0)
        yield


@contextlib.contextmanager
def _true_float32() -> Iterator[None]:
    """Let float32 be multiplied as float32: the shorter formats inside round by a thousandth."""
    switches = _switches(torch.backends)
    before = [getattr(library, name) for library, name, _ in switches]
    try:
        for library, name, value in switches:
            setattr(library, name, value)
        yield
    finally:
        surely(lambda: _set(switches, before))


def _set(switches: list[tuple[Any, str, Any]], values: list[Any]) -> None:
    for (library, name, _), value in zip(switches, values, strict=True):
        setattr(library, name, value)


def _switches(backends: Any) -> list[tuple[Any, str, Any]]:
    """Library, attribute and value of each switch of torch for short formats."""
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    if not hasattr(matmul, "fp32_precision"):  # before torch 2.9
        return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    libraries = (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return [(library, "fp32_precision", "ieee") for library in libraries]


def _used_places(groups: Groups, removal: Removal) -> list[tuple[str, int, np.ndarray]]:
    """Tensor, dim and indices where the removed channels enter a product."""
    return [
        (member.tensor, member.dim, member.index[gone].reshape(-1))
        for number, gone in removal.items()
        for group in [groups.groups[number]]
        for member in group.members
        if member.role == "uses" or group.pairwise
    ]


def _make_plain(model: nn.Module, name: str) -> None:
    module, leaf = owner(model, name)
    if parametrize.is_parametrized(module, leaf):
        strip(Weight(name, module, leaf))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _widened(inputs: Any) -> Any:
    return pytree.tree_map_only(Tensor, _wide, inputs)


def _tensors(output: Any) -> list[Tensor]:
    return [t.detach() for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def _difference(answer: Tensor, reference: Tensor) -> float:
    answer, reference = answer.double().reshape(-1), reference.double().reshape(-1)
    same = (answer == reference) | (answer.isnan() & reference.isnan())
    differing = (answer - reference)[~same].abs()
    if not len(differing):
        return 0.0
    scale = reference[reference.isfinite()].abs()
    largest = float(scale.max()) if len(scale) else 0.0
    error = float(differing.max()) / (largest or 1.0)
    return math.inf if math.isnan(error) else error


def _watched(
    model: nn.Module, groups: Groups, silenced: Removal, inputs: Any
) -> tuple[list[_Call], str, str]:
    """The answers of all layers; where the run fails, the innermost layer and the reason."""
    calls: list[_Call] = []
    running: list[str] = []
    with _rehearsed(model, groups, silenced):
        for name, module in model.named_modules():
            _watch(name or type(model).__name__, module, calls, running)
        try:
            call(model, _widened(inputs))
        except Exception as error:
            return calls, running[-1] if running else type(model).__name__, _first_line(error)
    return calls, "", ""


def _watch(name: str, module: nn.Module, calls: list[_Call], running: list[str]) -> None:
    def enter(module: nn.Module, inputs: Any) -> None:
        running.append(name)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()
        if not module._modules:
            calls.append((name, _tensors(output)))

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _removed_at_sites(
    groups: Groups, removal: Removal
) -> dict[tuple[str, int, int], list[tuple[int, np.ndarray]]]:
    """Module, call and position of an answer -> its dims with the indices that were removed."""
    found: dict[tuple[str, int, int], list[tuple[int, np.ndarray]]] = {}
    for number, gone in removal.items():
        for site in groups.groups[number].sites:
            if site.side == "output":
                place = found.setdefault((site.module, site.call, site.position), [])
                place.append((site.dim, site.index[gone].reshape(-1)))
    return found


def _first_deviation(
    before: list[_Call],
    after: list[_Call],
    removed: dict[tuple[str, int, int], list[tuple[int, np.ndarray]]],
    tolerance: float,
) -> tuple[str, str] | None:
    """The first layer whose answer, where channels were left, is another one; and how far off."""
    seen: Counter[str] = Counter()
    for (name, whole), (_, answers) in zip(before, after, strict=False):
        number, seen[name] = seen[name], seen[name] + 1
        for position, (reference, answer) in enumerate(zip(whole, answers, strict=False)):
            left = _without(reference, removed.get((name, number, position), []))
            if left.shape != answer.shape:
                return name, f"it answers {tuple(answer.shape)} instead of {tuple(left.shape)}"
            error = _difference(answer, left)
            if error > tolerance:
                return name, f"relative error {error:.1e}, where {tolerance:.0e} is allowed"
    return None


def _without(tensor: Tensor, removed: list[tuple[int, np.ndarray]]) -> Tensor:
    gone: dict[int, list[np.ndarray]] = {}
    for dim, index in removed:
        gone.setdefault(dim, []).append(index)
    for dim, parts in gone.items():
        stay = np.setdiff1d(np.arange(tensor.shape[dim]), np.concatenate(parts))
        tensor = tensor.index_select(dim, torch.from_numpy(stay).to(tensor.device))
    return tensor


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
