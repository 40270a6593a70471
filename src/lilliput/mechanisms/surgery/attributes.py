"""The sizes that modules keep as Python numbers, brought in line with their tensors after a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...core.task import evaluation
from ...errors import ModelMismatch, SurgeryFailed
from .tensors import module_at

Values = dict[str, Any]


def set_sizes(model: nn.Module, layers: Iterable[str]) -> None:
    """Let the size attributes of torch's own layers say what their tensors are now.

    Args:
        model: whose tensors have been cut.
        layers: names of the modules that own them.

    Raises:
        SurgeryFailed: the tensors of one layer contradict each other.
    """
    for name in dict.fromkeys(layers):
        module = module_at(model, name)
        assert module is not None  # its tensors have been cut
        sizes = next((rule for kinds, rule in _SIZES if isinstance(module, kinds)), None)
        if sizes is not None:
            vars(module).update(_values(sizes, name, module))
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # on a GPU, cuDNN wants them in one piece again


def _values(sizes: Callable[[str, Any], Values], name: str, module: nn.Module) -> Values:
    if "parametrizations" not in module._modules:
        return sizes(name, module)
    with evaluation(module), torch.no_grad():  # a weight is computed here
        return sizes(name, module)


def set_attributes(model: nn.Module, attributes: Mapping[str, int]) -> None:
    """Correct integers of a user's own modules, such as ``"blocks.0.attention.num_heads"``.

    A number at the end is a place in a tuple or list: ``"norm.normalized_shape.0"``.

    Raises:
        ModelMismatch: there is no such integer, or it would not shrink.
    """
    for path, value in attributes.items():
        module, attribute, place = _find(model, path)
        known = vars(module)[attribute]
        old = known if place is None else known[place]
        least = 0 if _is_padding(module, attribute) else 1
        if type(old) is not int or not least <= value <= old:
            raise ModelMismatch(
                f"{path} is {old!r} in {type(model).__name__} and cannot become {value!r}: a width is "
                "an integer that only shrinks. The plan is of another network."
            )
        setattr(module, attribute, value if place is None else _with(known, place, value))


def _is_padding(module: nn.Module, attribute: str) -> bool:
    """Whether 0 is a size of it: a padding vanishes with the border of its kernel."""
    return isinstance(module, nn.modules.conv._ConvNd) and attribute == "padding"


def _find(model: nn.Module, path: str) -> tuple[nn.Module, str, int | None]:
    head, _, last = path.rpartition(".")
    place = int(last) if last.isdecimal() and len(last) < 4 else None
    name, _, attribute = (path if place is None else head).rpartition(".")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    known: Any = vars(module).get(attribute) if module is not None else None
    if place is None:
        is_number = type(known) is int
    else:
        is_number = type(known) in (tuple, list, torch.Size) and place < len(known)
    if module is None or not is_number:
        raise ModelMismatch(
            f"{type(model).__name__} has no integer {path!r}: the plan is of another network."
        )
    return module, attribute, place


def _with(known: Any, place: int, value: int) -> Any:
    return type(known)([*known[:place], value, *known[place + 1 :]])


def _convolution(name: str, m: Any) -> Values:
    transposed = bool(m.transposed)
    depthwise = m.groups > 1 and m.groups == m.in_channels
    first, second = m.weight.shape[:2]
    groups = m.groups
    if depthwise:
        groups = first if transposed else first * groups // m.out_channels
    own, other = ("in_channels", "out_channels") if transposed else ("out_channels", "in_channels")
    return {"groups": groups, own: first, other: second * groups}


def _linear(name: str, m: Any) -> Values:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _bilinear(name: str, m: Any) -> Values:
    out, first, second = m.weight.shape
    return {"out_features": out, "in1_features": first, "in2_features": second}


def _batch_norm(name: str, m: Any) -> Values:
    return {"num_features": len(m.weight if m.weight is not None else m.running_mean)}


def _trailing_norm(name: str, m: Any) -> Values:
    return {"normalized_shape": tuple(m.weight.shape)}


def _group_norm(name: str, m: Any) -> Values:
    return {"num_channels": len(m.weight)}


def _embedding(name: str, m: Any) -> Values:
    return {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}


def _prelu(name: str, m: Any) -> Values:
    return {"num_parameters": len(m.weight)}


def _recurrent(name: str, m: Any) -> Values:
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    sizes = {"input_size": m.weight_ih_l0.shape[1], "hidden_size": len(m.weight_ih_l0) // gates}
    if m.proj_size:
        sizes["proj_size"] = len(m.weight_hr_l0)
    state = sizes.get("proj_size", sizes["hidden_size"])
    for tensor in (n for n in m._flat_weights_names if n.startswith("weight_hh")):
        found = tuple(getattr(m, tensor).shape)
        if found != (gates * sizes["hidden_size"], state):
            raise SurgeryFailed(
                f"{name}.{tensor} would have the shape {found} beside {sizes['hidden_size']} hidden "
                "units in the first layer, and torch wants all layers and directions alike. The model "
                "is as it was. Remove the same number from each."
            )
    return sizes


def _recurrent_cell(name: str, m: Any) -> Values:
    return {"input_size": m.weight_ih.shape[1], "hidden_size": m.weight_hh.shape[1]}


def _attention(name: str, m: Any) -> Values:
    packed = m._qkv_same_embed_dim
    inner, width = m.in_proj_weight.shape if packed else m.q_proj_weight.shape
    inner = inner // 3 if packed else inner
    if inner != width or width % m.num_heads:
        raise SurgeryFailed(
            f"{name} would attend with {inner} channels in {m.num_heads} heads over inputs of {width}, "
            "and nn.MultiheadAttention wants the two widths equal and divisible by the heads. The "
            "model is as it was. Leave it out of the layers."
        )
    return {
        "embed_dim": width,
        "head_dim": width // m.num_heads,
        "kdim": width if packed else m.k_proj_weight.shape[1],
        "vdim": width if packed else m.v_proj_weight.shape[1],
    }


_SIZES: tuple[tuple[Any, Callable[[str, Any], Values]], ...] = (
    (nn.modules.conv._ConvNd, _convolution),
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    ((nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm), _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _trailing_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.MultiheadAttention, _attention),
)
