"""Products of two activations, as in attention, made integers in a file that is already written.

A network does not name these products (they are calls inside of ``forward``), so no quantizer can be put
there before. Their ranges are measured on the file instead, in ONNX Runtime. The first factor becomes
unsigned, the second signed and symmetric, which is what x86 multiplies fastest.

The surprising rule: the network itself does not know of it, so here, and only here, it and its file differ by
more than rounding. Compare the scores.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.types import Batch
from ..errors import EmptyData
from ..mechanisms.ranges import grid_of
from . import _operators
from .runtime import OnnxNetwork

Ends = dict[str, tuple[float, float]]


def quantize_products(path: Path, batches: Iterable[Batch]) -> list[str]:
    """Put quantizers before every product of two activations; the file is replaced whole or not at all.

    Args:
        path: of an ONNX file.
        batches: on whose inputs the ranges are measured.

    Returns:
        The names of the products.

    Raises:
        EmptyData: there are no batches.
    """
    _operators.require("onnx", "onnxruntime")
    import onnx

    model = onnx.load(str(path))
    nodes = _products(model.graph)
    if not nodes:
        return []
    apart = _weights_apart(path)
    ends = _ranges(model, {name for node in nodes for name in node.input}, batches, apart)
    known = {node.output[0]: node for node in model.graph.node}
    for node in nodes:
        for place, name in enumerate(node.input):
            maker = known.get(name)  # None of what the network itself is given
            if maker is None or maker.op_type != "DequantizeLinear":
                node.input[place] = _pair(model.graph, node, name, ends[name], signed=place == 1)
    _sort(model.graph)
    _operators.replace_file(path, lambda temporary: _write(model, temporary, apart))
    return [node.name for node in nodes]


def _weights_apart(path: Path) -> bool:
    """Whether the weights lie in a second file, as those of large networks must."""
    import onnx

    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    return any(onnx.external_data_helper.uses_external_data(tensor) for tensor in tensors)


def _write(model: Any, file: str, apart: bool) -> None:
    import onnx

    onnx.save(model, file, save_as_external_data=apart, location=f"{Path(file).name}.data")


def _products(graph: Any) -> list[Any]:
    """The products whose factors both are computed from the inputs."""
    constant = {entry.name for entry in graph.initializer}
    for node in graph.node:
        if node.input and all(name in constant for name in node.input if name):
            constant |= set(node.output)
    return [n for n in graph.node if n.op_type == "MatMul" and not constant & set(n.input)]


def _ranges(model: Any, names: set[str], batches: Iterable[Batch], apart: bool) -> Ends:
    """The smallest and the largest value of some tensors of a file."""
    import onnx

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = [output.name for output in watched.graph.output]
    order = sorted(names - set(given))
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in order)
    ends: Ends = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "watched.onnx"
        _write(watched, str(file), apart)
        network = OnnxNetwork(file, whole=True)
        for batch in batches:
            found = network(*_arguments(batch.inputs))
            for name, tensor in zip([*given, *order], found, strict=True):
                low, high = ends.get(name, (math.inf, -math.inf))
                ends[name] = min(low, float(tensor.min())), max(high, float(tensor.max()))
    if not ends:
        raise EmptyData("there are no calibration samples: give the task training batches.")
    return ends


def _arguments(inputs: Any) -> tuple[Any, ...]:
    if isinstance(inputs, dict):
        return tuple(inputs.values())
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _pair(graph: Any, node: Any, name: str, ends: tuple[float, float], *, signed: bool) -> str:
    """Quantize and dequantize one factor; the name of what comes out."""
    import numpy as np
    from onnx import helper, numpy_helper

    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    if signed:
        step, zero = max(-low, high) / 127.0, np.array(0, np.int8)
    else:
        step, middle = grid_of(low, high, 8)
        zero = np.array(middle, np.uint8)
    stem = f"{node.name}/{name}"
    graph.initializer.extend([
        numpy_helper.from_array(np.array(step or 1.0, np.float32), f"{stem}/step"),
        numpy_helper.from_array(zero, f"{stem}/zero"),
    ])  # fmt: skip
    about = [f"{stem}/step", f"{stem}/zero"]
    graph.node.extend([
        helper.make_node("QuantizeLinear", [name, *about], [f"{stem}/integers"], f"{stem}/q"),
        helper.make_node("DequantizeLinear", [f"{stem}/integers", *about], [f"{stem}/out"], f"{stem}/d"),
    ])  # fmt: skip
    return f"{stem}/out"


def _sort(graph: Any) -> None:
    """Bring the nodes into an order in which everything is computed before it is read."""
    made = {entry.name for entry in (*graph.initializer, *graph.input)} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if set(node.input) <= made]
        made |= {name for node in ready for name in node.output}
        ordered += ready
        waiting = [node for node in waiting if not any(node is done for done in ready)]
    del graph.node[:]
    graph.node.extend(ordered)
