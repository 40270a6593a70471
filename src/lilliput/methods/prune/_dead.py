"""Connections of dead neurons: what no path leads through any more can go too.

A neuron is *unfed* when no path of non-zero weights leads from the input to it, and *unneeded* when none
leads from it to the output. Both show in a copy of the network whose weights are replaced by their
magnitudes and whose biases and means are zero: there nothing cancels, so an unfed neuron is exactly
0 and an unneeded one has exactly no gradient.

The rule holds for linear and convolution layers, normalization by batch, monotone activations and
pooling. Elsewhere (softmax over equal values, layer normalization) it may not, so the result is
checked: if the outputs on a real batch move, everything is put back.

The surprising rule: a network that cannot be looked at so (a part of its forward runs under ``no_grad``)
simply keeps the connections of its dead neurons; they cost bytes, not accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.run import Run
from ...core.select import Weight
from ...core.task import call, evaluation
from ...mechanisms.encodings import bake, reapply, stored_masks
from ._masking import mask_of

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_Dead: TypeAlias = dict[str, tuple[Tensor, Tensor]]


def remove_dead_connections(run: Run, weights: list[Weight]) -> None:
    """Mask the connections of dead neurons; fold the constants that unfed neurons send.

    Args:
        run: gives the model and a batch to check the outputs on.
        weights: masked weights that may lose connections.
    """
    plain = [w for w in weights if isinstance(w.module, _LAYERS) and _groups(w.module) == 1]
    if not plain:
        return
    inputs = next(run.calibration(1)).inputs
    dead = _dead_channels(run.model, plain, inputs)
    if dead is None:
        return
    constants = _constants(run.model, plain, inputs)
    state = {k: v.clone() for k, v in run.model.state_dict().items()}
    before = _outputs(run.model, inputs)
    for weight in plain:
        unfed, unneeded = dead[weight.layer]
        _cut(weight, unneeded, _fold(weight, unfed, constants[weight.layer]))
    reapply(stored_masks(run.model))
    if not _same(before, _outputs(run.model, inputs)):
        run.model.load_state_dict(state)


def _dead_channels(model: nn.Module, weights: list[Weight], inputs: Any) -> _Dead | None:
    """Per layer: which input channels are unfed, which output channels unneeded; None if it cannot be told.

    In double precision, where magnitudes of many layers neither vanish nor overflow. Some networks cannot
    run in it (``x.float()`` in forward, an initial state of their own): those keep their own.
    """
    for double in (True, False):
        try:
            return _probed(model, weights, inputs, double)
        except Exception:
            continue  # whatever it is, the network itself runs, and may keep its dead neurons
    return None


def _probed(model: nn.Module, weights: list[Weight], inputs: Any, double: bool) -> _Dead:
    positive = _magnitudes(model)
    positive = positive.double() if double else positive
    seen: _Dead = {}

    def watch(layer: str) -> Any:
        def hook(module: nn.Module, args: Any, keywords: Any, output: Tensor) -> None:
            output.retain_grad()
            seen[layer] = (_input(args, keywords), output)

        return hook

    for weight in weights:
        layer = positive.get_submodule(weight.layer)
        layer.register_forward_hook(watch(weight.layer), with_kwargs=True)
    ones = pytree.tree_map_only(Tensor, lambda t: _ones(t[:1], double), inputs)
    with torch.enable_grad():
        outputs = [t for t in pytree.tree_leaves(call(positive, ones)) if isinstance(t, Tensor)]
        torch.stack([t.sum() for t in outputs]).sum().backward()
    nothing = torch.zeros(1)
    return {
        w.layer: (
            _by_channel(w.module, seen[w.layer][0].detach()).abs().sum(0) == 0,
            _by_channel(w.module, _gradient(seen[w.layer][1])).abs().sum(0) == 0,
        )
        if w.layer in seen
        else (nothing.bool(), nothing.bool())
        for w in weights
    }


def _ones(like: Tensor, double: bool) -> Tensor:
    """An input that feeds everything; indices stay what they are, bytes are taken for pixels."""
    if like.is_floating_point():
        return torch.ones_like(like, dtype=torch.float64 if double else None)
    return torch.ones_like(like) if like.dtype == torch.uint8 else like


def _magnitudes(model: nn.Module) -> nn.Module:
    """A copy in which nothing can cancel."""
    positive = bake(copy.deepcopy(model)).eval()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.requires_grad_(True).abs_()
        for name, tensor in positive.state_dict().items():
            if name.rpartition(".")[2] in ("bias", "running_mean"):
                tensor.zero_()
    return positive


def _constants(model: nn.Module, weights: list[Weight], inputs: Any) -> dict[str, Tensor]:
    """Per layer: the value that each input channel always has; NaN for one that varies."""
    found: dict[str, Tensor] = {}

    def watch(weight: Weight) -> Any:
        def hook(module: nn.Module, args: Any, keywords: Any) -> None:
            rows = _by_channel(module, _input(args, keywords))
            same = (rows.amax(0) - rows.amin(0)).abs() <= 1e-6
            found[weight.layer] = torch.where(same, rows[0], torch.nan)

        return hook

    handles = [w.module.register_forward_pre_hook(watch(w), with_kwargs=True) for w in weights]
    try:
        _outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {w.layer: found.get(w.layer, torch.full((1,), torch.nan)) for w in weights}


@torch.no_grad()
def _fold(weight: Weight, unfed: Tensor, constant: Tensor) -> Tensor:
    """Move what unfed channels send into the bias; returns the channels whose weights may go."""
    module: Any = weight.module
    padded = isinstance(module, nn.modules.conv._ConvNd) and any(_padding(module))
    free = unfed & (constant == 0)
    movable = unfed & constant.isfinite() & (constant != 0)
    if padded or module.bias is None or not movable.any():
        return free
    sums = weight.value.flatten(2).sum(2) if weight.value.ndim > 2 else weight.value
    module.bias += sums[:, movable] @ constant[movable].to(sums)
    return free | movable


def _cut(weight: Weight, unneeded: Tensor, unfed: Tensor) -> None:
    mask = mask_of(weight)
    alive = mask.mask.clone()
    if len(unneeded) == len(alive):
        alive[unneeded] = False
    if len(unfed) == alive.shape[1]:
        alive[:, unfed] = False
    mask.update(alive)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluation(model):
        return [t for t in pytree.tree_leaves(call(model, inputs)) if isinstance(t, Tensor)]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-7)
        for a, b in zip(after, before, strict=True)
    )


def _input(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """What a layer gets, by place or by name."""
    return next(t for t in (*args, *keywords.values()) if isinstance(t, Tensor))


def _by_channel(module: nn.Module, tensor: Tensor) -> Tensor:
    """Rows of channels, shape ``(everything else, channels)``."""
    last = tensor if isinstance(module, nn.Linear) else tensor.movedim(1, -1)
    return last.reshape(-1, last.shape[-1])


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _groups(module: nn.Module) -> int:
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 0  # its weight has the input channels first
    return getattr(module, "groups", 1)


def _padding(module: Any) -> tuple[int, ...]:
    return (1,) if isinstance(module.padding, str) else tuple(module.padding)
