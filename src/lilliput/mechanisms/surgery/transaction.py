"""All or nothing: whatever happens inside, a model is changed whole or left bit for bit as it was.

The surprising rule: nothing is copied. What is remembered are references to the tensors' memory, so
that a transaction costs next to nothing; in return nobody inside may *write into* a tensor. A tensor
gets new memory instead (:func:`replace`), and its old memory, untouched, is there to go back to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
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
    the parameter groups of the optimizer, the generators of torch, numpy and Python, and how precisely
    torch multiplies float32.

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


def tensors_of(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    """All parameters and buffers that modules own, each once."""
    held = (own for m in modules for own in (m._parameters, m._buffers) if own)
    return {id(t): t for own in held for t in own.values() if t is not None}.values()


class Snapshot:
    """References to everything that surgery may change."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        modules = list(model.modules())
        self._kinds = [(module, type(module)) for module in modules]
        self._contents = _contents([vars(module) for module in modules], depth=1)
        self._tensors = [(t, t.data, t.grad, t.requires_grad) for t in tensors_of(modules)]
        if optimizer is not None:
            self._contents += _contents([optimizer.state], depth=1)
            self._contents += _contents([optimizer.param_groups], depth=2)
        self._settings = [*_generators(), *_precision()]

    def restore(self) -> None:
        """Go back; doing it twice, or again after an interruption, is the same as doing it once."""
        for module, kind in self._kinds:
            module.__class__ = kind
        for container, items in self._contents:
            container.clear()
            if items:  # most are empty
                add = container.extend if isinstance(container, list) else container.update
                add(items)
        for tensor, memory, gradient, trains in self._tensors:
            _restore_tensor(tensor, memory, gradient, trains)
        for put_back, state in self._settings:
            put_back(state)


def _contents(containers: list[Any], depth: int) -> list[tuple[Any, Any]]:
    """Dicts, lists and sets, and those inside down to a depth, each with what it holds."""
    found = [(each, each.copy()) for each in containers]
    if depth:
        held = (each.values() if isinstance(each, dict) else each for each in containers)
        inner = [v for values in held for v in values if isinstance(v, _CONTAINERS)]
        found += _contents(inner, depth - 1)
    return found


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


def precision_switches() -> list[tuple[Any, str, Any]]:
    """Library, attribute and value of what lets float32 be multiplied as float32.

    The shorter formats that torch may use inside round by a thousandth.
    """
    backends: Any = torch.backends
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    if not hasattr(matmul, "fp32_precision"):  # before torch 2.9
        return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    libraries = (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return [(library, "fp32_precision", "ieee") for library in libraries]


def _precision() -> list[tuple[Callable[[Any], object], Any]]:
    """The setter of each switch with its present value."""
    return [
        (partial(setattr, library, name), getattr(library, name))
        for library, name, _ in precision_switches()
    ]


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
