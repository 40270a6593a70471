"""What methods share that give a stage's network the weights from which it starts.

The surprising rule: they come first. Masks and codebooks are computed from the weights that they find, so a
method that replaces the weights afterwards would keep choices that were made for other weights.
"""

from __future__ import annotations

from torch import nn

from ..core.select import weights
from ..errors import InputError
from .encodings import Encoding


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
