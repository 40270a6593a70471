"""An *estimate* of the energy of one forward pass, from a table of energies per operation.

The surprising rule: nothing is measured. The estimate is MACs times the energy of a multiplication
and an addition, plus one fetch of every weight from the memory it lives in. It leaves out
activations, control logic, the indices of a sparse format, and any weight that is fetched more
than once. Read it to compare two versions of one model, not as joules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lilliput.core.select import weights
from lilliput.core.task import call
from lilliput.errors import InputError, UnknownName
from lilliput.measure.macs import Inputs, Macs, macs, undisturbed, unfused
from lilliput.measure.size import size


@dataclass(frozen=True)
class EnergyTable:
    """Energies in picojoules (pJ).

    Attributes:
        source: where the figures come from.
        multiply: of one multiplication, by number format.
        add: of one addition, by number format.
        access: of one 64-bit access, by memory.
        bits: width of each number format, in bits.
    """

    source: str
    multiply: Mapping[str, float]
    add: Mapping[str, float]
    access: Mapping[str, float]
    bits: Mapping[str, int]


HOROWITZ_45NM = EnergyTable(
    source='M. Horowitz, "Computing\'s energy problem", ISSCC 2014: 45 nm, 0.9 V',
    multiply={"int8": 0.2, "int32": 3.1, "fp16": 1.1, "fp32": 3.7},
    add={"int8": 0.03, "int32": 0.1, "fp16": 0.4, "fp32": 0.9},
    access={"sram_8kb": 10.0, "sram_32kb": 20.0, "sram_1mb": 100.0, "dram": 1300.0},
    bits={"int8": 8, "int32": 32, "fp16": 16, "fp32": 32},
)
"""Rough figures of one process. DRAM is the low end of the source's range, 1300 to 2600 pJ."""


@dataclass(frozen=True)
class Energy:
    """An estimate for one forward pass over the given batch, in picojoules (pJ).

    Attributes:
        arithmetic_pj: MACs times the energy of one multiplication and one addition.
        memory_pj: one fetch of each weight.
        macs: multiply-accumulate operations that were charged.
        fetched_bits: bits of weights that were charged.
        source: of the table.
    """

    arithmetic_pj: float
    memory_pj: float
    macs: int
    fetched_bits: float
    source: str

    @property
    def total_pj(self) -> float:
        """Arithmetic and memory together, in pJ."""
        return self.arithmetic_pj + self.memory_pj


def energy(
    model: nn.Module,
    example_inputs: Inputs,
    table: EnergyTable = HOROWITZ_45NM,
    *,
    weights_in: str = "dram",
    skip_zeros: bool = False,
    arithmetic: str = "fp32",
    accumulator: str | None = None,
    weight_bits: float | None = None,
    work: Macs | None = None,
) -> Energy:
    """Estimate the energy of one forward pass.

    Args:
        model: any module; it is left as it is.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        table: energies per operation.
        weights_in: the memory that weights are fetched from, a key of ``table.access``.
        skip_zeros: charge neither multiplications by zero weights nor fetches of them, as
            hardware for sparse networks does. The indices that it needs are not charged.
        arithmetic: number format of the multiplications, a key of ``table.multiply``.
        accumulator: number format of the additions; by default that of ``arithmetic``. Networks in
            int8 usually add in int32.
        weight_bits: bits stored for a weight; by default those of ``arithmetic``. A codebook of 32
            values stores 5.
        work: what :func:`macs` gave for the same model and inputs, where it has been called already.

    Returns:
        The estimate and what it charged.

    Raises:
        UnknownName: a number format or memory that the table lacks.
        InputError: ``weight_bits`` is not above 0, or ``example_inputs`` is of a wrong type.
        ModelMismatch: the model cannot run on ``example_inputs``.

    Example:
        >>> import torch
        >>> energy(nn.Linear(10, 10, bias=False), torch.zeros(1, 10)).total_pj  # 100 * (4.6 + 650)
        65460.0
    """
    per_mac = _energy(table.multiply, "multiplication format", arithmetic)
    per_mac += _energy(table.add, "addition format", accumulator or arithmetic)
    per_bit = _energy(table.access, "memory", weights_in) / 64
    width = table.bits[arithmetic] if weight_bits is None else weight_bits
    if not width > 0:
        raise InputError(f"energy: weight_bits is {width}, but a weight takes more than 0 bits.")
    work, held = work or macs(model, example_inputs), size(model)
    charged = work.sparse_macs if skip_zeros else work.total
    fetched = width * (held.nonzeros if skip_zeros else held.parameters)
    return Energy(charged * per_mac, fetched * per_bit, charged, fetched, table.source)


def _energy(energies: Mapping[str, float], kind: str, name: str) -> float:
    if name not in energies:
        raise UnknownName(kind, name, energies, where="energy table")
    return energies[name]


@dataclass(frozen=True)
class AccessTable:
    """What moving a number costs, relative to one multiplication and addition.

    Attributes:
        source: where the figures come from.
        mac: one multiplication and addition.
        register: one access to the register file of a processing element.
        array: passing a number from one processing element to another.
        buffer: one access to the buffer on the chip.
        dram: one access to the memory outside.
    """

    source: str
    mac: float = 1.0
    register: float = 1.0
    array: float = 2.0
    buffer: float = 6.0
    dram: float = 200.0


EYERISS = AccessTable(
    source="Y.-H. Chen, J. Emer, V. Sze, Eyeriss, ISCA 2016: 65 nm, 16 bits, relative to one MAC"
)


def layer_energies(
    model: nn.Module, example_inputs: Inputs, table: AccessTable = EYERISS
) -> dict[str, float]:
    """Estimate for each layer what computing it and moving its data costs, in units of one MAC.

    Of every product that is not with a zero weight: the MAC and three accesses to registers (weight, input,
    sum). Of every weight that is not zero, every input and every output: one way from DRAM through the
    buffer and the array, or back. It is what a dataflow would reach that fetches nothing twice.

    Args:
        model: any module; it is left as it is.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        table: the energies.

    Returns:
        By name of the layers with weights, in the model's order. What goes in and out is seen where a module
        is called: a layer whose weights another module reads (the output projection of torch's attention)
        costs its products and its weights, one that nobody reads its weights only.

    Example:
        >>> import torch
        >>> layer_energies(nn.Linear(10, 10, bias=False), torch.zeros(1, 10))  # 100 * 4 + 120 * 208
        {'': 25360.0}
    """
    work, moved = macs(model, example_inputs).sparse_by_weight, _moved(model, example_inputs)
    way, product = table.dram + table.buffer + table.array, table.mac + 3 * table.register
    found: dict[str, float] = {}
    for weight in weights(model):
        nonzeros = int(weight.value.detach().count_nonzero())
        energy = work.get(weight.name, 0) * product + nonzeros * way
        found[weight.layer] = found.get(weight.layer, moved.get(weight.layer, 0) * way) + energy
    return found


def _moved(model: nn.Module, example_inputs: Inputs) -> dict[str, int]:
    """How many numbers go into each layer with weights and come out of it."""
    found: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
            leaves = pytree.tree_leaves((args, keywords, output))
            found[name] = found.get(name, 0) + sum(
                x.numel() for x in leaves if isinstance(x, Tensor)
            )

        return hook

    with undisturbed(model), unfused():
        handles = [
            model.get_submodule(name).register_forward_hook(count(name), with_kwargs=True)
            for name in dict.fromkeys(w.layer for w in weights(model))
        ]
        try:
            call(model, example_inputs)
        finally:
            for handle in handles:
                handle.remove()
    return found
