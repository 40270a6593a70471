"""Cutting tensors: parameters, buffers, gradients, encodings and optimizer state, all alike.

The surprising rule: a parameter stays the same object. Only the memory that it stands for changes, so
tied weights, optimizers and every reference in a user's program stay valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.task import evaluation
from ...errors import ModelMismatch, SurgeryFailed
from ..encodings import Encoding
from .refusals import refuse_tensor
from .transaction import set_memory

#: Effective tensor -> dim -> the indices that stay, ascending.
Kept: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]
_State: TypeAlias = dict[str, Any]


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a dotted name, or None; ``get_submodule`` takes ten times as long."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
    return module


def is_computed(module: nn.Module, leaf: str) -> bool:
    """Whether a tensor is parametrized: computed anew each time it is asked for."""
    # Most modules are told apart by the first condition, which costs next to nothing.
    return "parametrizations" in module._modules and parametrize.is_parametrized(module, leaf)


def stored(module: nn.Module, leaf: str) -> Tensor | None:
    """A parameter or buffer as it lies in memory; None where it is computed, or not there."""
    tensor = module._parameters.get(leaf)
    return module._buffers.get(leaf) if tensor is None else tensor


def find(model: nn.Module, name: str) -> tuple[nn.Module, str, Tensor | None]:
    """The module that owns an effective tensor, the tensor's name there, and itself if it is stored.

    Raises:
        ModelMismatch: the model has no such parameter or buffer.
    """
    path, _, leaf = name.rpartition(".")
    module = module_at(model, path)
    tensor = None if module is None else stored(module, leaf)
    if module is None or (tensor is None and not is_computed(module, leaf)):
        raise ModelMismatch(
            f"{type(model).__name__} has no parameter or buffer {name!r}: the channels to remove are "
            "those of another network."
        )
    return module, leaf, tensor


@torch.no_grad()
def cut_tensors(model: nn.Module, kept: Kept, optimizer: torch.optim.Optimizer | None) -> None:
    """Keep only some indices of the dims of tensors, with all that belongs to each tensor.

    Raises:
        ModelMismatch: the indices are not the model's.
        SurgeryFailed: a tensor cannot be cut; the message names it.
    """
    state = {} if optimizer is None else optimizer.state
    for name, dims in kept.items():
        module, leaf, tensor = find(model, name)
        refuse_tensor(name, module, tensor)
        try:
            if tensor is None:
                _cut_parametrized(model, name, (module, leaf), dims, state)
            else:
                _check_fit(model, name, tensor.shape, dims)
                _cut(tensor, tensor.shape, dims, state)
        except RuntimeError as error:
            raise SurgeryFailed(
                f"{name} cannot be cut in dim {', '.join(map(str, dims))}: {error}. The model is as it "
                "was."
            ) from error


def _check_fit(
    model: nn.Module, name: str, shape: torch.Size, dims: Mapping[int, np.ndarray]
) -> None:
    for dim, index in dims.items():
        if not 0 <= dim < len(shape) or len(index) == 0 or index[-1] >= shape[dim]:
            raise ModelMismatch(
                f"{name} has the shape {tuple(shape)} in {type(model).__name__}, and of its dim "
                f"{dim} {len(index)} indices up to {index.max(initial=0)} should be kept: the "
                "channels to remove are those of another network."
            )


def _cut(
    tensor: Tensor, shape: torch.Size, dims: Mapping[int, np.ndarray], state: Mapping[Any, _State]
) -> None:
    """Cut what lies in memory: its values, its gradient, and what an optimizer keeps for it."""
    gradient = tensor.grad
    if gradient is not None:  # torch refuses one of another shape
        tensor.grad = None
    set_memory(tensor, part(tensor.detach(), shape, dims))
    if gradient is not None:
        tensor.grad = part(gradient.detach(), shape, dims)
    own = state.get(tensor, {}) if state else {}
    for key, value in own.items():
        if isinstance(value, Tensor):
            own[key] = part(value, shape, dims)


def part(tensor: Tensor, shape: torch.Size, dims: Mapping[int, np.ndarray]) -> Tensor:
    """The part that stays of a tensor that broadcasts to ``shape``; of any other, all of it.

    Factored moments and the magnitudes of weight normalization have some dims of size 1; counters
    and centroids have other shapes and are the same for all channels.
    """
    if tensor.shape != shape and not _broadcasts(tensor.shape, shape):
        return tensor
    result = tensor
    for dim, kept in dims.items():
        if tensor.shape[dim] == shape[dim]:
            index = torch.from_numpy(kept).to(tensor.device)
            result = result.index_select(dim, index)
    return _laid_out_as(tensor, result)


def _broadcasts(own: torch.Size, whole: torch.Size) -> bool:
    pairs = zip(own, whole, strict=False)
    return len(own) == len(whole) and all(n in (1, size) for n, size in pairs)


def _laid_out_as(original: Tensor, result: Tensor) -> Tensor:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(original.ndim)
    if layout is None or original.is_contiguous():
        return result
    kept_so = original.is_contiguous(memory_format=layout)
    return result.contiguous(memory_format=layout) if kept_so else result


def _cut_parametrized(
    model: nn.Module,
    name: str,
    place: tuple[nn.Module, str],
    dims: Mapping[int, np.ndarray],
    state: Mapping[Any, _State],
) -> None:
    """Cut what a tensor is computed from, so that what is computed is the part of what was."""
    module, leaf = place
    stack, whole = _stack(module, leaf), value_of(module, leaf)
    _check_fit(model, name, whole.shape, dims)
    shape, wanted = whole.shape, part(whole, whole.shape, dims)  # `whole` may be what is cut
    for tensor in [*stack.parameters(), *stack.buffers()]:
        _cut(tensor, shape, dims, state)
    for encoding in stack.children():
        if isinstance(encoding, Encoding):
            encoding.forget()
    try:
        if not _computes(module, leaf, wanted):
            setattr(module, leaf, wanted)  # weight normalization: each norm is over fewer weights
        fits, problem = _computes(module, leaf, wanted), None
    except RuntimeError as error:  # shapes that no longer fit each other
        fits, problem = False, error
    if not fits:
        kinds = ", ".join(type(step).__name__ for step in stack.children())
        raise SurgeryFailed(
            f"{name} is parametrized ({kinds}), and what is left of it after cutting is not what it was "
            "before. The model is as it was. Make it an ordinary weight first: "
            "torch.nn.utils.parametrize.remove_parametrizations."
        ) from problem


def _computes(module: nn.Module, leaf: str, wanted: Tensor) -> bool:
    value = value_of(module, leaf)
    if value.shape != wanted.shape:
        return False
    rounding = 10 * torch.finfo(wanted.dtype).eps
    return bool((value - wanted).abs().max() <= rounding * wanted.abs().max())


@torch.no_grad()
def value_of(module: nn.Module, leaf: str) -> Tensor:
    """The effective value of a tensor; computing it changes nothing."""
    tensor = stored(module, leaf)
    if tensor is not None:
        return tensor
    # Spectral normalization iterates, in place, each time it is asked while it trains.
    with evaluation(_stack(module, leaf)):
        return getattr(module, leaf)  # type: ignore[no-any-return]


def shape_of(model: nn.Module, name: str) -> torch.Size:
    """The shape of an effective tensor.

    Raises:
        ModelMismatch: the model has no such parameter or buffer.
    """
    module, leaf, tensor = find(model, name)
    return (value_of(module, leaf) if tensor is None else tensor).shape


def _stack(module: nn.Module, leaf: str) -> nn.Module:
    stacks: Any = module.parametrizations
    stack: nn.Module = stacks[leaf]
    return stack
