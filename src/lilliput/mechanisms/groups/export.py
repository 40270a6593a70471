"""A network whose ``forward`` has no numbers of its own: the fallback for code that states widths.

``x.view(-1, 8, 32)`` keeps its channels in place, for nothing can correct a number inside ``forward``.
:func:`exported` turns the model into a graph with ``torch.export`` and moves the numbers out of the
graph into attributes, where :func:`find_groups` sees them like any other attribute and surgery corrects
them.

The surprising rule: the result is a network of its own. It shares its tensors with the model and has the
same names in its ``state_dict``, but it is a ``GraphModule``, and it is the network in eval mode for ever:
dropout is gone and batch normalization uses what it has learned.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...core.task import evaluation
from ...errors import InputError

#: Which argument of an operator holds sizes.
_SIZES = {
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn", "full"), (0,)),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "repeat"), (1,)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), (1,)),
    **dict.fromkeys(("split", "split_with_sizes", "layer_norm", "rms_norm", "group_norm"), (1,)),
    **dict.fromkeys(("pad", "constant_pad_nd"), (1,)),
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), (6,)),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), (6,)),
    "unflatten": (2,),
    "slice": (2, 3),
    "narrow": (2, 3),
}
_UNLIMITED = 2**31


def exported(model: nn.Module, inputs: Any) -> nn.Module:
    """The model as a graph in which no width is a constant.

    Args:
        model: is not changed; the result shares its tensors.
        inputs: an example: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        A ``torch.fx.GraphModule`` that computes what the model computes in eval mode.

    Raises:
        InputError: ``torch.export`` cannot follow the model.

    Example:
        >>> from lilliput.mechanisms.groups import find_groups
        >>> class Constant(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        ...     def forward(self, x):
        ...         return self.b(self.a(x).view(-1, 3, 6))
        >>> x = torch.zeros(2, 3, 4)
        >>> len(find_groups(Constant(), x).groups)
        0
        >>> find_groups(exported(Constant(), x), x).groups[0].channels
        6
    """
    program = _export(model, inputs)
    whole: Any = program.module()
    graph = whole.graph
    for node in reversed(list(graph.nodes)):
        if node.op == "call_module" or "_assert" in str(node.target):  # of the example's sizes
            graph.erase_node(node)
    root = nn.Module()
    root.__dict__.update(whole.__dict__)
    for node in list(graph.nodes):
        if node.op == "call_function":
            _move_numbers_out(root, graph, node)
    result = fx.GraphModule(root, graph, class_name=type(model).__name__)
    return _with_tensors_of(result, model).eval()


def _export(model: nn.Module, inputs: Any) -> Any:
    """Export with any batch size where torch allows it, else with the example's."""
    args = () if isinstance(inputs, dict) else inputs
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    any_batch = pytree.tree_map(
        lambda t: {0: torch.export.Dim.AUTO} if isinstance(t, Tensor) and t.dim() else None,
        dict(inputs) if isinstance(inputs, dict) else args,
    )
    error: Exception | None = None
    for shapes in (any_batch, None):
        try:
            with evaluation(model), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as failure:
            error = failure
    raise InputError(
        f"torch.export cannot turn the model ({type(model).__name__}) into a graph: "
        f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    ) from error


def _move_numbers_out(root: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """Let a node read the sizes that it was given from an attribute of the network."""
    schema = getattr(node.target, "_schema", None)
    places = _SIZES.get(schema.name.split("::")[1], ()) if schema is not None else ()
    numbers: list[int] = []
    name = f"sizes_{node.name}"
    arguments = list(node.args)
    with graph.inserting_before(node):
        held = graph.create_node("get_attr", name)

        def moved(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [moved(v) for v in value]
            if type(value) is not int or not 1 < value < _UNLIMITED:
                return value
            numbers.append(value)
            return graph.call_function(operator.getitem, (held, len(numbers) - 1))

        for place in places:
            if place < len(arguments):
                arguments[place] = moved(arguments[place])
    if numbers:
        setattr(root, name, numbers)
        node.args = tuple(arguments)
    else:
        graph.erase_node(held)


def _with_tensors_of(result: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """Let the graph hold the model's own parameters and buffers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        path, _, last = name.rpartition(".")
        try:
            holder = result.get_submodule(path)
        except AttributeError:
            continue
        for held in (holder._parameters, holder._buffers):
            if last in held:
                held[last] = tensor  # type: ignore[assignment]
    return result
