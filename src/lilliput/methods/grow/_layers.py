"""What ``net2net`` asks of single layers, and of two networks as a whole."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.task import answer
from ...mechanisms.taps import Taps

Norm = nn.modules.batchnorm._BatchNorm
_Conv = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd


def why_not_identity(layer: Any) -> str:
    """Why a layer cannot pass its input on, whatever its weights are; empty if it can."""
    if isinstance(layer, Norm):
        kept = layer.affine and layer.running_mean is not None
        return "" if kept else "it has no scale and shift, or no running statistics"
    if isinstance(layer, nn.Linear):
        return ""
    if not isinstance(layer, _Conv) or isinstance(layer, _Transposed):
        return f"it is a {type(layer).__name__}"
    if layer.groups > 1 and not layer.groups == layer.in_channels == layer.out_channels:
        return "it is a grouped convolution"
    return "" if _keeps_size(layer) else "it does not keep height and width"


def _keeps_size(layer: Any) -> bool:
    if any(s != 1 for s in layer.stride) or any(size % 2 == 0 for size in layer.kernel_size):
        return False
    reach = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return bool(layer.padding == "same" or list(layer.padding) == reach)


@torch.no_grad()
def input_statistics(
    network: nn.Module, places: Sequence[str], batches: Iterable[Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each channel of what goes into some modules, over all batches."""
    taps = Taps(network, [f"{place}:input" for place in places])
    seen: dict[str, list[Tensor]] = {place: [] for place in places}
    for inputs in batches:
        taps.open()
        answer(network, inputs)
        for place in places:
            for tensor in taps.calls(f"{place}:input"):
                seen[place].append(tensor.movedim(1, 0).flatten(1).double())
    taps.remove()
    joined = {place: torch.cat(parts, dim=1) for place, parts in seen.items()}
    return {p: (v.mean(1).float(), v.var(1, correction=0).float()) for p, v in joined.items()}


def exact(network: nn.Module) -> nn.Module:
    """A copy in eval mode and double precision, in which copies of channels add up without rounding."""
    return copy.deepcopy(network).eval().double()


@torch.no_grad()
def exact_answer(network: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors of what such a copy answers."""

    def double(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    return _tensors(answer(network, pytree.tree_map_only(Tensor, double, inputs)))


def answers(network: nn.Module, inputs: Any) -> list[tuple[str, int, Tensor]]:
    """Name, number of the call and first answer of the modules without children, as they were called."""
    found: list[tuple[str, int, Tensor]] = []
    calls: dict[str, int] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            number = calls[name] = calls.get(name, -1) + 1
            found.extend((name, number, tensor.clone()) for tensor in _tensors(output)[:1])

        return note

    leaves = [(name, m) for name, m in network.named_modules() if not m._modules]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    exact_answer(network, inputs)
    for handle in handles:
        handle.remove()
    return found


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _tensors(output: Any) -> list[Tensor]:
    return [t.detach() for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
