"""What a network is beside its class and its tensors, taken from one and given to another.

Layers that became chains of thin ones, modules that make activations of few values, channels and modules
that are gone: each mechanism describes its own, and here they are together, in the one order in which they
can be done again. Encodings are not among them; they change how a tensor is stored, and not which there
are.

The surprising rule: a description that lacks a part leaves that part alone, so what was written before there
was such a part still can be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .activations import replace_activations, replaced_activations
from .factors import factorize_as, factors_of
from .surgery import Plan, apply_plan, checked_plan


def structure_of(model: nn.Module) -> dict[str, Any]:
    """A description, as plain JSON values.

    Raises:
        ModelMismatch: a part of the model was cut on its own, so that nothing could be rebuilt from it.

    Example:
        >>> structure_of(nn.Linear(2, 2))
        {'factors': {}, 'activations': {}, 'plan': None}
    """
    plan = checked_plan(model)
    return {
        "factors": factors_of(model),
        "activations": replaced_activations(model),
        "plan": None if plan is None else plan.as_dict(),
    }


def apply_structure(
    model: nn.Module,
    described: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Do to a network of the same class what :func:`structure_of` says of another.

    Args:
        model: a fresh instance, or one to which a part of it has been done.
        described: other keys are ignored.
        optimizer: what trains the model; its state is cut along.

    Raises:
        CorruptArtifact: it is no such description.
        ModelMismatch: it does not fit the model.
    """
    factorize_as(model, described.get("factors", {}))
    replace_activations(model, described.get("activations", {}))
    if described.get("plan") is not None:
        apply_plan(model, Plan.from_dict(described["plan"]), optimizer)
