"""One forward pass that carries labels instead of numbers.

The pass runs on the meta device under a ``TorchDispatchMode``, which sees every operator with its
tensors, and a ``TorchFunctionMode``, which sees the calls of the model's Python code with their
integers. Hooks on the modules say which of them is at work.

The surprising rule: the pass runs with a batch of two where the example has one sample, because a
batch of one cannot be told from a dim that is broadcast.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.task import call
from ...errors import InputError, ModelMismatch
from ..activations import QUANTIZERS
from .labels import Context
from .quick import shape_only
from .rules import call_function, follow
from .rules.base import tensors_in
from .skeleton import number_attributes, skeleton, tensors
from .trace import Heads, Trace

_DATA_DEPENDENT = (
    "item() cannot be called on meta tensors",
    "Cannot copy out of meta tensor",
    "data-dependent",
    "DataDependent",
    "nonzero",
    "masked_select",
    "Boolean",
)


def trace(
    model: nn.Module,
    inputs: Any,
    heads: Heads = "channels",
    outer: frozenset[int] = frozenset(),
) -> Trace:
    """Follow one forward pass.

    Args:
        model: is not changed.
        inputs: what :func:`lilliput.core.task.call` takes.
        heads: whether an attention head keeps its place and is thinned, or goes as a whole.
        outer: numbers of the splits whose outer axis carries the channels.

    Raises:
        ModelMismatch: the model fails on the inputs.
        InputError: its control flow depends on the data, or it cannot be copied.
    """
    doubled = _doubled(inputs)
    if doubled is not None:
        try:
            return _trace(model, doubled, Trace(heads, outer))
        except ModelMismatch:  # perhaps its code insists on one sample
            pass
    return _trace(model, inputs, Trace(heads, outer))


def _trace(model: nn.Module, inputs: Any, record: Trace) -> Trace:
    bare = skeleton(model)
    modules = list(bare.named_modules())
    number_attributes(modules, record)
    record.declare(tensors(modules))
    given = pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), inputs)
    for tensor in tensors_in(pytree.tree_leaves(given)):
        # The batch has no labels: merged with attention heads, it would hide them.
        batch = [record.labels.still(size) for size in tensor.shape[:1]]
        record.put(tensor, batch + record.fresh(tensor.shape[1:], "it is the network's input"))
    for name, module in modules:
        _hook(name, module, record)
    with torch.random.fork_rng(devices=[]):
        _pass(model, bare, given, record)
        if record.has_unmet():
            _training_pass(model, bare, given, record)
    record.mix_numbers()
    record.assign_roles()
    return record


def _pass(model: nn.Module, bare: nn.Module, inputs: Any, record: Trace) -> None:
    with torch.no_grad(), _uncompiled(), _Operators(record, model), _Functions(record):
        output = _run(bare, inputs, record)
    record.labels.context = Context()
    for tensor in _outputs(output):
        for labels in record.dims(tensor):
            record.labels.fix(labels, "it is the network's output")


def _uncompiled() -> AbstractContextManager[object]:
    """Compiled parts of a model run as the Python code that they were compiled from."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        return contextlib.nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _training_pass(model: nn.Module, bare: nn.Module, inputs: Any, record: Trace) -> None:
    """Follow layers that only take part in training, such as auxiliary classifiers."""
    record.begin_unwatched()
    bare.train()
    with contextlib.suppress(ModelMismatch, InputError):  # it may want targets as well
        _pass(model, bare, inputs, record)


class _Operators(TorchDispatchMode):
    """Runs every operator and gives labels to what it returns."""

    def __init__(self, record: Trace, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record, self.model = record, model

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would turn its compiler off and on around every operator; :func:`_uncompiled` does once."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self._execute(func, args, kwargs)
        follow(self.record, func, args, kwargs, out)
        return out

    def _execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(self._held(args[0]))
        known = shape_only(func, args)
        if known is not NotImplemented:
            return known
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            moved = _on_meta(self.record, (args, kwargs))
            if moved is None:
                raise
            return func(*moved[0], **moved[1])

    def _held(self, tensor: Tensor) -> Tensor:
        """The number itself where the model holds it, in a buffer for example."""
        name = self.record.name_of(tensor)
        held = dict(tensors(self.model.named_modules())) if name else {}
        return held.get(name, tensor)


def _on_meta(record: Trace, values: Any) -> Any:
    """The arguments with constants of the code on the meta device, or None if there are none."""
    real = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and not t.is_meta]
    if not real:
        return None

    def move(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        moved = torch.empty_like(tensor, device="meta")
        record.put(moved, record.dims(tensor), record.is_static(tensor))
        return moved

    return pytree.tree_map_only(Tensor, move, values)


class _Functions(TorchFunctionMode):
    """Sees the calls of the model's code, with the numbers that they are given."""

    def __init__(self, record: Trace) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return call_function(self.record, func, args, kwargs or {})


def _hook(name: str, module: nn.Module, record: Trace) -> None:
    """Let the trace know that the module is at work, and what it sees if it is a leaf."""
    leaf = _is_leaf(module)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        record.enter(name, module)
        if leaf:
            record.count_call(name)
            record.see("input", tensors_in((*args, *kwargs.values())))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if leaf:
            record.see("output", _tensors(output))
        record.leave()

    module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    module.register_forward_hook(after)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children; encodings and quantizers, which stand beside it, are none."""
    children = (name for name, child in module._modules.items() if child is not None)
    return all(name in ("parametrizations", *QUANTIZERS) for name in children)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _run(bare: nn.Module, inputs: Any, record: Trace) -> Any:
    """The forward pass, with errors that name module and operator."""
    try:
        return call(bare, inputs)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        where = f"in module {record.module!r}" if record.module else "in the model itself"
        if any(sign in str(error) for sign in _DATA_DEPENDENT):
            raise InputError(
                f"the forward pass {where} depends on the data ({_first_line(error)}): it reads a "
                "number out of a tensor, or a shape follows from values. Which channels belong "
                "together cannot be known then. Take that part out of the model, or make it depend "
                "on shapes only."
            ) from error
        raise ModelMismatch(
            f"the model fails on the example inputs {where}, after "
            f"{record.labels.context.operator or 'no operator'}: {type(error).__name__}: "
            f"{_first_line(error)}. Check the inputs' number, shapes and types."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _doubled(inputs: Any) -> Any:
    """The inputs with two samples where they have one; None where that is not clear."""
    found = tensors_in(pytree.tree_leaves(inputs))
    if not found or any(t.dim() == 0 or t.shape[0] != 1 for t in found):
        return None
    return pytree.tree_map_only(
        Tensor, lambda t: torch.empty((2, *t.shape[1:]), dtype=t.dtype, device="meta"), inputs
    )


def _outputs(value: Any) -> Iterator[Tensor]:
    """All tensors in what the model returns, also inside objects that torch does not know."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from (t for t in pytree.tree_leaves(vars(leaf)) if isinstance(t, Tensor))
