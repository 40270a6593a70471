"""Which activation modules a paper's quantizer takes the place of."""

from __future__ import annotations

from torch import nn

from ...core.select import matches
from ...core.types import Layers
from ...errors import NothingMatched, did_you_mean
from ...mechanisms.activations import Activation

_KINDS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.Tanh, Activation)


def rectifiers(model: nn.Module, pattern: Layers, by: str) -> list[str]:
    """The names of the activation modules that a pattern covers; those that are replaced already count.

    Args:
        model: any module.
        pattern: over module names.
        by: who asks, for the error message.

    Raises:
        NothingMatched: there is none.

    Example:
        >>> rectifiers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "*", "half_wave")
        ['1']
    """
    known = [name for name, module in model.named_modules() if isinstance(module, _KINDS)]
    found = [name for name in known if matches(pattern, name)]
    if not found:
        hint = did_you_mean(str(pattern).strip("*!"), known) or (
            " The model has no activation modules: calls of torch.relu inside forward cannot be replaced."
        )
        raise NothingMatched(f"{by}: activations: {pattern!r} covers no activation module.{hint}")
    return found
