"""Tensors of a file into a network: cut it as the file says, check everything, then fill it.

The surprising rule: a network is filled whole or not at all, so all names and shapes are compared first.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import Tensor, nn

from ..errors import CorruptArtifact, LilliputError, ModelMismatch
from ..mechanisms.surgery import Plan, apply_plan, transaction
from ._forms import multiplied

Path_ = str | PathLike[str]


def thin_and_fill(model: nn.Module, plan: Any, state: dict[str, Tensor], path: Path_) -> None:
    """Cut out what the network in the file has lost, and take in its tensors."""
    if plan is None:
        fill(model, state, path)
        return
    with transaction(model):
        try:
            apply_plan(model, Plan.from_dict(plan))
        except CorruptArtifact as error:
            raise CorruptArtifact(f"{path}: {error}") from error
        except LilliputError as error:
            raise ModelMismatch(f"{path} does not fit {type(model).__name__}: {error}") from error
        fill(model, state, path)


def fill(model: nn.Module, state: dict[str, Tensor], path: Path_) -> None:
    """Load a state, after checking all of it, so that a model is filled whole or not at all."""
    own = model.state_dict()
    state = multiplied(state, own, path)
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or foreign:
        raise ModelMismatch(
            f"{path} does not fit {type(model).__name__}: "
            + "; ".join(
                f"{what} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
                for what, names in (("the file lacks", missing), ("the model lacks", foreign))
                if names
            )
            + "."
        )
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise ModelMismatch(
                f"{path} does not fit {type(model).__name__}: {name} has the shape "
                f"{tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in the model."
            )
    model.load_state_dict(state)
