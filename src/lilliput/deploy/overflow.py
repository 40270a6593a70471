"""Whether a runtime's products of bytes overflow on this processor.

Processors without VNNI instructions (of Intel: before Cascade Lake) multiply unsigned by signed bytes in
pairs, and add the two products in 16 bits, cut off at 32,767. With weights of 8 bits ``2 * 255 * 127`` is
beyond that; with weights of 7 bits ``2 * 255 * 63`` is not.

The surprising rule: nobody says so. All layers run in integers, the file is right, and the numbers are
wrong: a network may lose half of its answers on one machine and none on the next.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..errors import UnknownName
from . import _operators
from .runtime import RUNTIMES

_CHANNELS, _SIDE = 64, 8


@functools.cache
def overflows(runtime: str = "onnxruntime") -> bool:
    """Multiply the largest bytes that there are, and look whether their sum is right.

    Args:
        runtime: ``"onnxruntime"`` or ``"openvino"``.

    Raises:
        UnknownName: there is no such runtime.
        MissingDependency: it is not installed, or ONNX is not.

    Example:
        >>> overflows() in (True, False)  # it depends on the processor
        True
    """
    if runtime not in RUNTIMES:
        raise UnknownName("runtime", runtime, RUNTIMES)
    _operators.require("onnx")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        network = RUNTIMES[runtime](_written(Path(folder) / "largest.onnx"))
        found = network(torch.ones(1, _CHANNELS, _SIDE, _SIDE))
    return bool(found.min() < 0.9 * _CHANNELS)


def _written(path: Path) -> Path:
    """A convolution of ones with ones, all of them the largest integers."""
    import onnx
    from onnx import helper, numpy_helper

    shape = [1, _CHANNELS, _SIDE, _SIDE]
    known: dict[str, np.ndarray] = {
        "weight": np.full([_CHANNELS, _CHANNELS, 1, 1], 127, np.int8),
        "input step": np.array(1 / 255, np.float32), "weight step": np.array(1 / 127, np.float32),
        "output step": np.array(_CHANNELS / 128, np.float32),
        "zero": np.array(0, np.uint8), "none": np.array(0, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "input step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "input step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["weight", "weight step", "none"], ["w"]),
        helper.make_node("Conv", ["d", "w"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "output step", "zero"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "output step", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("x", "y")]
    constants = [numpy_helper.from_array(array, name) for name, array in known.items()]
    graph = helper.make_graph(nodes, "largest", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path
