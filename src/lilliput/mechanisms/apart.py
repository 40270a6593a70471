"""What stands in the place of a layer inside a transformer must be called.

The surprising rule: in eval mode torch runs a transformer's layer as one operator on the weights that it
finds, and calls none of its modules, unless one of them has a hook.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_apart(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let transformer layers around a module run operator by operator.

    Args:
        model: of any kind.
        name: the module's, in the model.
        module: what stands there; it gets a hook that does nothing.
    """
    for path, parent in model.named_modules():
        if path and not name.startswith(f"{path}."):
            continue
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False
        elif isinstance(parent, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_stand_apart)


def _stand_apart(module: nn.Module, inputs: Any) -> None:
    """A hook that does nothing but be there."""
