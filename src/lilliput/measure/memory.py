"""Bytes that a forward pass keeps alive.

Counted exactly and the same on each run: every operator's output tensor is booked when it appears
and struck off when Python frees its storage, in eager mode. The surprising rule: a kernel's private
workspace and the allocator's rounding are not seen, so the process takes more than this figure.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lilliput.measure.macs import Inputs, call, strided_tensors, undisturbed, unfused
from lilliput.measure.size import effective_state, size


@dataclass(frozen=True)
class Memory:
    """Bytes of a model and of one forward pass over the given batch.

    Attributes:
        parameter_bytes: effective parameters and persistent buffers, dense, tied ones once.
        input_bytes: the example inputs, which the caller holds.
        peak_activation_bytes: the most bytes of tensors made by the forward pass that are alive at
            once, the output among them; neither parameters nor inputs.
    """

    parameter_bytes: int
    input_bytes: int
    peak_activation_bytes: int


def memory(model: nn.Module, example_inputs: Inputs) -> Memory:
    """Measure the peak of live activations in one forward pass in eval mode.

    A view shares its storage with what it views and adds nothing; an in-place operator adds
    nothing either. Weights under a parametrization are computed before, and are no activations.
    Transformer layers run operator by operator, not through torch's fused fast path, which would
    hide their activations.

    Args:
        model: any module; it is left as it is.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        Bytes of parameters, of inputs and of activations at their peak.

    Raises:
        InputError: ``example_inputs`` is of another type.
        ModelMismatch: the model cannot run on ``example_inputs``.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> memory(net, torch.zeros(1, 8)).peak_activation_bytes  # two of 16 floats, around ReLU
        128
    """
    inputs = _storages(example_inputs)
    with undisturbed(model), unfused():
        state = effective_state(model)
        held = _storages([state, list(model.parameters()), list(model.buffers())]) | inputs
        with _Live(held) as live:
            call(model, example_inputs)
    return Memory(size(model).dense_bytes, sum(inputs.values()), live.peak)


def _storages(tree: Any) -> dict[int, int]:
    """Bytes of each storage under the tensors of a tree, by address."""
    storages = [tensor.untyped_storage() for tensor in strided_tensors(tree)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class _Live(TorchDispatchMode):
    """Keeps the sum of living storages that operators have made, and its maximum."""

    def __init__(self, held: Iterable[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = frozenset(held)
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in strided_tensors(output):
            self._book(tensor.untyped_storage())
        self.peak = max(self.peak, sum(self.alive.values()))
        return output

    def _book(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address not in self.held and address not in self.alive:
            self.alive[address] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, address).atexit = False
