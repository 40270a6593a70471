"""Zeros around a picture, as a part of the convolution that reads them.

Layers that pad by themselves, as TensorFlow's do, put an operator between the integers and the product.
Zero is one of the integers, so the same zeros can be the convolution's own: no number changes, and ONNX
Runtime does not copy each tensor once more.
"""

from __future__ import annotations

from typing import Any


def absorb_paddings(graph: Any) -> list[str]:
    """Let convolutions of integers pad where an operator did it for them.

    Args:
        graph: of onnxscript's intermediate representation, changed in place.

    Returns:
        The names of these convolutions.
    """
    found = []
    for node in [node for node in graph if node.op_type == "Conv"]:
        quantizer = _behind(_behind(node, "DequantizeLinear"), "QuantizeLinear")
        padding = _behind(quantizer, "Pad")
        sides = None if padding is None else _sides(padding)
        automatic = node.attributes.get("auto_pad")
        if sides is not None and (automatic is None or automatic.as_string() == "NOTSET"):
            _absorb(graph, node, quantizer, padding, sides)
            found.append(node.name)
    return found


def _behind(node: Any, kind: str) -> Any:
    """What makes the first input of a node, if it is of that kind and nobody else reads it."""
    value: Any = None if node is None else node.inputs[0]
    maker = None if value is None else value.producer()
    alone = maker is not None and maker.op_type == kind and len(value.uses()) == 1
    return maker if alone else None


def _sides(padding: Any) -> list[int] | None:
    """How many zeros before and behind each dim of space; None for what is not such a padding."""
    mode = padding.attributes.get("mode")
    amounts, *value = (_constant(given) for given in padding.inputs[1:3])
    if amounts is None or any(padding.inputs[3:]) or (mode and mode.as_string() != "constant"):
        return None
    if len(padding.inputs) > 2 and padding.inputs[2] is not None and value != [[0]]:
        return None
    half = len(amounts) // 2
    spatial = amounts[2:half] + amounts[half + 2 :]
    outside = amounts[:2] + amounts[half : half + 2]
    return spatial if not any(outside) and min(spatial) >= 0 else None


def _constant(value: Any) -> list[int] | None:
    """The numbers of a constant."""
    from onnxscript import ir

    found = None if value is None else ir.convenience.get_const_tensor(value)
    return None if found is None else found.numpy().reshape(-1).tolist()


def _absorb(graph: Any, node: Any, quantizer: Any, padding: Any, sides: list[int]) -> None:
    from onnxscript import ir

    own = node.attributes.get("pads")
    before = list(own.as_ints()) if own else [0] * len(sides)
    node.attributes["pads"] = ir.AttrInt64s(
        "pads", [a + b for a, b in zip(before, sides, strict=True)]
    )
    inner = padding.inputs[0]
    quantizer.replace_input_with(0, inner)
    for value in (quantizer.outputs[0], node.inputs[0]):
        value.shape = inner.shape
    graph.remove(padding, safe=True)
