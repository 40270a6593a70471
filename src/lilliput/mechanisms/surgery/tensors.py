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


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns an effective tensor, and the tensor's name there.

    Raises:
        ModelMismatch: the model has no such parameter or buffer.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = nn.Module()
    tensors = {**module._parameters, **module._buffers}
    if tensors.get(leaf) is None and not parametrize.is_parametrized(module, leaf):
        raise ModelMismatch(
            f"{type(model).__name__} has no parameter or buffer {name!r}: the channels to remove are "
            "those of another network."
        )
    return module, leaf


@torch.no_grad()
def cut_tensors(model: nn.Module, kept: Kept, optimizer: torch.optim.Optimizer | None) -> None:
    """Keep only some indices of the dims of tensors, with all that belongs to each tensor.

    Raises:
        SurgeryFailed: a tensor cannot be cut; the message names it.
    """
    state = {} if optimizer is None else optimizer.state
    for name, dims in kept.items():
        module, leaf = owner(model, name)
        refuse_tensor(name, module, leaf)
        try:
            if parametrize.is_parametrized(module, leaf):
                _cut_parametrized(name, module, leaf, dims, state)
            else:
                tensor = getattr(module, leaf)
                _cut(tensor, tensor.shape, dims, state)
        except RuntimeError as error:
            raise SurgeryFailed(
                f"{name} cannot be cut in dim {', '.join(map(str, dims))}: {error}. The model is as it "
                "was."
            ) from error


def _cut(
    tensor: Tensor, shape: torch.Size, dims: Mapping[int, np.ndarray], state: Mapping[Any, _State]
) -> None:
    """Cut what lies in memory: its values, its gradient, and what an optimizer keeps for it."""
    gradient, tensor.grad = tensor.grad, None
    set_memory(tensor, part(tensor.detach(), shape, dims))
    if gradient is not None:
        tensor.grad = part(gradient.detach(), shape, dims)
    own = state.get(tensor, {})
    for key, value in own.items():
        if isinstance(value, Tensor):
            own[key] = part(value, shape, dims)


def part(tensor: Tensor, shape: torch.Size, dims: Mapping[int, np.ndarray]) -> Tensor:
    """The part that stays of a tensor that broadcasts to ``shape``; of any other, all of it.

    Factored moments and the magnitudes of weight normalization have some dims of size 1; counters
    and centroids have other shapes and are the same for all channels.
    """
    sizes = list(zip(tensor.shape, shape, strict=False))
    if tensor.ndim != len(shape) or any(own not in (1, whole) for own, whole in sizes):
        return tensor
    result = tensor
    for dim, kept in dims.items():
        if tensor.shape[dim] == shape[dim]:
            index = torch.from_numpy(kept).to(tensor.device)
            result = result.index_select(dim, index)
    return _laid_out_as(tensor, result)


def _laid_out_as(original: Tensor, result: Tensor) -> Tensor:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(original.ndim)
    if layout is None or original.is_contiguous():
        return result
    kept_so = original.is_contiguous(memory_format=layout)
    return result.contiguous(memory_format=layout) if kept_so else result


def _cut_parametrized(
    name: str,
    module: nn.Module,
    leaf: str,
    dims: Mapping[int, np.ndarray],
    state: Mapping[Any, _State],
) -> None:
    """Cut what a tensor is computed from, so that what is computed is the part of what was."""
    stack, whole = _stack(module, leaf), value_of(module, leaf)
    shape, wanted = whole.shape, part(whole, whole.shape, dims)  # `whole` may be what is cut
    for tensor in [*stack.parameters(), *stack.buffers()]:
        _cut(tensor, shape, dims, state)
    for encoding in stack.children():
        if isinstance(encoding, Encoding):
            encoding.forget()
    if not _computes(module, leaf, wanted):
        setattr(module, leaf, wanted)  # weight normalization: each norm is over fewer weights
    if not _computes(module, leaf, wanted):
        kinds = ", ".join(type(step).__name__ for step in stack.children())
        raise SurgeryFailed(
            f"{name} is parametrized ({kinds}), and what is left of it after cutting is not what it was "
            "before. The model is as it was. Make it an ordinary weight first: "
            "torch.nn.utils.parametrize.remove_parametrizations."
        )


def _computes(module: nn.Module, leaf: str, wanted: Tensor) -> bool:
    try:
        value = value_of(module, leaf)
    except RuntimeError:  # shapes that no longer fit each other
        return False
    if value.shape != wanted.shape:
        return False
    rounding = 10 * torch.finfo(wanted.dtype).eps
    return bool((value - wanted).abs().max() <= rounding * wanted.abs().max())


@torch.no_grad()
def value_of(module: nn.Module, leaf: str) -> Tensor:
    """The effective value of a tensor; computing it changes nothing."""
    if parametrize.is_parametrized(module, leaf):
        # Spectral normalization iterates, in place, each time it is asked while it trains.
        with evaluation(_stack(module, leaf)):
            return getattr(module, leaf)  # type: ignore[no-any-return]
    tensor: Tensor = getattr(module, leaf)
    return tensor


def shape_of(model: nn.Module, name: str) -> torch.Size:
    """The shape of an effective tensor."""
    module, leaf = owner(model, name)
    if parametrize.is_parametrized(module, leaf):
        return value_of(module, leaf).shape
    tensor: Tensor = getattr(module, leaf)
    return tensor.shape


def _stack(module: nn.Module, leaf: str) -> nn.Module:
    stacks: Any = module.parametrizations
    stack: nn.Module = stacks[leaf]
    return stack
