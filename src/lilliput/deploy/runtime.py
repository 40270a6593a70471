"""Exported files in the runtimes that are installed: as networks to score and to time, and what really runs.

The surprising rule: what a runtime executes is not what the file says. It fuses operators, and leaves those
in float for which it has no integer kernel; :func:`inspect` reads the graph that it ended up with.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ExportFailed, InputError, UnknownName
from . import _operators

Path_ = str | PathLike[str]

#: ONNX Runtime's operators that multiply: in integers, and in float.
_INTEGER = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QAttention", "QLinearConvTranspose",
})  # fmt: skip
_FLOAT = frozenset({
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm",
    "Einsum", "Attention", "MultiHeadAttention", "LSTM", "GRU", "RNN",
})  # fmt: skip
#: OpenVINO's layers that multiply; each says in which type.
_MULTIPLYING = frozenset({"Convolution", "FullyConnected", "MatMul", "GroupConvolution", "MHA"})


@dataclass(frozen=True)
class Executed:
    """What multiplies in a runtime's own graph.

    Attributes:
        integers: how many products run in integers.
        floats: how many run in float.
        operators: how often each operator of them comes, by the runtime's own name.
        names: of those that run in float.
    """

    integers: int
    floats: int
    operators: dict[str, int]
    names: list[str]


class OnnxNetwork(nn.Module):
    """An ONNX file that ONNX Runtime executes, to be scored and timed like any network.

    Args:
        path: the file.
        threads: of the runtime.
        optimized: also write the graph that the runtime ends up with to this file.
        whole: execute the graph as it is written, without fusing operators.

    Raises:
        MissingDependency: ONNX Runtime is not installed.
        ExportFailed: the runtime does not take the file.
    """

    def __init__(
        self, path: Path_, threads: int = 1, optimized: Path_ | None = None, whole: bool = False
    ) -> None:
        super().__init__()
        _operators.require("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        if whole:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ExportFailed(f"ONNX Runtime does not take {path}: {error}") from error
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The outputs, one tensor or a tuple.

        Raises:
            InputError: a dim other than the batch is not as long as the file says.
        """
        arrays = [t.detach().cpu().numpy() for t in tensors_of((inputs, keywords))]
        try:
            found = self.session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        except Exception as error:
            _tell_misfits([entry.shape for entry in self.session.get_inputs()], arrays, error)
            raise
        tensors = tuple(torch.from_numpy(array) for array in found)
        return tensors[0] if len(tensors) == 1 else tensors


class OpenvinoNetwork(nn.Module):
    """The same file in OpenVINO.

    Args:
        path: the file.
        threads: of the runtime.
    """

    def __init__(self, path: Path_, threads: int = 1) -> None:
        super().__init__()
        if importlib.util.find_spec("openvino") is None:
            from ..errors import MissingDependency

            raise MissingDependency("openvino", "openvino", "running files in OpenVINO")
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }  # fmt: skip
        try:
            self.compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except Exception as error:
            raise ExportFailed(f"OpenVINO does not take {path}: {error}") from error

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The outputs, one tensor or a tuple.

        Raises:
            InputError: a dim other than the batch is not as long as the file says.
        """
        arrays = [t.detach().cpu().numpy() for t in tensors_of((inputs, keywords))]
        try:
            found = self.compiled(arrays)
        except Exception as error:
            shapes = [entry.partial_shape for entry in self.compiled.inputs]
            fixed = [[d.get_length() if d.is_static else None for d in s] for s in shapes]
            _tell_misfits(fixed, arrays, error)
            raise
        tensors = tuple(torch.from_numpy(found[k].copy()) for k in range(len(found)))
        return tensors[0] if len(tensors) == 1 else tensors


def _tell_misfits(expected: list[list[Any]], arrays: list[Any], error: Exception) -> None:
    """Explain a runtime's refusal where shapes are the reason; only integers among those expected are fixed.

    Raises:
        InputError: they are.
    """
    for shape, array in zip(expected, arrays, strict=True):
        pairs = zip(shape, array.shape, strict=False)
        same = all(found == fixed for fixed, found in pairs if isinstance(fixed, int))
        if len(shape) == array.ndim and same:
            continue
        wanted = ", ".join(str(d) if isinstance(d, int) else "batch" for d in shape)
        raise InputError(
            f"the file takes inputs of shape ({wanted}) and got {array.shape}: all dims but the batch are "
            "fixed in it, to those of the example that it was exported with. Pad all inputs to one length, "
            "or export with an example of this shape."
        ) from error


RUNTIMES: dict[str, Any] = {"onnxruntime": OnnxNetwork, "openvino": OpenvinoNetwork}


def installed() -> list[str]:
    """The runtimes that this machine has."""
    return [name for name in RUNTIMES if importlib.util.find_spec(name) is not None]


def inspect(path: Path_, runtime: str = "onnxruntime") -> Executed:
    """Which products of a file really run in integers.

    Args:
        path: the file.
        runtime: ``"onnxruntime"`` or ``"openvino"``.

    Raises:
        UnknownName: there is no such runtime.
        MissingDependency: it is not installed.
        ExportFailed: it does not take the file.
    """
    if runtime == "onnxruntime":
        found = _onnxruntime_products(path)
    elif runtime == "openvino":
        found = _openvino_products(path)
    else:
        raise UnknownName("runtime", runtime, RUNTIMES)
    return Executed(
        sum(integer for _, _, integer in found),
        sum(not integer for _, _, integer in found),
        dict(Counter(kind for _, kind, _ in found)),
        [name for name, _, integer in found if not integer],
    )


def _onnxruntime_products(path: Path_) -> list[tuple[str, str, bool]]:
    """Name, operator, and whether it runs in integers."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        OnnxNetwork(path, optimized=optimized)
        nodes = onnx.load(str(optimized)).graph.node
    return [
        (node.name, node.op_type, node.op_type in _INTEGER)
        for node in nodes
        if node.op_type in _INTEGER | _FLOAT
    ]


def _openvino_products(path: Path_) -> list[tuple[str, str, bool]]:
    graph = OpenvinoNetwork(path).compiled.get_runtime_model()
    found = []
    for layer in graph.get_ordered_ops():
        about = layer.get_rt_info()
        kind = str(about["layerType"].astype(str))
        if kind in _MULTIPLYING:
            precision = str(about["runtimePrecision"].astype(str))
            found.append((layer.get_friendly_name(), kind, precision in ("u8", "i8")))
    return found


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors of what a network takes or gives."""
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
