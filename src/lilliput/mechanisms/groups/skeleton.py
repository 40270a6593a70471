"""A model without its numbers: the same modules on the meta device, to be traced.

Nothing of the model is copied that is large: parameters and buffers become meta tensors of the same
shape. Lilliput's encodings are taken off, since surgery cuts them with the weight that they encode.

The surprising rule: integers that the modules hold are replaced by integers that remember their place
(:class:`~.widths.Width`), which is why a trace knows that a ``view`` used ``self.num_heads``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import InputError
from ..encodings import Encoding
from .widths import Ledger, Width

#: The numbers of these modules of torch play no part in their code, or surgery corrects them.
_PLAIN = frozenset(
    f"torch.nn.modules.{file}"
    for file in ("activation", "batchnorm", "container", "conv", "dropout", "linear", "pooling")
)

#: What a module mostly holds besides tensors, most of it empty.
_CONTAINERS = frozenset({dict, OrderedDict, list, set})
_CONSTANTS = frozenset({bool, int, float, str, tuple, type(None)})


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, in eval mode.

    Raises:
        InputError: the model cannot be copied.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "the model is a TorchScript module, whose code cannot be followed. Give the model from "
            "which it was scripted."
        )
    modules = list(model.modules())
    held = [own for m in modules for own in (m._parameters, m._buffers) if own]
    memo: dict[int, Any] = {id(t): _meta(t) for own in held for t in own.values() if t is not None}
    for module in modules:
        twin = _twin(module, memo) if type(module).__module__ in _PLAIN else None
        if twin is not None:
            memo[id(module)] = twin
        else:
            memo |= {id(value): type(value)() for value in _empty(module)}
    try:
        bare = copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"the model ({type(model).__name__}) cannot be copied by copy.deepcopy, which finding its "
            f"channels needs: {error}"
        ) from error
    if any("parametrizations" in module._modules for module in modules):
        for module in list(bare.modules()):
            if parametrize.is_parametrized(module):
                _take_off(module)
    return bare.eval() if any(module.training for module in modules) else bare


def tensors(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of named modules, in their order; of tied ones the first."""
    seen: set[int] = set()
    for prefix, module in modules:
        start = f"{prefix}." if prefix else ""
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield start + name, tensor


def number_attributes(modules: Iterable[tuple[str, nn.Module]], ledger: Ledger) -> None:
    """Let the integers that modules hold remember their place."""
    for name, module in modules:
        if type(module).__module__ in _PLAIN:
            continue
        for key, value in list(vars(module).items()):
            if not key.startswith("_modules") and key != "training":
                path = f"{name}.{key}".lstrip(".")
                numbered = _numbered(value, path, ledger)
                if numbered is not value:
                    vars(module)[key] = numbered


def _numbered(value: Any, path: str, ledger: Ledger) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return Width.of_attribute(ledger, int(value), path)
    if type(value) in (list, tuple) and value and all(isinstance(n, int) for n in value):
        return type(value)(_numbered(n, f"{path}.{k}", ledger) for k, n in enumerate(value))
    return value


def _twin(module: nn.Module, memo: dict[int, Any]) -> nn.Module | None:
    """A copy of a module that holds nothing but tensors and constants, as most of torch's own do.

    ``copy.deepcopy`` would take longer than the rest of the trace. None for any other module.
    """
    twin = type(module).__new__(type(module))
    own = vars(twin)
    for key, value in vars(module).items():
        if type(value) in _CONSTANTS:
            own[key] = value
        elif key in ("_parameters", "_buffers"):
            own[key] = {name: memo.get(id(tensor), tensor) for name, tensor in value.items()}
        elif type(value) in _CONTAINERS and not value:
            own[key] = type(value)()
        else:
            return None
    return twin


def _empty(module: nn.Module) -> list[Any]:
    """The empty containers of a module, a dozen mostly, over which ``copy.deepcopy`` takes long."""
    return [value for value in vars(module).values() if type(value) in _CONTAINERS and not value]


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


@torch.no_grad()
def _computed(stack: Any) -> Tensor | None:
    """A tensor like the weight that a stack of parametrizations computes, if it can be computed."""
    if all(isinstance(part, Encoding) for part in stack):
        shape = stack[0].shape_of(stack.original)
        return torch.empty(shape, dtype=stack.original.dtype, device="meta")
    try:
        return torch.empty_like(stack.eval()(), device="meta")
    except Exception:  # a parametrization of the user's that does not run without numbers
        return None


def _take_off(module: nn.Module) -> None:
    """Replace weights that are computed by plain ones: surgery cuts what they are computed from."""
    stacks: Any = module.parametrizations
    for name, stack in list(stacks.items()):
        weight = _computed(stack)
        if weight is not None:
            del stacks[name]
            vars(module).pop(name, None)
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    if not len(stacks):
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
