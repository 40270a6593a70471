"""Zeros that are skipped: pruned layers as products with compressed sparse rows (CSR), where a clock says so.

The surprising rule: nothing is believed but the measurement on this machine. Below about 80 % of zeros a
dense product is faster nearly everywhere, and a single vector pays later than many columns do.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from ..core.task import call, evaluation
from ..core.types import Change
from ..errors import InputError
from ..measure import latency
from ..measure.macs import undisturbed
from ..mechanisms.apart import keep_apart
from ..mechanisms.encodings import bake
from ..mechanisms.groups import Group, find_groups
from ..mechanisms.surgery import cut

#: How far outputs of the sparse form may lie from those of the dense one, relative to the largest.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Decision:
    """What became of one layer.

    Attributes:
        layer: its name.
        density: fraction of its weights that are not zero.
        runs: ``"dense"``, or which library multiplies: ``"torch"`` or ``"scipy"``.
        ratio: time of the fastest sparse form over that of the dense one; None where none was tried.
        reason: why it runs so.
    """

    layer: str
    density: float
    runs: str
    ratio: float | None
    reason: str


@dataclass(frozen=True, repr=False)
class SparseNetwork:
    """A network that skips zeros where that is faster.

    Attributes:
        model: a copy, in eval mode, for inference on this kind of processor.
        decisions: one of each linear layer and convolution.
        removed: the width of each layer that has lost channels which nobody reads.
        ratio: time of the whole network over that of the dense one, channels that were removed included.
    """

    model: nn.Module
    decisions: list[Decision]
    removed: list[Change]
    ratio: float

    def __repr__(self) -> str:
        """One line: how many layers run sparsely, and what that brings."""
        skipping = sum(d.runs != "dense" for d in self.decisions)
        return (
            f"SparseNetwork({skipping} of {len(self.decisions)} layers skip zeros, "
            f"{len(self.removed)} are thinner, {self.ratio:.2f} of the time)"
        )

    def summary(self) -> str:
        """The decisions as lines of text."""
        width = max((len(d.layer) for d in self.decisions), default=0)
        return "\n".join(
            f"{d.layer:<{width}}  {d.density:>6.1%}  {d.runs:<5}  "
            f"{'' if d.ratio is None else f'{d.ratio:.2f}':>5}  {d.reason}"
            for d in self.decisions
        )


class SparseProduct(nn.Module):
    """A linear layer or a 1×1 convolution that multiplies only by what is not zero.

    Args:
        layer: the dense one; its weight must be a plain parameter.
        library: ``"torch"`` or ``"scipy"``.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.modules.conv._ConvNd, library: str) -> None:
        super().__init__()
        matrix = scipy.sparse.csr_matrix(layer.weight.detach().flatten(1).numpy())
        self.register_buffer("starts", torch.from_numpy(matrix.indptr).long())
        self.register_buffer("columns", torch.from_numpy(matrix.indices).long())
        self.register_buffer("values", torch.from_numpy(matrix.data))
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias)
        self.shape, self.library = matrix.shape, library
        self.stride: tuple[int, ...] | None = getattr(layer, "stride", None)
        self._product: Callable[[Tensor], Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew each time: for code that looks into the layer, as torch's own does."""
        rows = torch.arange(self.shape[0]).repeat_interleave(self.starts.diff())
        dense = self.values.new_zeros(self.shape)
        dense[rows, self.columns] = self.values
        return dense if self.stride is None else dense[(..., *[None] * len(self.stride))]

    def forward(self, inputs: Tensor) -> Tensor:
        """As the dense layer, up to rounding."""
        return (
            self._linear(inputs) if self.stride is None else self._convolution(inputs, self.stride)
        )

    def extra_repr(self) -> str:
        """Shape and share of weights that are not zero."""
        rows, columns = self.shape
        return (
            f"{columns}, {rows}, density={len(self.values) / (rows * columns):.3f}, {self.library}"
        )

    def _linear(self, inputs: Tensor) -> Tensor:
        columns = inputs.reshape(-1, self.shape[1]).T
        output = self._times(columns).T.reshape(*inputs.shape[:-1], self.shape[0])
        return output if self.bias is None else output + self.bias

    def _convolution(self, inputs: Tensor, stride: tuple[int, ...]) -> Tensor:
        every: Any = (..., *(slice(None, None, step) for step in stride))
        seen = inputs[every]
        columns = seen.transpose(0, 1).reshape(self.shape[1], -1)
        output = self._times(columns).reshape(self.shape[0], len(seen), *seen.shape[2:])
        output = output.transpose(0, 1)
        return output if self.bias is None else output + self.bias.view(-1, *[1] * (seen.ndim - 2))

    def _times(self, columns: Tensor) -> Tensor:
        """The weight times a matrix."""
        if self._product is None:
            self._product = _PRODUCTS[self.library](
                self.starts, self.columns, self.values, self.shape
            )
        return self._product(columns)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._product = None  # it was made of the old tensors
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        self._product = None
        super()._load_from_state_dict(*args, **named)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_product": None}


def _by_torch(starts: Any, columns: Any, values: Any, shape: Any) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
    return lambda inputs: matrix @ inputs


def _by_scipy(starts: Any, columns: Any, values: Any, shape: Any) -> Callable[[Tensor], Tensor]:
    narrow = (t.numpy().astype(np.int32) for t in (columns, starts))
    matrix = scipy.sparse.csr_matrix((values.numpy(), *narrow), shape=shape)

    def times(inputs: Tensor) -> Tensor:
        # A single column is a vector, for which scipy has a faster way.
        array = inputs.contiguous().numpy()
        found = matrix @ (array[:, 0] if array.shape[1] == 1 else array)
        return torch.from_numpy(found.reshape(len(found), -1))

    return times


_PRODUCTS = {"torch": _by_torch, "scipy": _by_scipy}


@torch.no_grad()
def sparse(
    model: nn.Module,
    example_inputs: Any,
    *,
    most_dense: float = 0.4,
    faster: float = 0.95,
    threads: int = 1,
    seconds: float = 0.3,
    remove_channels: bool = True,
) -> SparseNetwork:
    """Let a pruned network skip its zeros, where that is faster on this machine.

    First the channels go that no weight reads any more (what :class:`lilliput.methods.Magnitude` and others
    leave of dead neurons). Then every linear layer and 1×1 convolution that is sparse enough runs on its
    own inputs in turns as it is and in each sparse form, and keeps what was fastest.

    Args:
        model: any module on the processor, in float32; it stays as it is.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, of the
            batch size that will be used: the decision depends on it.
        most_dense: layers with a larger fraction of weights that are not zero stay dense, untried.
        faster: the largest ratio of times at which a sparse form is taken.
        threads: torch's threads while it is timed. Sparse products of scipy have one.
        seconds: for timing each layer.
        remove_channels: whether channels that nobody reads are removed.

    Returns:
        A copy that skips zeros, each layer's decision, and the measured ratio of the whole.

    Raises:
        InputError: the model is on another device.
        ModelMismatch: it cannot run on the example.

    Example:
        >>> net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> _ = net[0].weight.data.mul_(torch.rand(512, 512) < 0.02)
        >>> [d.reason for d in sparse(net, torch.randn(8, 512)).decisions][1]
        '100.0 % of the weights are not zero'
    """
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise InputError("sparse products run on the processor: move the model there, model.cpu().")
    dense = bake(copy.deepcopy(model)).eval()
    # No gradients: scipy cannot multiply what waits for one, and a dense layer in front would give it that.
    whole = copy.deepcopy(dense).requires_grad_(False)
    removed = _remove_unread(whole, example_inputs) if remove_channels else []
    decide = partial(
        _decide, most_dense=most_dense, faster=faster, threads=threads, seconds=seconds
    )
    decisions = []
    for name, inputs in _inputs_of(whole, example_inputs).items():
        decision, module = decide(name, whole.get_submodule(name), inputs)
        decisions.append(decision)
        if module is not None:
            whole = _put(whole, name, module)
    both = {"dense": dense, "sparse": whole}
    timed = latency(both, example_inputs, threads=threads, seconds=4 * seconds)
    return SparseNetwork(whole, decisions, removed, timed.models["sparse"].ratio.median)


def _put(whole: nn.Module, name: str, product: nn.Module) -> nn.Module:
    """The network with a product in a layer's place, which may be all of it."""
    if not name:
        return product
    whole.set_submodule(name, product)
    keep_apart(whole, name, product)
    return whole


def _decide(
    name: str,
    layer: Any,
    inputs: Tensor | None,
    *,
    most_dense: float,
    faster: float,
    threads: int,
    seconds: float,
) -> tuple[Decision, nn.Module | None]:
    density = int(layer.weight.count_nonzero()) / layer.weight.numel()

    def dense(reason: str, ratio: float | None = None) -> tuple[Decision, None]:
        return Decision(name, density, "dense", ratio, reason), None

    obstacle = _obstacle(layer, inputs)
    if obstacle or inputs is None:
        return dense(obstacle)
    if density > most_dense:
        return dense(f"{100 * density:.1f} % of the weights are not zero")
    forms = {library: SparseProduct(layer, library) for library in _PRODUCTS}
    timed = latency({"dense": layer, **forms}, inputs, threads=threads, seconds=seconds)
    ratios = {library: timed.models[library].ratio.median for library in forms}
    best = min(ratios, key=ratios.__getitem__)
    if ratios[best] > faster:
        return dense("dense is faster here", ratios[best])
    expected, found = layer(inputs), forms[best](inputs)
    if (found - expected).abs().max() > TOLERANCE * expected.abs().max():
        return dense(f"the outputs of {best} differ", ratios[best])
    return Decision(name, density, best, ratios[best], "faster"), forms[best]


def _obstacle(layer: Any, inputs: Tensor | None) -> str:
    """Why a layer cannot run sparsely; empty where it can."""
    if inputs is None:
        return "not called on the example, or more than once"
    if layer.weight.dtype != torch.float32 or inputs.dtype != torch.float32:
        return f"of type {str(layer.weight.dtype).removeprefix('torch.')}"
    if isinstance(layer, nn.Linear):
        return ""
    plain = set(layer.kernel_size) == {1} and layer.groups == 1 and not any(_padding(layer))
    return "" if plain and inputs.ndim == layer.weight.ndim else "a convolution that is not 1x1"


def _padding(layer: Any) -> tuple[int, ...]:
    return () if isinstance(layer.padding, str) else tuple(layer.padding)


def _inputs_of(model: nn.Module, example_inputs: Any) -> dict[str, Tensor | None]:
    """By layer, what each linear layer and convolution gets; None where that is not one tensor once."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = {n: m for n, m in model.named_modules() if type(m) in kinds}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: found[name].extend(a.detach().clone() for a in args[:1])

    handles = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    try:
        with undisturbed(model):
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[0] if len(seen) == 1 else None for name, seen in found.items()}


# -- channels that nobody reads ---------------------------------------------------------------------


def _remove_unread(model: nn.Module, example_inputs: Any) -> list[Change]:
    """Remove, in place, the channels whose every reader has a zero weight for them."""
    groups = find_groups(model, example_inputs)
    removal: Mapping[int, np.ndarray] = {
        number: gone
        for number, group in enumerate(groups.groups)
        if len(gone := _unread(model, group))
    }
    if not removal:
        return []
    with evaluation(model):
        return cut(model, groups, removal, inputs=example_inputs).changes


def _unread(model: nn.Module, group: Group) -> np.ndarray:
    """Channels of a group that no weight multiplies by anything but zero; one always stays."""
    readers = group.with_role("uses")
    if not readers or group.mixed_by or group.pairwise:
        return np.array([], dtype=np.int64)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    read = np.zeros(group.channels, dtype=bool)
    for member in readers:
        strength = (
            state[member.tensor].detach().abs().movedim(member.dim, 0).flatten(1).amax(1).numpy()
        )
        read |= strength[member.index].max(axis=1) > 0
    if not read.any():
        read[0] = True
    return np.flatnonzero(~read)
