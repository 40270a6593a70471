"""The self-check: a network that was cut against the whole one with the same channels silenced.

The surprising rule: a channel is silenced where it is *used*, not where it is made: its columns in the
next weights become zero. That is what its absence means, whatever lies between (a batch normalization
makes a constant of a zero, and the constant would arrive).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.select import Weight, example_device
from ...core.task import call
from ...errors import LilliputError, ModelMismatch, SurgeryFailed
from ..encodings import strip
from .plan import Plan, perform
from .planning import planned
from .tensors import find, value_of
from .transaction import Snapshot, precision_switches, rehearsal, tensors_of

if TYPE_CHECKING:
    from ..groups.classes import Groups, Removal

#: Tensor, dim and indices.
_Place: TypeAlias = tuple[str, int, np.ndarray]

#: Of a call of a module without children: its name, and the tensors that it answered.
_Call = tuple[str, list[Tensor]]


@dataclass(frozen=True)
class SelfCheck:
    """A cut that is compared with the whole network.

    Groups over which an operator takes a statistic are left out of the comparison, for silenced
    channels still count there. Two forward passes, three where only a part can be compared.

    Attributes:
        model: as it is before the cut.
        groups: of this model.
        inputs: an example.
        tolerance: relative error that is allowed.
        before: the way back to the whole network, to explain what went wrong.
    """

    model: nn.Module
    groups: Groups
    inputs: Any
    tolerance: float
    before: Snapshot

    def perform(
        self, removal: Removal, plan: Plan, optimizer: torch.optim.Optimizer | None
    ) -> float | None:
        """Remove channels.

        Args:
            removal: what goes.
            plan: the same in terms of tensors.
            optimizer: what trains the model.

        Returns:
            The largest difference relative to the largest output; None where nothing can be compared.

        Raises:
            ModelMismatch: the model cannot run on the inputs as it is.
            SurgeryFailed: without the channels it fails, or answers something else; the message names
                the first layer that does.
        """
        groups = self.groups.groups
        comparable = {n: gone for n, gone in removal.items() if not groups[n].mixed_by}
        reference = self._reference(comparable)
        partly, error = len(comparable) < len(removal), None
        if partly and comparable:
            with rehearsal(self.model):
                perform(self.model, planned(self.model, self.groups, comparable), None)
                error, problem = self._error(reference)
            self._judge(comparable, error, problem, self.tolerance)
        perform(self.model, plan, optimizer)
        whole, problem = self._error(reference)
        self._judge(removal, whole, problem, math.inf if partly else self.tolerance)
        return error if partly else whole

    def _reference(self, silenced: Removal) -> list[Tensor]:
        """What the whole network answers when nothing reads some channels."""
        try:
            return answers(self.model, self.inputs, self._used_places(silenced))
        except LilliputError:
            raise
        except Exception as error:
            _, where, _ = self._watched(silenced)
            if not where:  # not the model failed
                raise
            raise ModelMismatch(
                f"the model cannot run on the example inputs: {_first_line(error)}, in {where}. Give "
                "inputs as its forward takes them, or leave them out to cut without the self-check."
            ) from error

    def _error(self, reference: list[Tensor]) -> tuple[float, Exception | None]:
        """How far off the network's answers are, or what keeps it from answering."""
        try:
            return relative_error(answers(self.model, self.inputs), reference), None
        except Exception as problem:
            return math.nan, problem

    def _judge(
        self, removal: Removal, error: float, problem: Exception | None, tolerance: float
    ) -> None:
        if problem is not None or not error <= tolerance:
            self.before.restore()
            raise self._explained(removal, tolerance) from problem

    def _explained(self, removal: Removal, tolerance: float) -> SurgeryFailed:
        """The error of a network that runs differently without channels; both run again, watched."""
        before, _, _ = self._watched(removal)
        with rehearsal(self.model):
            perform(self.model, planned(self.model, self.groups, removal), None)
            after, failing, reason = self._watched({})
        name, how = failing, reason
        if not failing:
            there = self._removed_at_sites(removal)
            name, how = _first_deviation(before, after, there, tolerance) or (
                type(self.model).__name__,
                "its layers agree, its output does not",
            )
        return SurgeryFailed(
            f"without the removed channels the network would not do the same; first in {name}: {how}. "
            f"The model is as it was. Leave {name} and the layers that it reads out of the removal, or "
            "skip the self-check (tolerance=None) if this is meant."
        )

    def _used_places(self, removal: Removal) -> list[_Place]:
        """Where the removed channels enter a product."""
        return [
            (member.tensor, member.dim, member.index[gone].reshape(-1))
            for number, gone in removal.items()
            for group in [self.groups.groups[number]]
            for member in group.members
            if member.role == "uses" or group.pairwise
        ]

    def _removed_at_sites(
        self, removal: Removal
    ) -> dict[tuple[str, int, int], list[tuple[int, np.ndarray]]]:
        """Module, call and position of an answer -> its dims with the indices that were removed."""
        found: dict[tuple[str, int, int], list[tuple[int, np.ndarray]]] = {}
        for number, gone in removal.items():
            for site in self.groups.groups[number].sites:
                if site.side == "output":
                    place = found.setdefault((site.module, site.call, site.position), [])
                    place.append((site.dim, site.index[gone].reshape(-1)))
        return found

    def _watched(self, silenced: Removal) -> tuple[list[_Call], str, str]:
        """The answers of all layers; where the run fails, the innermost layer and the reason."""
        calls: list[_Call] = []
        running: list[str] = []
        with _rehearsed(self.model, self._used_places(silenced)):
            for name, module in self.model.named_modules():
                _watch(name or type(self.model).__name__, module, calls, running)
            try:
                call(self.model, _widened(self.inputs))
            except Exception as error:
                where = running[-1] if running else type(self.model).__name__
                return calls, where, _first_line(error)
        return calls, "", ""


def answers(model: nn.Module, inputs: Any, silenced: Sequence[_Place] = ()) -> list[Tensor]:
    """What a model answers in eval mode and full precision; it stays as it is."""
    with _rehearsed(model, silenced):
        return _tensors(call(model, _widened(inputs)))


def relative_error(answer: list[Tensor], reference: list[Tensor]) -> float:
    """The largest difference over the largest magnitude, of all tensors; NaN where shapes differ."""
    if [a.shape for a in answer] != [r.shape for r in reference]:
        return math.nan
    return max((_difference(a, r) for a, r in zip(answer, reference, strict=True)), default=0.0)


@contextlib.contextmanager
def _rehearsed(model: nn.Module, silenced: Sequence[_Place]) -> Iterator[None]:
    """The model in eval mode, in memory of its own and in full precision, until the block ends."""
    with (
        rehearsal(model),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(example_device(model).type, enabled=False),
    ):
        for library, name, value in precision_switches():  # the rehearsal puts them back
            setattr(library, name, value)
        modules = list(model.modules())
        if any(module.training for module in modules):
            model.eval()
        for name, _, _ in silenced:
            _make_plain(model, name)
        for tensor in tensors_of(modules):
            tensor.data = _wide(tensor.detach()).clone()
        for name, dim, index in silenced:
            tensor = value_of(*find(model, name)[:2])
            tensor.index_fill_(dim, torch.from_numpy(index).to(tensor.device), 0)
        yield


def _make_plain(model: nn.Module, name: str) -> None:
    module, leaf, tensor = find(model, name)
    if tensor is None:
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


def _watch(name: str, module: nn.Module, calls: list[_Call], running: list[str]) -> None:
    def enter(module: nn.Module, inputs: Any) -> None:
        running.append(name)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()
        if not module._modules:
            calls.append((name, _tensors(output)))

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


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
