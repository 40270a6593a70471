"""How fast this machine multiplies at best: the yardstick for what a network reaches.

The surprising rule: on a processor with VNNI integers are at most four times as fast as real numbers, and a
claim above that was set against a slow baseline.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..measure import latency
from . import _operators
from .runtime import OnnxNetwork

#: Channels in and out, and the side of the picture: bound by arithmetic, small enough for the caches.
_CHANNELS, _SIDE = 256, 28
_WORK = float(_CHANNELS**2 * 9 * _SIDE**2)


@dataclass(frozen=True)
class Ceiling:
    """Multiply-accumulates a second, of a wide 3x3 convolution in ONNX Runtime.

    Attributes:
        real: in 32-bit real numbers.
        integer: unsigned by signed bytes.
    """

    real: float
    integer: float


def ceiling(threads: int = 1, seconds: float = 0.5) -> Ceiling:
    """Measure it.

    Args:
        threads: of the runtime; with several, the figure is for a second of all of them together.
        seconds: of timing.

    Raises:
        MissingDependency: ONNX or ONNX Runtime is not installed.

    Example:
        >>> found = ceiling(seconds=0.05)
        >>> found.real > 1e6
        True
    """
    _operators.require("onnx", "onnxruntime")
    inputs = torch.randn(1, _CHANNELS, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        networks = {
            kind: OnnxNetwork(_written(Path(folder) / f"{kind}.onnx", nodes), threads)
            for kind, nodes in _NODES.items()
        }
        timed = latency(networks, inputs, threads=threads, seconds=seconds, clock="cpu").models
    return Ceiling(*(_WORK * threads / timed[kind].seconds.lower for kind in ("real", "integer")))


#: Operator, inputs, output.
_NODES = {
    "real": [("Conv", "x weight", "y")],
    "integer": [
        ("QuantizeLinear", "x step zero", "q"),
        ("QLinearConv", "q step zero integers step none step zero", "p"),
        ("DequantizeLinear", "p step zero", "y"),
    ],
}


def _written(path: Path, nodes: list[tuple[str, str, str]]) -> Path:
    """A file with one convolution."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).integers(-127, 128, [_CHANNELS, _CHANNELS, 3, 3])
    known: dict[str, np.ndarray] = {
        "weight": weight.astype(np.float32), "integers": weight.astype(np.int8),
        "step": np.array(0.05, np.float32), "zero": np.array(128, np.uint8),
        "none": np.array(0, np.int8),
    }  # fmt: skip
    shape = [1, _CHANNELS, _SIDE, _SIDE]
    made = [helper.make_node(kind, given.split(), [out]) for kind, given, out in nodes]
    for node in made:
        if "Conv" in node.op_type:
            node.attribute.append(helper.make_attribute("pads", [1] * 4))
    graph = helper.make_graph(
        made,
        "convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in known.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path
