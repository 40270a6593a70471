"""Quantizers before poolings by maxima.

A network has its quantizer behind a pooling, where the next layer reads. The largest of some integers is
the integer of the largest value, so nothing changes if the values become integers before it as well. ONNX
Runtime sees that by itself; OpenVINO, unless it is told, hands real numbers from the convolution to the
pooling, which in a ResNet-18 is the largest tensor of all.

The surprising rule: the quantizer behind stays. Without it ONNX Runtime finds no pair before the next
convolution, and leaves that one in float.
"""

from __future__ import annotations

from typing import Any


def quantize_before_poolings(graph: Any) -> list[str]:
    """Give each pooling whose readers all count in the same steps a quantizer of these steps before it.

    Args:
        graph: of onnxscript's intermediate representation, changed in place.

    Returns:
        The names of these poolings.
    """
    given = {id(output) for output in graph.outputs}
    poolings = [node for node in graph if node.op_type == "MaxPool"]
    found = [n for n in poolings if id(n.outputs[0]) not in given and _counted_alike(n)]
    for node in found:
        _quantize(graph, node)
    return [node.name for node in found]


def _counted_alike(pooling: Any) -> bool:
    """Whether all that becomes of the output is integers of one step and zero."""
    largest, *indices = pooling.outputs
    readers = [reader for reader, _ in largest.uses()]
    if any(output.uses() for output in indices) or not readers:
        return False
    if any(reader.op_type != "QuantizeLinear" for reader in readers):
        return False
    return all(_grid(reader) == _grid(readers[0]) != (None, None) for reader in readers)


def _grid(quantizer: Any) -> tuple[Any, ...]:
    """Step and zero, where the file has them as constants of one number."""
    known = [value.const_value for value in quantizer.inputs[1:]]
    if len(known) != 2 or any(value is None or value.size != 1 for value in known):
        return (None, None)
    return tuple(value.numpy().item() for value in known)


def _quantize(graph: Any, pooling: Any) -> None:
    from onnxscript import ir

    behind = pooling.outputs[0].uses()[0][0]
    about = behind.inputs[1:]
    first = ir.Node(
        "", "QuantizeLinear", [pooling.inputs[0], *about], name=f"{pooling.name}/quantize"
    )
    second = ir.Node(
        "", "DequantizeLinear", [first.outputs[0], *about], name=f"{pooling.name}/dequantize"
    )
    for node, like in ((first, behind.outputs[0]), (second, pooling.inputs[0])):
        node.outputs[0].name = f"{node.name}/out"
        node.outputs[0].type, node.outputs[0].shape = like.type, pooling.inputs[0].shape
    graph.insert_before(pooling, [first, second])
    pooling.replace_input_with(0, second.outputs[0])
