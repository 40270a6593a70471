"""What a model costs: size, MACs, latency, memory, energy. Model in, dataclass out.

The surprising rule: measuring never changes a model. Training flags, buffers, gradients and the
random state are as before, and weights under a parametrization count as the tensors that they
compute.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lilliput.errors import UnknownName
from lilliput.measure.energy import (
    EYERISS,
    HOROWITZ_45NM,
    AccessTable,
    Energy,
    EnergyTable,
    energy,
    layer_energies,
)
from lilliput.measure.latency import Latency, ModelLatency, Spread, latency
from lilliput.measure.macs import Inputs, Macs, macs
from lilliput.measure.memory import Memory, memory
from lilliput.measure.size import Size, TensorSize, effective_state, size

__all__ = [
    "EYERISS",
    "HOROWITZ_45NM",
    "AccessTable",
    "Energy",
    "EnergyTable",
    "Latency",
    "Macs",
    "Measurement",
    "Memory",
    "ModelLatency",
    "Size",
    "Spread",
    "TensorSize",
    "effective_state",
    "energy",
    "latency",
    "layer_energies",
    "macs",
    "measure",
    "memory",
    "size",
]

Extra = Literal["latency", "memory", "energy"]
_EXTRAS = ("latency", "memory", "energy")


@dataclass(frozen=True)
class Measurement:
    """What a model costs; see each part for its units. A part that was not asked for is None."""

    size: Size
    macs: Macs
    latency: Latency | None = None
    memory: Memory | None = None
    energy: Energy | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give the figures as a flat dict that ``json.dumps`` accepts, units in the names.

        ``latency_ratio`` is there only if a dense model was timed alongside.
        """
        figures: dict[str, Any] = {
            "parameters": self.size.parameters,
            "nonzeros": self.size.nonzeros,
            "dense_bytes": self.size.dense_bytes,
            "macs": self.macs.total,
            "sparse_macs": self.macs.sparse_macs,
            "uncounted": dict(self.macs.uncounted),
        }
        if self.latency:
            figures |= _latency_figures(self.latency)
        if self.memory:
            figures["parameter_bytes"] = self.memory.parameter_bytes
            figures["peak_activation_bytes"] = self.memory.peak_activation_bytes
        if self.energy:
            figures["energy_pj"] = self.energy.total_pj
        return figures


def measure(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    also: Collection[Extra] = (),
    dense: nn.Module | None = None,
) -> Measurement:
    """Measure size and MACs, and on request latency, memory and energy, with default settings.

    Args:
        model: any module; it is left as it is.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        also: any of ``"latency"``, ``"memory"``, ``"energy"``.
        dense: the model that latency is compared with, timed in turn with ``model``.

    Returns:
        The figures; ``as_dict()`` makes them ready for JSON.

    Raises:
        UnknownName: ``also`` names something else.
        InputError: ``example_inputs`` is of a wrong type.
        ModelMismatch: a model cannot run on ``example_inputs``.

    Example:
        >>> import torch
        >>> measure(nn.Linear(4, 2), torch.zeros(1, 4)).as_dict()["macs"]
        8
    """
    for name in also:
        if name not in _EXTRAS:
            raise UnknownName("measurement", name, _EXTRAS)
    timed = {"model": model} if dense is None else {"dense": dense, "model": model}
    return Measurement(
        size=size(model),
        macs=macs(model, example_inputs),
        latency=latency(timed, example_inputs) if "latency" in also else None,
        memory=memory(model, example_inputs) if "memory" in also else None,
        energy=energy(model, example_inputs) if "energy" in also else None,
    )


def _latency_figures(result: Latency) -> dict[str, float]:
    own = result.models["model"]
    figures = {"latency_seconds": own.seconds.median}
    if len(result.models) > 1:
        figures["latency_ratio"] = own.ratio.median
    return figures
