"""The table of rules, and the call of an operator as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..labels import Context, Dims
from ..trace import Trace

#: Labels of the one output, or of each of several; None for one that is no tensor or stays.
Outputs: TypeAlias = Dims | Sequence[Dims | None]


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

    def __init__(self, trace: Trace, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        self.trace, self.args, self.kwargs, self.out = trace, args, kwargs, out
        self.tensors = tensors_in((*args, *kwargs.values()) if kwargs else args)

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
_FOUND: dict[Any, Rule | None] = {}  # by operator, as they come


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by their names without namespace and overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def follow(
    trace: Trace, operator: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any
) -> None:
    """Give labels to what an operator returned."""
    if operator not in _FOUND:
        _FOUND[operator] = _find(operator)
    known = _FOUND[operator]
    trace.labels.context = Context(operator, trace.module)
    call = Call(trace, args, kwargs, out)
    static = all(trace.is_static(t) for t in call.tensors)
    dims: Any = None if known is None else known(call)
    if dims is None or not _fits(out, dims):
        dims = _unknown(call, operator)
    if isinstance(out, Tensor):
        trace.put(out, dims, static)
    elif isinstance(out, list | tuple):
        for tensor, its in zip(out, dims, strict=True):
            if isinstance(tensor, Tensor):
                trace.put(tensor, call.still(tensor) if its is None else its, static)


def _fits(out: Any, dims: Any) -> bool:
    """Whether a rule has answered with one label for each index."""
    if isinstance(out, Tensor):
        return [len(dim) for dim in dims] == list(out.shape)
    if not isinstance(out, list | tuple):
        return True
    pairs = [
        (t, d) for t, d in zip(out, dims, strict=False) if isinstance(t, Tensor) and d is not None
    ]
    return len(out) == len(dims) and all(_fits(t, d) for t, d in pairs)


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments, those in lists and tuples included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) is list or isinstance(value, tuple):
            found += tensors_in(value)
    return found


def _find(operator: Any) -> Rule | None:
    """The rule of an operator: by name, by the name of its out-of-place form, by torch's own tag."""
    namespace, _, name = operator._schema.name.rpartition("::")
    plain = name.rstrip("_")
    found = _RULES.get(name) or _RULES.get(plain)
    if found is None:
        forms = getattr(getattr(torch.ops, namespace), plain, operator)
        overloads = (
            [getattr(forms, o) for o in forms.overloads()] if hasattr(forms, "overloads") else []
        )
        if any(torch.Tag.pointwise in form.tags for form in (operator, *overloads)):
            found = _RULES["pointwise"]
    return found


def _unknown(call: Call, operator: Any) -> Outputs:
    """Tie everything that takes part: prunability is lost, correctness is not."""
    trace, name = call.trace, str(operator)
    trace.unknown[name] = trace.unknown.get(name, 0) + 1
    why = "no rule covers this operator"
    for tensor in call.tensors:
        for labels in trace.dims(tensor):
            trace.labels.fix(labels, why)
    if isinstance(call.out, Tensor):
        return trace.fresh(call.out.shape, why)
    if not isinstance(call.out, list | tuple):
        return []
    return [trace.fresh(t.shape, why) if isinstance(t, Tensor) else None for t in call.out]
