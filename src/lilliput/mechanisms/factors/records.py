"""What a network knows of a layer beside its tensors, moved to the chain or fire module in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..packing import Pack, pack_of, set_pack
from ..surgery.modules import within
from ..surgery.plan import Plan, last_plan, remember
from .chains import Link, Shape, chain
from .fire import Fire
from .modules import Factors


def move_plans(model: nn.Module, name: str, layer: nn.Module, factors: Factors) -> None:
    """Let plans say of the thin layers what they said of the layer."""
    links = chain(Shape.of(layer), factors.kind, factors.ranks)
    for path, module in model.named_modules():
        plan = last_plan(module)
        if plan is not None and (not path or within([path])(name)):
            own = name.removeprefix(f"{path}.")
            if factors.kind == "separable" and f"{own}.weight" in plan.kept:
                raise _cannot_follow(own)
            remember(module, _moved(plan, own, layer, links))


def _moved(plan: Plan, name: str, layer: nn.Module, links: list[Link]) -> Plan:
    _refuse_changed(plan, name, layer)
    end = len(links) - 1

    def carrier(dim: int) -> int:
        """The thin layer that has a dim of the weight: first those of channels, then the kernel's."""
        if dim < 2:
            return end if dim == 0 else 0
        return next(place for place, link in enumerate(links) if dim - 2 in link.dims)

    def tensors(known: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, Any]]:
        found: dict[str, dict[int, Any]] = {}
        for tensor, dims in known.items():
            # Dims ascend in what a checkpoint gives back, and files must not differ by their order.
            for dim, value in sorted(dims.items()):
                found.setdefault(place(tensor, dim), {})[dim] = value
        return found

    def place(tensor: str, dim: int) -> str:
        if tensor == f"{name}.weight":
            return f"{name}.{carrier(dim)}.weight"
        return f"{name}.{end}.bias" if tensor == f"{name}.bias" else tensor

    def attribute(path: str) -> str:  # of the kernel: "conv.padding.1"
        if not within([name])(path):
            return path
        leaf, _, dim = path.removeprefix(f"{name}.").partition(".")
        return f"{name}.{carrier(2 + int(dim))}.{leaf}.{dim}"

    attributes = {attribute(path): value for path, value in plan.attributes.items()}
    return replace(plan, kept=tensors(plan.kept), attributes=attributes, sizes=tensors(plan.sizes))


def move_plans_to_fire(model: nn.Module, name: str, fire: Fire) -> None:
    """Let plans say of a fire module what they said of the layer, and the module what whole one it was.

    The filters of the whole layer before the first one that has a kernel now are those that would be 1 x 1.
    """
    for path, module in model.named_modules():
        plan = last_plan(module)
        if plan is not None and (not path or within([path])(name)):
            remember(module, _moved_to_fire(plan, name.removeprefix(f"{path}."), fire))


def _moved_to_fire(plan: Plan, name: str, fire: Fire) -> Plan:
    mine = within([name])
    kept = plan.kept.get(f"{name}.weight", {})
    sizes = plan.sizes.get(f"{name}.weight", {})
    if any(map(mine, plan.attributes)) or kept.keys() - {0, 1} or kept.keys() - sizes.keys():
        raise _cannot_follow(name)
    stays = {tensor: dict(dims) for tensor, dims in plan.kept.items() if not mine(tensor)}
    whole = {tensor: dict(dims) for tensor, dims in plan.sizes.items() if not mine(tensor)}

    def say(tensor: str, dim: int, index: Any, size: int) -> None:
        stays[f"{name}.{tensor}"], whole[f"{name}.{tensor}"] = {dim: index}, {dim: size}

    if 1 in kept:
        say("squeeze.weight", 1, kept[1], sizes[1])
    if 0 in kept:
        index, ones = kept[0], int(kept[0][fire.expand1x1.out_channels])  # type: ignore[index]
        fire.ranks = (fire.ranks[0], sizes[0] - ones)
        for leaf in ("weight", "bias"):
            say(f"expand1x1.{leaf}", 0, index[index < ones], ones)
            say(f"expand3x3.{leaf}", 0, index[index >= ones] - ones, sizes[0] - ones)
    return replace(plan, kept=stays, sizes=whole)


def _refuse_changed(plan: Plan, name: str, layer: Any) -> None:
    """Raise where a layer has lost something that a chain could not lose in the same way."""
    groups = getattr(layer, "groups", 1)
    depthwise = groups > 1 and groups == layer.in_channels and f"{name}.weight" in plan.kept
    odd = [a for a in plan.attributes if within([name])(a) and not a.rpartition(".")[2].isdecimal()]
    if depthwise or odd or last_plan(layer) is not None:
        raise _cannot_follow(name)


def _cannot_follow(name: str) -> InputError:
    return InputError(
        f"{name} has lost channels in a way that a chain cannot follow (as a depthwise convolution, on its "
        "own, or before it became separable): no file could rebuild it. Factorize it before it is cut, or "
        "leave it out."
    )


def move_pack(model: nn.Module, name: str, factors: nn.Module) -> None:
    """Let the only task of a network own the thin layers as it owned the layer, all of their weights."""
    pack = pack_of(model)
    if pack is None:
        return
    if len(pack.tasks) > 1:
        raise InputError(
            f"the network holds the tasks {', '.join(pack.tasks)}, which share {name}: a chain would be "
            "another layer for all of them. Factorize before the second task is added. Nothing was changed."
        )
    gone, task = within([name]), pack.current
    state = {f"{name}.{leaf}": tensor.clone() for leaf, tensor in factors.state_dict().items()}
    matrices = {n: t for n, t in state.items() if n.endswith("weight")}
    rest = pack.only(lambda tensor: not gone(tensor))
    if any(map(gone, pack.own[task])):
        set_pack(model, replace(rest, own={**rest.own, task: rest.own[task] | state}))
    elif any(map(gone, pack.weights)):
        set_pack(model, _owned(rest, pack.number(task), task, state, matrices))
    else:
        set_pack(model, replace(rest, shared=rest.shared | state))


def _owned(
    pack: Pack, number: int, task: str, state: dict[str, Tensor], matrices: dict[str, Tensor]
) -> Pack:
    def all_of(make: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {name: make(tensor) for name, tensor in matrices.items()}

    owners, masks = pack.owners, pack.masks
    if pack.kind == "owners":
        owners = owners | all_of(lambda t: torch.full_like(t, number, dtype=torch.uint8))
    else:
        masks = {task: masks[task] | all_of(lambda t: torch.ones_like(t, dtype=torch.bool))}
    biases = {name: tensor for name, tensor in state.items() if name not in matrices}
    return replace(
        pack, weights=pack.weights | matrices, owners=owners, masks=masks, shared=pack.shared | biases
    )  # fmt: skip
