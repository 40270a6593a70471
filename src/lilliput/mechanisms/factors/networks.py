"""Chains and fire modules in networks: put in the place of a layer, described, rebuilt from a description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CorruptArtifact, InputError, ModelMismatch
from ..activations import (
    quantizer_at,
    remove_quantizer,
    replace_activation,
    replaced_activations,
)
from ..apart import keep_apart
from ..surgery.modules import find_module
from ..surgery.transaction import transaction
from .chains import KINDS, Ranks
from .fire import FIRE, Fire, fire_for
from .modules import Factors, thin
from .records import move_pack, move_plans, move_plans_to_fire

#: Chains in a description, and how deep one may lie inside of others: each may double the layer's weights.
_MOST, _DEEPEST = 1 << 12, 3
#: Where a module keeps the functions that others have hooked on.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def factorize(
    model: nn.Module, name: str, kind: str, ranks: Ranks, weights: Sequence[Tensor] | None = None
) -> Factors:
    """Put a chain of thin layers in the place of a layer, wherever the network holds it.

    Encodings of the layer are gone afterwards, quantizers of its input and output and hooks stay.

    Args:
        model: changed in place.
        name: of a linear layer or convolution inside it.
        kind: of the chain.
        ranks: of each group.
        weights: of the thin layers; zeros by default, to be filled from a file.

    Returns:
        The chain.

    Raises:
        InputError: the layer cannot become such a chain; the network is as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> factors = factorize(net, "0", "svd", (2,))
        >>> net[0].weight.shape, factors_of(net)
        (torch.Size([6, 8]), {'0': {'kind': 'svd', 'ranks': [2]}})
    """
    layer = _layer_inside(model, name)
    try:
        factors = thin(layer, kind, ranks)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    ends = {
        f"{name}:input": f"{name}.0:input",
        f"{name}:output": f"{name}.{len(factors) - 1}:output",
    }
    with transaction(model), torch.no_grad():
        if weights is not None:
            for part, weight in zip(factors, weights, strict=True):
                part.weight.copy_(weight)  # type: ignore[operator]
        move_plans(model, name, layer, factors)
        move_pack(model, name, factors)
        _take_place(model, name, layer, factors, ends)
    return factors


def put_fire(model: nn.Module, name: str, fire: Fire) -> None:
    """Put a fire module in the place of a convolution, wherever the network holds it.

    What is kept of the layer is what :func:`factorize` keeps.

    Args:
        model: changed in place.
        name: of the convolution inside it.
        fire: made for it by :func:`~lilliput.mechanisms.factors.fire.fire_for`.

    Raises:
        InputError: there is no such layer, or a file could not rebuild it; the network is as it was.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1))
        >>> put_fire(net, "0", fire_for(net[0], (2, 3)))
        >>> factors_of(net)
        {'0': {'kind': 'fire', 'ranks': [2, 3]}}
    """
    layer = _layer_inside(model, name)
    with transaction(model), torch.no_grad():
        move_plans_to_fire(model, name, fire)
        move_pack(model, name, fire)
        ends = {f"{name}:input": f"{name}:input", f"{name}:output": f"{name}:output"}
        _take_place(model, name, layer, fire, ends)


def _layer_inside(model: nn.Module, name: str) -> nn.Module:
    layer = find_module(model, name) if name else None
    if layer is None:
        raise InputError(
            f"there is no layer {name!r} inside of {type(model).__name__} that could become a chain. A "
            "network that is nothing but one layer: put it into an nn.Sequential first."
        )
    return layer


def factors_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Which layers have become chains or fire modules, as plain JSON values: name -> kind and ranks."""
    return {
        name: {"kind": module.kind, "ranks": list(module.ranks)}
        for name, module in model.named_modules()
        if isinstance(module, Factors | Fire)
    }


def factorize_as(model: nn.Module, described: Any) -> None:
    """Do to a fresh network what :func:`factors_of` says of another.

    Raises:
        CorruptArtifact: the description is none.
        ModelMismatch: the network has no such layer, or one of another shape.
    """
    if not isinstance(described, dict) or len(described) > _MOST:
        raise CorruptArtifact(f"what the file says of factors cannot be: {described!r:.80}.")
    wanted = {name: _read(name, described) for name in described}
    with transaction(model):
        for name in sorted(wanted, key=lambda n: n.count(".")):  # a chain before those inside of it
            known = find_module(model, name)
            made = isinstance(known, Factors | Fire)
            if not made or (known.kind, known.ranks) != wanted[name]:  # type: ignore[union-attr]
                _rebuild(model, name, *wanted[name])


def _rebuild(model: nn.Module, name: str, kind: str, ranks: Ranks) -> None:
    try:
        if kind == FIRE:
            put_fire(model, name, fire_for(_layer_inside(model, name), ranks))
        else:
            factorize(model, name, kind, ranks)
    except InputError as error:
        raise ModelMismatch(
            f"this {type(model).__name__} is not the network in which {name!r:.80} is a chain of kind "
            f"{kind}: {error} Give a fresh instance of the class that was saved."
        ) from error


def _read(name: str, described: Mapping[str, Any]) -> tuple[str, Ranks]:
    entry: Any = described[name]
    if isinstance(entry, dict) and entry.keys() == {"kind", "ranks"} and name:
        kind, ranks = entry["kind"], entry["ranks"]
        parts = name.split(".")
        around = sum(".".join(parts[:depth]) in described for depth in range(1, len(parts)))
        sound = kind in (*KINDS, FIRE) and isinstance(ranks, list) and around <= _DEEPEST
        if sound and all(type(rank) is int and 0 < rank < 1 << 31 for rank in ranks):
            return kind, tuple(ranks)
    raise CorruptArtifact(
        f"what the file says of the factors of {name!r:.80} cannot be: {entry!r:.80}. Get it again from "
        "its source, or save the model again."
    )


def multiplied(model: nn.Module) -> nn.Module:
    """Put single layers in the places of a network's chains, in place, for those who look for its layers.

    It computes the same but for rounding, and does not remember that there were chains.
    """
    for module in reversed(list(model.modules())):  # what lies inside of a chain first
        if isinstance(module, Factors):
            _put(model, module, module.single())
    return model


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Let a module stand wherever another one stood."""
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new


def _take_place(
    model: nn.Module, name: str, layer: nn.Module, factors: nn.Module, ends: Mapping[str, str]
) -> None:
    """Let the chain stand where the layer stood, and hear what was hooked on it.

    Args:
        model: changed in place.
        name: of the layer.
        layer: what stands there.
        factors: what will.
        ends: where the layer's quantizers were -> where they will be.
    """
    quantizers = {
        place: quantizer_at(model, place) for place in ends if place in replaced_activations(model)
    }
    for place in quantizers:
        remove_quantizer(model, place)
    for hooks in _HOOKS:
        setattr(factors, hooks, getattr(layer, hooks))  # the very dicts: handles can still remove
    _put(model, layer, factors)
    for place, quantizer in quantizers.items():
        assert quantizer is not None
        replace_activation(model, ends[place], quantizer)
    keep_apart(model, name, factors)
