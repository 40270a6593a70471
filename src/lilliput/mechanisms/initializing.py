"""What methods share that give a stage's network the weights from which it starts.

The surprising rule: they come first. Masks and codebooks are computed from the weights that they find, so a
method that replaces the weights afterwards would keep choices that were made for other weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..core import registry
from ..core.select import weights
from ..errors import InputError
from .encodings import Encoding
from .factors import Factors, Fire
from .structure import apply_structure, structure_of


def refuse_encoded(model: nn.Module, by: str) -> None:
    """Raise InputError where a weight that is about to be replaced is encoded already.

    Args:
        model: that gets its first weights.
        by: the method that gives them.

    Example:
        >>> refuse_encoded(nn.Linear(2, 2), "inherit")
    """
    for weight in weights(model):
        kinds = [e.kind for e in weight.encodings() if isinstance(e, Encoding)]
        if kinds:
            raise InputError(
                f"{by}: {weight.name} is encoded already ({', '.join(kinds)}), by a choice that was made "
                f"for its present values. List {by} before the methods that encode weights, or give the "
                "stage a network of its own (model: ...)."
            )


def owner_of(tensor: str) -> str:
    """The module to which a tensor of a ``state_dict`` belongs, also where it is parametrized.

    Example:
        >>> owner_of("block.fc.weight"), owner_of("fc.parametrizations.weight.original0")
        ('block.fc', 'fc')
    """
    module, _, inside = tensor.partition(".parametrizations.")
    return module if inside else tensor.rpartition(".")[0]


def draw_fresh_weights(model: nn.Module, seed: int) -> None:
    """Give a model the random weights with which it could have begun, in place.

    A registered architecture is built anew and cut as the model was; any other model's modules reset
    themselves (``reset_parameters``).

    Args:
        model: without encodings.
        seed: of the weights; torch's own generator is left alone.

    Raises:
        InputError: a module with parameters cannot reset itself; it is named.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        origin = getattr(model, "lilliput_origin", None)
        fresh = _reset(model) if origin is None else _built_anew(model, origin)
    model.load_state_dict(fresh.state_dict())


def _built_anew(model: nn.Module, origin: dict[str, Any]) -> nn.Module:
    build = registry.load("architecture", origin["architecture"])
    fresh: nn.Module = build(**origin["arguments"])
    apply_structure(fresh, structure_of(model))
    for made in (module for module in fresh.modules() if isinstance(module, Factors | Fire)):
        for layer in made.children():
            if hasattr(layer, "reset_parameters"):  # no chain inside; it has only zeros yet
                layer.reset_parameters()  # type: ignore[operator]
    return fresh


def _reset(model: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(model).cpu()
    for name, module in reversed(list(fresh.named_modules())):  # parents have the last word
        # Attention's has an underscore, and says what any other's says.
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if reset is not None:
            reset()
        elif module._parameters:
            raise InputError(
                f"new weights: {name or 'the network'!r} ({type(module).__name__}) has parameters of its own "
                "and no reset_parameters() to draw them anew. Give it one, or start from a network that has "
                "new weights already (in a recipe: model: ..., and reset: false)."
            )
    return fresh
