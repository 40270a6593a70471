"""All or nothing: whatever happens inside, a model is changed whole or left bit for bit as it was.

The surprising rule: nothing is copied. What is remembered are references to the tensors' memory, so
that a transaction costs next to nothing; in return nobody inside may *write into* a tensor. A tensor
gets new memory instead (:func:`replace`), and its old memory, untouched, is there to go back to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ModelMismatch

_CONTAINERS = (dict, list, set)


@contextmanager
def transaction(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[Snapshot]:
    """Undo everything that was done to the model and its optimizer, if an exception leaves the block.

    Covered are tensors, gradients, modes, hooks, attributes and classes of all modules, the state and
    the parameter groups of the optimizer, and the generators of torch, numpy and Python.

    Yields:
        The state at the beginning; ``restore()`` goes back to it within the block.
    """
    before = Snapshot(model, optimizer)
    try:
        yield before
    except BaseException:
        surely(before.restore)
        raise


@contextmanager
def rehearsal(model: nn.Module) -> Iterator[None]:
    """Undo everything that was done to the model at the end of the block, come what may."""
    before = Snapshot(model)
    try:
        yield
    finally:
        surely(before.restore)


@torch.no_grad()
def replace(tensor: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer other values, in memory of their own.

    Args:
        tensor: keeps its identity, dtype and device.
        value: of the same shape.

    Raises:
        ModelMismatch: the shapes differ.
    """
    if tensor.shape != value.shape:
        raise ModelMismatch(
            f"a tensor of shape {tuple(tensor.shape)} cannot be replaced by one of shape "
            f"{tuple(value.shape)}: the layer would no longer fit its neighbors."
        )
    set_memory(tensor, torch.empty_like(tensor).copy_(value.detach()))


def set_memory(tensor: Tensor, value: Tensor) -> None:
    """Let a tensor stand for other memory, of any shape; references to the tensor stay valid."""
    if tensor.shape != value.shape and tensor.is_floating_point():
        # An output of an earlier step that is still alive keeps autograd's node for this parameter,
        # shape and all, and the next backward would meet it. A change of dtype makes torch drop it.
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = value


class Snapshot:
    """References to everything that surgery may change."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._modules = [(m, type(m), _Contents(vars(m))) for m in model.modules()]
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._tensors = [(t, t.data, t.grad, t.requires_grad) for t in tensors.values()]
        self._optimizer = [] if optimizer is None else _optimizer_contents(optimizer)
        self._random = _generators()

    def restore(self) -> None:
        """Go back; doing it twice, or again after an interruption, is the same as doing it once."""
        for module, kind, contents in self._modules:
            module.__class__ = kind
            contents.restore()
        for tensor, memory, gradient, trains in self._tensors:
            _restore_tensor(tensor, memory, gradient, trains)
        for contents in self._optimizer:
            contents.restore()
        for put_back, state in self._random:
            put_back(state)


class _Contents:
    """What a dict, list or set holds, one level of containers inside it included."""

    def __init__(self, container: Any, depth: int = 1) -> None:
        self.container = container
        self.items = container.copy()
        values = container.values() if isinstance(container, dict) else container
        inner = [v for v in values if isinstance(v, _CONTAINERS)] if depth else []
        self.inner = [_Contents(v, depth - 1) for v in inner if v]
        self.empty = [
            v for v in inner if not v
        ]  # most of a module's: an object for each takes time

    def restore(self) -> None:
        self.container.clear()
        add = self.container.extend if isinstance(self.container, list) else self.container.update
        add(self.items)
        for contents in self.inner:
            contents.restore()
        for container in self.empty:
            container.clear()


def _restore_tensor(tensor: Tensor, memory: Tensor, gradient: Tensor | None, trains: bool) -> None:
    if not _same_memory(tensor, memory):
        tensor.grad = None  # torch refuses one of another shape
        set_memory(tensor, memory)
    if tensor.requires_grad != trains:
        tensor.requires_grad_(trains)
    if tensor.grad is not gradient:
        tensor.grad = gradient


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.layout == b.layout == torch.strided and a.is_set_to(b)


def _optimizer_contents(optimizer: torch.optim.Optimizer) -> list[_Contents]:
    return [_Contents(optimizer.state), _Contents(optimizer.param_groups, depth=2)]


def _generators() -> list[tuple[Callable[[Any], object], Any]]:
    """The setter of each random generator with its present state."""
    generators: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (np.random.set_state, np.random.get_state()),  # noqa: NPY002 - user code may draw from it
        (random.setstate, random.getstate()),
    ]
    if torch.cuda.is_initialized():
        generators.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return generators


def surely(restore: Callable[[], None]) -> None:
    """Restore to the end, even if Ctrl-C is pressed meanwhile; it passes on afterwards."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            restore()
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
