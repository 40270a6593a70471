"""A network as an ONNX file, its integers as integers: what ONNX Runtime, OpenVINO and others execute.

Weights on a grid become signed bytes and a scale for each filter, quantizers become the pair
``QuantizeLinear``, ``DequantizeLinear`` with the steps that the network computed with, unsigned. A runtime
that finds such pairs around a product executes it in integers, and gets what the network gets up to
rounding.

Batch normalization is multiplied into the layer before it: of a grid that changes only the steps.

The surprising rule: a runtime is free to leave a layer in float, and says nothing.
:func:`.runtime.inspect` counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..core.select import weights
from ..core.task import evaluation
from ..core.types import Batch
from ..errors import ExportFailed, InputError
from ..mechanisms.activations import Quantizer, quantizer_at, replaced_activations
from ..mechanisms.encodings import StepGrid, bake, encoding_of
from ..mechanisms.flow import flows
from ..mechanisms.ranges import steps_of
from . import _operators
from ._paddings import absorb_paddings
from ._poolings import quantize_before_poolings
from .products import quantize_products

#: The version of ONNX's operators.
OPSET = 20
_CONVOLUTIONS = nn.modules.conv._ConvNd
_PRODUCTS = (nn.Linear, _CONVOLUTIONS)
#: Biases are integers of 32 bits; this keeps sums with them inside.
_LARGEST_BIAS = 2.0**30


@dataclass(frozen=True)
class Exported:
    """A file, and what was made of the network for it.

    Attributes:
        path: of the file.
        bytes: its size, with the second file that large networks have their weights in.
        integer_layers: names of the layers whose weights and inputs are integers.
        float_layers: names of the other linear layers and convolutions.
        folded: batch normalization -> the layer that it was multiplied into.
        products: of two activations that are of integers.
        tables: names of the embeddings whose rows are integers.
    """

    path: Path
    bytes: int
    integer_layers: list[str]
    float_layers: list[str]
    folded: dict[str, str]
    products: list[str]
    tables: list[str]


def export(
    model: nn.Module,
    inputs: Any,
    path: str | PathLike[str],
    *,
    products: Iterable[Batch] | None = None,
    tables: bool = False,
) -> Exported:
    """Write a network as an ONNX file with any batch size.

    Args:
        model: with whatever encodings; left as it is.
        inputs: an example of what it takes: a tensor, a tuple of positional arguments or a dict of keywords;
            the first dim of every tensor is the batch.
        path: of the file; replaced whole or not at all. Weights of more than about 1.5 GB go to a second
            file beside it, whose name has ``.data`` at its end.
        products: batches on which ranges of the factors are measured that are both activations, as in
            attention; these products then are of integers too. See :mod:`.products`.
        tables: store embeddings as signed bytes with a step for each row, which in small language models are
            most of the file. No runtime is faster for it, and the network does not know of it.

    Returns:
        What was written.

    Raises:
        InputError: ONNX or its exporter is not installed; activations have bits that runtimes lack.
        ExportFailed: torch's exporter does not know an operator, or the network changes while it is
            traced; the message says which.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> export(net, torch.ones(1, 4), tempfile.mkdtemp() + "/net.onnx").float_layers
        ['0', '2']
    """
    _operators.require("onnx", "onnxscript")
    path = Path(path)
    twin, folded = deployable(model, inputs)
    stored = _store_tables(twin) if tables else []
    size, multiplied = _save(_traced(twin, inputs), path, products)
    integer, real = _integer_and_real(twin)
    return Exported(
        path,
        size,
        integer,
        real,
        folded,
        multiplied,
        stored,
    )


def _integer_and_real(twin: nn.Module) -> tuple[list[str], list[str]]:
    """The names of linear layers and convolutions whose product is of integers, and of the others."""
    modules = dict(twin.named_modules())
    wrapped = {name: m for name, m in modules.items() if isinstance(m, IntegerLayer)}
    inside = {id(m.layer) for m in wrapped.values()}
    integer = [name for name, m in wrapped.items() if m.before is not None]
    products = [
        name
        for name, m in modules.items()
        if name in wrapped or (isinstance(m, _PRODUCTS) and id(m) not in inside)
    ]
    return integer, [name for name in products if name not in integer]


def _save(program: Any, path: Path, products: Iterable[Batch] | None) -> tuple[int, list[str]]:
    """Write the file with all that is done to it; its bytes, and the products that are of integers."""
    multiplied: list[str] = []

    def write(temporary: str) -> None:
        program.save(temporary)
        if products is not None:
            multiplied.extend(quantize_products(Path(temporary), products))

    absorb_paddings(program.model.graph)
    quantize_before_poolings(program.model.graph)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in the source it came from: half of a small file
    return _operators.replace_file(path, write), multiplied


@torch.no_grad()
def deployable(model: nn.Module, inputs: Any) -> tuple[nn.Module, dict[str, str]]:
    """A copy in which integers are stored as such, and batch normalization is gone where it can go.

    Returns:
        The copy, in eval mode, and batch normalization -> layer.

    Raises:
        InputError: activations of other than 8 bits.
    """
    twin = copy.deepcopy(model).cpu().float().eval()
    layers = [n for n, m in twin.named_modules() if isinstance(m, _PRODUCTS)]
    found = flows(twin, layers, inputs)
    grids = {w.layer: g for w in weights(twin) if (g := encoding_of(w, StepGrid)) is not None}
    bake(twin)
    folded = {}
    for name, flow in found.layers.items():
        layer: Any = twin.get_submodule(name)
        scale = torch.ones(len(layer.weight))
        behind = quantizer_at(twin, f"{flow.norm or name}:output")  # lost with the module that goes
        if flow.norm is not None:
            scale = _absorb(layer, twin.get_submodule(flow.norm))
            twin.set_submodule(flow.norm, nn.Identity())
            folded[flow.norm] = name
        if name in grids:
            steps = grids[name].step.flatten() * scale.abs()
            before = quantizer_at(twin, f"{name}:input")
            twin = _put(twin, name, IntegerLayer(layer, steps, before, behind))
    for place in replaced_activations(twin):
        name, _, side = place.partition(":")
        module: Any = dict(twin.named_modules()).get(name)
        if side and isinstance(getattr(module, "output_quantizer", None), Quantizer):
            module.output_quantizer = _Pair(module.output_quantizer)
    return twin, folded


def _put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with another module of that name, which may be all of it."""
    if not name:
        return module
    model.set_submodule(name, module)
    return model


def _absorb(layer: Any, norm: Any) -> Tensor:
    """Multiply a batch normalization into a layer; by what each filter was multiplied."""
    scale: Tensor = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    layer.weight = nn.Parameter(layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias = nn.Parameter(shift)
    return scale


class IntegerLayer(nn.Module):
    """A linear layer or a convolution as it is exported.

    Args:
        layer: whose weights are multiples of the steps.
        steps: ``(filters,)``.
        before: what makes its inputs integers; None leaves them real.
        behind: what makes its outputs integers, if anything does here.
    """

    integers: Tensor
    steps: Tensor

    def __init__(
        self, layer: Any, steps: Tensor, before: Quantizer | None, behind: Quantizer | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.before = None if before is None else _Pair(before)
        self.behind = None if behind is None else _Pair(behind)
        weight, bias = layer.weight.detach(), layer.bias
        unit = torch.ones(()) if before is None else before.step.detach()
        steps = _steps_for_bias(weight, steps, None if bias is None else bias.detach() / unit)
        integers = (weight / steps.view(-1, *[1] * (weight.ndim - 1))).round().clamp(-127, 127)
        linear = isinstance(layer, nn.Linear)
        self.axis = 1 if linear else 0  # a matrix is stored as it is multiplied with
        self.register_buffer(
            "integers", (integers.T if linear else integers).to(torch.int8).contiguous()
        )
        self.register_buffer("steps", steps)
        self.register_buffer("bias", None if bias is None else bias.detach())
        if before is not None and bias is not None and not linear:
            self.register_buffer("bias_steps", steps * unit)
            self.register_buffer("bias", (bias.detach() / (steps * unit)).round().to(torch.int32))
        for name in ("weight", "bias"):
            del layer._parameters[name]
            setattr(layer, name, None)  # an ordinary attribute from now on

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer computes, in the operators that runtimes look for."""
        weight = torch.ops.lilliput.stored(self.integers, self.steps, self.axis)
        bias: Any = self.bias
        if bias is not None and bias.dtype == torch.int32:
            bias = torch.ops.lilliput.stored(bias, self.bias_steps, 0)
        if not _plain(self.layer):
            output = self._as_it_says(inputs, weight, bias)
        elif self.axis:
            output = _product(self._quantized(inputs), weight, bias)
        else:
            output = self.layer._conv_forward(self._quantized(inputs), weight, bias)
        found: Tensor = output if self.behind is None else self.behind(output)
        return found

    def _quantized(self, inputs: Tensor) -> Tensor:
        return inputs if self.before is None else self.before(inputs)

    def _as_it_says(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        """The layer's own code, which pads by itself, for example.

        Its inputs become integers twice, to no effect: for the layer before it, and for its product.
        """
        layer = self.layer
        layer.weight, layer.bias = weight.T if self.axis else weight, bias
        try:
            with _Before(self._quantized):
                return type(layer).forward(layer, self._quantized(inputs))
        finally:
            layer.weight = layer.bias = None


class IntegerTable(nn.Module):
    """An embedding as it is exported; only the rows that are looked up become real numbers.

    Args:
        layer: whose rows are stored.
    """

    integers: Tensor
    steps: Tensor

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        steps = steps_of(layer.weight.detach(), 8, "max")[:, None]
        self.register_buffer("integers", (layer.weight.detach() / steps).round().to(torch.int8))
        self.register_buffer("steps", steps)

    def forward(self, indices: Tensor) -> Tensor:
        """The rows of these numbers."""
        rows = F.embedding(indices, self.integers).to(self.steps)
        return rows * F.embedding(indices, self.steps)


def _store_tables(twin: nn.Module) -> list[str]:
    """Put integers in the place of embeddings; those that rescale what they look up stay."""
    tables = {
        name: module
        for name, module in twin.named_modules()
        if isinstance(module, nn.Embedding) and module.max_norm is None and _plain(module)
    }
    for name, table in tables.items():
        twin.set_submodule(name, IntegerTable(table))
    return list(tables)


class _Before(TorchFunctionMode):
    """Does something to the inputs of products."""

    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.prepare = prepare

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.conv1d, F.conv2d, F.conv3d, F.linear):
            args = (self.prepare(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _plain(layer: Any) -> bool:
    """Whether a layer computes what its kind does, and nothing beside."""
    kind: Any = next(k for k in type(layer).__mro__ if k.__module__.startswith("torch.nn."))
    return bool(type(layer).forward is kind.forward)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer. In two dims ONNX Runtime would make product and bias one operator, in float."""
    flat = inputs.ndim == 2
    output = (inputs[None] if flat else inputs) @ weight
    output = output if bias is None else output + bias
    return output.squeeze(0) if flat else output


class _Pair(nn.Module):
    """A quantizer as the pair of operators that runtimes know."""

    step: Tensor
    zero: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        if quantizer.bits != 8:
            raise InputError(
                f"activations of {quantizer.bits} bits cannot be exported: runtimes execute 8. Weights may "
                "have fewer; train the network with activation_bits: 8."
            )
        self.register_buffer("step", quantizer.step.detach().clone())
        self.register_buffer("zero", quantizer.zero.to(torch.uint8))

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = torch.ops.lilliput.quantized(inputs, self.step, self.zero)
        return found


def _steps_for_bias(weight: Tensor, steps: Tensor, bias: Tensor | None) -> Tensor:
    """Steps so large that the bias fits into its integers: of filters that are (nearly) zero beside it."""
    steps = torch.where(weight.flatten(1).any(1), steps, steps.new_tensor(1e-12))
    return steps if bias is None else torch.maximum(steps, bias.abs() / _LARGEST_BIAS)


def _traced(twin: nn.Module, inputs: Any) -> Any:
    """The network as a program of ONNX's operators."""
    double = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t])[:2], inputs)
    arguments = double if isinstance(double, tuple) else ()
    keywords = double if isinstance(double, dict) else {}
    if not isinstance(double, tuple | dict):
        arguments = (double,)
    batch = torch.export.Dim.DYNAMIC
    shapes = pytree.tree_map_only(Tensor, lambda t: {0: batch}, keywords or arguments)
    try:
        with _operators.quietly(), evaluation(twin):
            return torch.onnx.export(
                twin, arguments, kwargs=keywords, dynamo=True, opset_version=OPSET, verbose=False,
                dynamic_shapes=shapes, custom_translation_table=_operators.translations(),
            )  # fmt: skip
    except Exception as error:
        raise ExportFailed(
            f"{type(twin).__name__} cannot be written as ONNX: {_operators.cause(error)}"
        ) from error
