"""Scales moved from one layer to the next through a rectifier, so that the channels of both are alike.

Nagel et al. 2019, equations 6 to 11: ``relu(s x) = s relu(x)`` for positive s, so filter i of a layer may
be divided by ``s_i = sqrt(r1_i / r2_i)`` and input i of the next one multiplied, r being the largest
magnitudes; then both have the range ``sqrt(r1_i r2_i)``. What a batch normalization multiplies counts to
the first layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.select import Weight
from ...mechanisms.encodings import Mask, original_of
from ...mechanisms.flow import Flow

_TURNS, _SMALL = 20, 1e-12


@torch.no_grad()
def equalize(model: nn.Module, chosen: list[Weight], flow: Mapping[str, Flow]) -> dict[str, str]:
    """Make pairs of layers alike, in place; the network computes what it did.

    Args:
        model: whose layers.
        chosen: their weights.
        flow: where their outputs go.

    Returns:
        First layer -> second layer of each pair that there is.
    """
    by_name = {w.layer: w for w in chosen}
    norms = Counter(f.norm for f in flow.values())
    sources = Counter(reader for f in flow.values() for reader in f.readers)
    pairs = {
        a: f.readers[0]
        for a, f in flow.items()
        if f.to_layers and f.in_place and f.high == math.inf and f.low in (0.0, -math.inf)
        if len(f.readers) == 1 == sources[f.readers[0]] == f.calls == flow[f.readers[0]].calls
        if f.norm is None or (norms[f.norm] == 1 and _scales(model.get_submodule(f.norm)))
        if a in by_name and f.readers[0] in by_name
        if _fits(by_name[a], by_name[f.readers[0]])
    }
    for _ in range(_TURNS if pairs else 0):
        apart = [_even(model, by_name[a], by_name[b], flow[a].norm) for a, b in pairs.items()]
        if max(apart) < 1e-3:
            break
    return pairs


def _fits(first: Weight, second: Weight) -> bool:
    """Whether the outputs of one are, channel by channel, the inputs of the other."""
    plain = all(isinstance(e, Mask) for w in (first, second) for e in w.encodings())
    module: Any = second.module
    inputs = getattr(module, "in_channels", getattr(module, "in_features", 0))
    groups = getattr(module, "groups", 1)
    simple = groups == 1 or groups == inputs == len(second.value)
    return plain and inputs == len(first.value) and simple


def _scales(norm: Any) -> bool:
    return norm.weight is not None and norm.running_var is not None


def _even(model: nn.Module, first: Weight, second: Weight, norm: str | None) -> float:
    """One pair; how far the scales were from 1."""
    behind: Any = None if norm is None else model.get_submodule(norm)
    own = original_of(first).abs().flatten(1).amax(1)
    if behind is not None:
        own = own * behind.weight.abs() * (behind.running_var + behind.eps).rsqrt()
    theirs = _by_input(second).abs().amax(1)
    alive = (own > _SMALL) & (theirs > _SMALL)
    scale = torch.where(alive, (own / theirs.clamp_min(_SMALL)).sqrt(), torch.ones_like(own))
    if behind is None:
        original_of(first).div_(_along(scale, original_of(first), 0))
        if first.module.bias is not None:
            first.module.bias.div_(scale)  # type: ignore[operator]
    else:
        behind.weight.div_(scale)
        behind.bias.div_(scale)
    weight = original_of(second)
    depthwise = weight.ndim > 2 and weight.shape[1] == 1 and len(weight) == len(scale)
    weight.mul_(_along(scale, weight, 0 if depthwise else 1))
    return float((scale.log().abs()).max())


def _by_input(weight: Weight) -> Tensor:
    """A row for each input channel."""
    value = original_of(weight)
    depthwise = getattr(weight.module, "groups", 1) > 1
    return (value if depthwise else value.transpose(0, 1)).flatten(1)


def _along(scale: Tensor, weight: Tensor, dim: int) -> Tensor:
    return scale.view(*[-1 if d == dim else 1 for d in range(weight.ndim)])
