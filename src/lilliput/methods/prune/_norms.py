"""The numbers that belong to each channel of a group: what criteria on weights are computed from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ...mechanisms.groups.classes import Group, Member


def effective(model: nn.Module, tensor: str) -> Tensor:
    """A parameter or buffer by its dotted name, after all encodings, detached."""
    layer, _, name = tensor.rpartition(".")
    value: Tensor = getattr(model.get_submodule(layer), name)
    return value.detach()


def rows(value: Tensor, member: Member) -> Tensor:
    """What belongs to each channel in one tensor: float32 or wider, ``(channels, numbers)``.

    Args:
        value: the member's tensor, or one of its shape (a gradient, a product).
        member: where the channels lie in it.

    Example:
        >>> conv = Member("conv.weight", 0, "makes", np.array([[0], [2]]))
        >>> rows(torch.arange(6.0).view(3, 2), conv)
        tensor([[0., 1.],
                [4., 5.]])
    """
    wide = value if value.dtype == torch.float64 else value.float()
    index = torch.from_numpy(member.index).to(value.device)
    return wide.movedim(member.dim, 0).reshape(wide.shape[member.dim], -1)[index].flatten(1)


def filters(model: nn.Module, group: Group) -> list[Tensor]:
    """The filters that make each channel, for each layer that makes them: ``(channels, numbers)``."""
    return [rows(effective(model, m.tensor), m) for m in group.with_role("makes")]


def norms(model: nn.Module, group: Group, order: float) -> np.ndarray:
    """The norm of all numbers that make each channel, over all layers that make it.

    Args:
        model: whose weights count, after all encodings.
        group: of this model.
        order: 1 for the sum of magnitudes, 2 for the Euclidean norm; any positive number.

    Returns:
        float64 ``(channels,)``.
    """
    # The norm of the parts' norms is the norm of the whole, so no weight is gathered or copied.
    parts = [
        _of_indices(effective(model, m.tensor), m.dim, order)[m.index]
        for m in group.with_role("makes")
    ]
    each: np.ndarray = np.linalg.norm(np.concatenate(parts, axis=1), order, axis=1)
    return each


def _of_indices(value: Tensor, dim: int, order: float) -> np.ndarray:
    """The norm of what lies at each index of one dim."""
    wide = value if value.dtype == torch.float64 else value.float()
    flat = wide.movedim(dim, 0).reshape(wide.shape[dim], -1)
    # vector_norm of order 1 takes five times as long as the sum that it is.
    each = flat.abs().sum(1) if order == 1 else torch.linalg.vector_norm(flat, order, dim=1)
    return each.double().cpu().numpy()
