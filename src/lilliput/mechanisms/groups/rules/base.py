"""The table of rules, and the call of an operator as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..labels import Context, Dims
from ..trace import Trace

Outputs: TypeAlias = Dims | list[Dims | None]


class Call:
    """One call of an operator.

    Attributes:
        trace: where labels are kept.
        args: positional arguments.
        kwargs: keyword arguments.
        out: what it returned.
        tensors: all tensors among the arguments, those in lists included.
    """

    __slots__ = ("args", "kwargs", "out", "tensors", "trace")

    def __init__(
        self, trace: Trace, args: Sequence[Any], kwargs: dict[str, Any], out: Any
    ) -> None:
        self.trace, self.args, self.kwargs, self.out = trace, args, kwargs, out
        self.tensors = tensors_in((*args, *kwargs.values()))

    def arg(self, position: int, default: Any = None) -> Any:
        """A positional argument; torch leaves out trailing ones that have their default."""
        return self.args[position] if position < len(self.args) else default

    def dims(self, position: int) -> Dims:
        """The labels of a tensor argument."""
        return self.trace.dims(self.args[position])

    def still(self, tensor: Tensor) -> Dims:
        """Labels of an output that stays as it is."""
        return [self.trace.labels.still(size) for size in tensor.shape]

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the output."""
        shape: Sequence[int] = self.out.shape
        return shape


Rule: TypeAlias = Callable[[Call], Outputs]

_RULES: dict[str, Rule] = {}
_FOUND: dict[Any, Rule | None] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by their names without namespace and overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def follow(trace: Trace, operator: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Give labels to what an operator returned."""
    found = _FOUND.get(operator, _RULES)
    known = _find(operator) if found is _RULES else found
    trace.labels.context = Context(operator, trace.module)
    call = Call(trace, args, kwargs, out)
    static = all(trace.is_static(t) for t in call.tensors)
    dims = _unknown(call, operator) if known is None else known(call)
    if isinstance(out, Tensor):
        trace.put(out, dims, static)  # type: ignore[arg-type]
    elif isinstance(out, list | tuple):
        for tensor, its in zip(out, dims, strict=True):
            if isinstance(tensor, Tensor):
                trace.put(tensor, its if its is not None else call.still(tensor), static)  # type: ignore[arg-type]


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments, those in lists and tuples included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def _find(operator: Any) -> Rule | None:
    """The rule of an operator: by name, by the name of its out-of-place form, by torch's own tag."""
    namespace, _, name = operator._schema.name.rpartition("::")
    plain = name.rstrip("_")
    found = _RULES.get(name) or _RULES.get(plain)
    if found is None:
        forms = getattr(getattr(torch.ops, namespace), plain, operator)
        overloads = [getattr(forms, o) for o in forms.overloads()] if hasattr(forms, "overloads") else []
        if any(torch.Tag.pointwise in form.tags for form in (operator, *overloads)):
            found = _RULES["pointwise"]
    _FOUND[operator] = found
    return found


def _unknown(call: Call, operator: Any) -> Outputs:
    """Tie everything: prunability is lost, correctness is not."""
    trace, name = call.trace, str(operator)
    trace.unknown[name] = trace.unknown.get(name, 0) + 1
    why = "this operator has no rule"
    for tensor in call.tensors:
        for labels in trace.dims(tensor):
            trace.labels.fix(labels, why)
    if isinstance(call.out, Tensor):
        return trace.fresh(call.out.shape, why)
    if not isinstance(call.out, list | tuple):
        return []
    return [trace.fresh(t.shape, why) if isinstance(t, Tensor) else None for t in call.out]
