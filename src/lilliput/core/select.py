"""Which weights a method works on: patterns over module names.

``"fc*"`` matches by shell rules over the dotted module name (``*`` crosses dots), a list is a union,
``"!head"`` takes away, and a bare ``"!head"`` means all but the head. Only weights that multiply are
offered: linear, convolution, recurrent and attention matrices. Biases, normalization, embeddings and
raw parameters are not.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import InputError, NothingMatched, did_you_mean
from .types import Layers, resolve

_KINDS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight tensor in its place.

    Attributes:
        layer: dotted name of the module that owns it; ``""`` for the model itself.
        module: the module.
        tensor: the tensor's name in the module, for example ``"weight"``.
    """

    layer: str
    module: nn.Module
    tensor: str

    @property
    def name(self) -> str:
        """Dotted name of the tensor, as a plain model's ``state_dict`` has it."""
        return f"{self.layer}.{self.tensor}" if self.layer else self.tensor

    @property
    def value(self) -> Tensor:
        """The effective value, after all encodings."""
        value: Tensor = getattr(self.module, self.tensor)
        return value

    def encodings(self) -> list[Any]:
        """The encodings on the tensor, innermost first; see :mod:`lilliput.mechanisms.encodings`."""
        if not parametrize.is_parametrized(self.module, self.tensor):
            return []
        stacks: Any = self.module.parametrizations
        return list(stacks[self.tensor])


def matches(layers: Layers, name: str) -> bool:
    """Whether a pattern, or a list of them, covers the module name."""
    patterns = [layers] if isinstance(layers, str) else layers
    wanted = [p for p in patterns if not p.startswith("!")] or ["*"]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    return any(fnmatch.fnmatchcase(name, p) for p in wanted) and not any(
        fnmatch.fnmatchcase(name, p) for p in unwanted
    )


def weights(model: nn.Module) -> Iterator[Weight]:
    """All weights that multiply, in the order of the model's modules, encoded ones included."""
    for layer, module in model.named_modules():
        if isinstance(module, _KINDS):
            for tensor in _matrices(module):
                yield Weight(layer, module, tensor)


def select(
    model: nn.Module, layers: Layers = "*", *, by: str = "a method", setting: Any = None
) -> list[Weight]:
    """The weights of the layers that the pattern covers.

    Args:
        model: any module.
        layers: a pattern or a list of patterns over module names.
        by: who asks, for the error message.
        setting: a per-layer setting; layers that none of its patterns covers are left out.

    Raises:
        NothingMatched: the pattern covers no weight; the message names the nearest layers.
        InputError: a weight is tied to another one, which encodings cannot yet follow.
    """
    found = list(weights(model))
    chosen = [w for w in found if matches(layers, w.layer)]
    if not chosen:
        names = [w.layer for w in found]
        pattern = layers if isinstance(layers, str) else ", ".join(layers)
        hint = did_you_mean(pattern.strip("*!"), names) or " The model has no such layer at all."
        raise NothingMatched(f"{by}: the pattern {layers!r} covers no layer with weights.{hint}")
    if isinstance(setting, dict):
        chosen = [w for w in chosen if resolve(setting, w.layer) is not None]
        if not chosen:
            raise NothingMatched(
                f"{by}: no pattern of {setting} covers one of the layers "
                f"{', '.join(w.layer for w in found)}."
            )
    _refuse_tied(model, chosen)
    return chosen


def _matrices(module: nn.Module) -> list[str]:
    names = [n for n, p in module.named_parameters(recurse=False) if p.ndim >= 2]
    if parametrize.is_parametrized(module):
        names += [n for n in module.parametrizations if getattr(module, n).ndim >= 2]  # type: ignore[union-attr]
    # A recurrent layer lists its matrices in its own order, encoded or not.
    return sorted(names) if isinstance(module, nn.RNNBase | nn.RNNCellBase) else names


def _refuse_tied(model: nn.Module, chosen: list[Weight]) -> None:
    owners: dict[int, list[str]] = {}
    for layer, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{layer}.{name}")
    for weight in chosen:
        shared = owners.get(id(getattr(weight.module, weight.tensor)), [])
        if len(shared) > 1:
            raise InputError(
                f"the weight {weight.name} is tied: {' and '.join(shared)} are one parameter, and an "
                f"encoding on one of them would untie it. Leave it out with layers: '!{weight.layer}'."
            )


def example_device(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the processor for a model without any."""
    first: Tensor | None = next(itertools.chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")
