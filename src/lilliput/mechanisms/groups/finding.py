"""The entry point: from a model and an example to its groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...core.collector import paused_collector
from ...errors import InputError
from .attributes import Attributes, settle
from .classes import Groups
from .components import assemble, unprunable
from .trace import Heads
from .tracing import trace


@paused_collector()
def find_groups(model: nn.Module, inputs: Any, *, heads: Heads = "channels") -> Groups:
    """Find which channels of a network must live or die together.

    Args:
        model: any module; it is neither run nor changed.
        inputs: an example: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            Only shapes and types matter.
        heads: what of attention can be removed: ``"channels"`` inside every head, the same number in
            each, or ``"whole"`` heads.

    Returns:
        The groups, and why other channels must stay.

    Raises:
        ModelMismatch: the model fails on the inputs.
        InputError: its control flow depends on data; it is a TorchScript module; ``heads`` is unknown.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups = find_groups(net, torch.zeros(1, 4))
        >>> [(g.name, g.channels) for g in groups.groups]
        [('0', 8)]
        >>> [(m.tensor, m.dim, m.role) for m in groups.groups[0].members]
        [('0.weight', 0, 'makes'), ('0.bias', 0, 'along'), ('2.weight', 1, 'uses')]
        >>> groups.unprunable
        {'2.weight dim 0': "it is the network's output"}
    """
    if heads not in ("channels", "whole"):
        raise InputError(f"heads={heads!r} is unknown: it is 'channels' or 'whole'.")
    record = trace(model, inputs, heads)
    if heads == "whole" and record.attention:
        record = trace(model, inputs, heads, frozenset(record.attention))
    solution, constants = settle(record)
    groups, assembly = assemble(record, solution)
    return Groups(
        groups,
        unprunable(record, solution),
        Attributes(record, solution, assembly),
        tuple(constants),
    )
