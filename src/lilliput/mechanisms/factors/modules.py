"""A chain as a module, and the chain for a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init

from ...errors import InputError
from ..encodings import Encoding
from .chains import Link, Ranks, Shape, chain, check_ranks, compose

#: Plain layers by the dims of their kernel.
_PLAIN: tuple[type[Any], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


class Factors(nn.Sequential):
    """A chain of thin layers that stands for one layer.

    Code that reads ``weight`` and the like of the layer still finds them; ``weight`` is computed.

    Args:
        layers: thin ones, from input to output.
        kind: of the chain.
        ranks: with which it was made; surgery may have thinned it since.
    """

    def __init__(self, *layers: nn.Module, kind: str = "svd", ranks: Ranks = ()) -> None:
        super().__init__(*layers)
        self.kind, self.ranks = kind, tuple(ranks)

    def extra_repr(self) -> str:
        """Kind and ranks."""
        return f"{self.kind} of rank {', '.join(map(str, self.ranks))}"

    @property
    def weight(self) -> Tensor:
        """Of the layer that the chain is, ``(out, in of a group, *kernel)``."""
        layers: Any = self
        enters = self.in_channels // self.groups if self.kind == "separable" else None
        return compose([layer.weight for layer in layers], self.groups, enters)

    @property
    def bias(self) -> Tensor | None:
        """Of the layer, which the last of the chain has."""
        found: Tensor | None = self._end(-1).bias
        return found

    @property
    def groups(self) -> int:
        """Of the layer; 1 for a linear one."""
        return int(getattr(self._end(-1), "groups", 1))

    @property
    def in_features(self) -> int:
        """Of a linear layer."""
        return int(self._end(0).in_features)

    @property
    def out_features(self) -> int:
        """Of a linear layer."""
        return int(self._end(-1).out_features)

    @property
    def in_channels(self) -> int:
        """Of a convolution."""
        return int(self._end(0).in_channels)

    @property
    def out_channels(self) -> int:
        """Of a convolution."""
        return int(self._end(-1).out_channels)

    def _end(self, place: int) -> Any:
        return self[place]

    def single(self) -> nn.Module:
        """One layer that computes what the chain computes, with a weight and a bias of its own."""
        weight, bias, links = self.weight.detach(), self.bias, list(self)
        options = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        layer: Any
        if weight.ndim == 2:
            layer = skip_init(nn.Linear, self.in_features, self.out_features, **options)
        else:
            options |= {"groups": self.groups, "padding_mode": self._end(0).padding_mode}
            layer = skip_init(
                _PLAIN[weight.ndim - 2], self.in_channels, self.out_channels, weight.shape[2:],
                _over(links, "stride", math.prod), _together(links),
                _over(links, "dilation", math.prod), **options,
            )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
        single: nn.Module = layer.train(self.training)
        return single


def _over(links: list[Any], attribute: str, join: Callable[[Any], int]) -> tuple[int, ...]:
    """What the layers of a chain have in each dim, joined; only one of them has anything of its own."""
    return tuple(map(join, zip(*(getattr(link, attribute) for link in links), strict=True)))


def _together(links: list[Any]) -> Any:
    """The padding of a chain."""
    named = next((link.padding for link in links if isinstance(link.padding, str)), None)
    return named or _over(links, "padding", sum)


def plain_kind(layer: nn.Module) -> type[Any] | None:
    """Torch's own class of linear layers or convolutions that a layer is one of."""
    return next((each for each in _PLAIN if isinstance(layer, each)), None)


def why_not(layer: nn.Module, kind: str) -> str:
    """Why a layer cannot become a chain of that kind; empty where it can."""
    name = type(layer).__name__.removeprefix("Parametrized")
    if isinstance(layer, _TRANSPOSED):
        return f"it is transposed ({name}), for which there are no chains"
    plain = plain_kind(layer)
    if plain is None:
        return f"it is a {name}, and neither linear nor a convolution"
    if not _as_usual(layer, plain):
        return f"its weight is not used or not stored as that of an nn.{plain.__name__} is ({name})"
    dims = _PLAIN.index(plain)
    if (kind == "svd") != (dims == 0):
        return f"an nn.{plain.__name__} cannot be a chain of kind {kind}"
    if kind == "spatial" and dims != 2:
        return f"spatial needs a kernel of two dims, and that of an nn.{plain.__name__} has {dims}"
    return ""


def _as_usual(layer: Any, plain: Any) -> bool:
    """Whether a layer computes what its class says, from tensors that are its own or encoded."""
    kind = type(layer)
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight and does not call it
    same = kind.forward is plain.forward
    same &= plain is nn.Linear or kind._conv_forward is plain._conv_forward
    encoded = isinstance(layer.weight, nn.Parameter) or _is_encoded(layer)
    return bool(same and encoded and "bias" in layer._parameters)


def _is_encoded(layer: Any) -> bool:
    return parametrize.is_parametrized(layer, "weight") and all(
        isinstance(step, Encoding) for step in layer.parametrizations["weight"]
    )


def thin(layer: nn.Module, kind: str, ranks: Ranks) -> Factors:
    """A chain for a layer, all its weights zero; the bias is the layer's own.

    Args:
        layer: linear or a convolution.
        kind: of the chain.
        ranks: of each group.

    Raises:
        InputError: the layer cannot become such a chain, or a rank is below 1 or above the full one.

    Example:
        >>> thin(nn.Conv2d(16, 32, 3, padding=1), "tucker", (4, 8))
        Factors(
          tucker of rank 4, 8
          (0): Conv2d(16, 4, kernel_size=(1, 1), stride=(1, 1), bias=False)
          (1): Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
          (2): Conv2d(8, 32, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    if reason := why_not(layer, kind):
        raise InputError(f"{reason}. Leave it as it is, or choose another kind of chain.")
    shape: Any = Shape.of(layer)
    check_ranks(shape, kind, ranks)
    links = chain(shape, kind, ranks)
    layers = [_thin_layer(layer, link, link is links[-1]) for link in links]
    layers[-1]._parameters["bias"] = layer._parameters["bias"]
    return Factors(*layers, kind=kind, ranks=ranks).train(layer.training)


def _thin_layer(layer: Any, link: Link, last: bool) -> nn.Module:
    """One of the chain; nothing random is drawn for it."""
    weight = layer.weight
    options = {"bias": last and layer.bias is not None}
    options |= {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        made: nn.Module = skip_init(nn.Linear, link.enters, link.leaves, **options)
    else:
        groups = layer.groups
        options["groups"] = groups * (link.enters if link.alone else 1)
        options["padding_mode"] = layer.padding_mode
        made = skip_init(
            _PLAIN[len(link.kernel)], groups * link.enters, groups * link.leaves, link.kernel,
            _own(link, layer.stride, 1), _padding(layer, link), _own(link, layer.dilation, 1), **options,
        )  # fmt: skip
    nn.init.zeros_(made.weight).requires_grad_(trains(layer))  # type: ignore[arg-type]
    return made


def _own(link: Link, values: tuple[int, ...], other: int) -> tuple[int, ...]:
    """The layer's values in the dims that the link has, and another one elsewhere."""
    return tuple(value if dim in link.dims else other for dim, value in enumerate(values))


def _padding(layer: Any, link: Link) -> Any:
    if isinstance(layer.padding, str):
        return layer.padding if link.dims else 0
    return _own(link, layer.padding, 0)


def trains(layer: Any) -> bool:
    """Whether the weight of a layer trains; of one that is encoded, anything of it."""
    if isinstance(layer.weight, nn.Parameter):
        return layer.weight.requires_grad
    return any(p.requires_grad for p in layer.parametrizations["weight"].parameters())
