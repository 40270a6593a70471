"""Adapters: small trainable modules between a student's feature and its teacher's of another shape.

They are built from the shapes that one probe forward shows, join the stage's optimizer through
``run.extra``, and never reach the compressed file.

The surprising rule: ``auto`` is the identity where the shapes agree. A paper that adapts even then
asks for its own kind (``conv1x1``, ``linear``, ``fitnets``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelMismatch

Kind: TypeAlias = Literal["auto", "identity", "conv1x1", "fitnets", "linear", "interpolate"]
Shape: TypeAlias = tuple[int, ...]


def build_adapter(kind: Kind, student: Shape, teacher: Shape) -> nn.Module:
    """A module that brings a student's feature to its teacher's shape.

    Args:
        kind: ``identity``; ``conv1x1``; ``fitnets``, a convolution without padding whose kernel makes
            up for the difference in size, then a ReLU; ``linear`` on the last dim; ``interpolate``,
            bilinear in height and width; ``auto``, of these the least that fits.
        student: shape of the feature, ``(batch, channels, height, width)`` or ``(batch, ..., width)``.
        teacher: shape that is wanted.

    Raises:
        ModelMismatch: this kind cannot bridge these shapes.

    Example:
        >>> build_adapter("fitnets", (1, 16, 10, 10), (1, 32, 8, 8))
        Sequential(
          (0): Conv2d(16, 32, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
        )
    """
    if len(student) != len(teacher):
        raise _cannot(kind, student, teacher, "one has other dims than the other")
    adapter = _BUILDERS[kind](student, teacher)
    with torch.no_grad():
        made = tuple(adapter(torch.zeros(1, *student[1:])).shape)
    if made[1:] != teacher[1:]:
        raise _cannot(kind, student, teacher, f"it would give {made[1:]} a sample")
    return adapter


class Interpolation(nn.Module):
    """Bilinear interpolation to a height and width.

    Args:
        size: ``(height, width)``.
    """

    def __init__(self, size: Shape) -> None:
        super().__init__()
        self.size = size

    def forward(self, feature: Tensor) -> Tensor:
        """From ``(batch, channels, ...)`` to ``(batch, channels, *size)``."""
        return F.interpolate(feature, self.size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        """The size."""
        return f"size={self.size}"


def _identity(student: Shape, teacher: Shape) -> nn.Module:
    return nn.Identity()


def _conv1x1(student: Shape, teacher: Shape) -> nn.Module:
    _need_maps("conv1x1", student, teacher)
    convolution = nn.Conv2d(student[1], teacher[1], 1)
    if student[2:] == teacher[2:]:
        return convolution
    return nn.Sequential(convolution, Interpolation(teacher[2:]))


def _fitnets(student: Shape, teacher: Shape) -> nn.Module:
    """Romero 2015, section 2.2: a kernel of size k with ``N_guided - k + 1 = N_hint``, then a ReLU."""
    if len(student) == 2:
        return nn.Sequential(nn.Linear(student[1], teacher[1]), nn.ReLU())
    _need_maps("fitnets", student, teacher)
    kernel = [own - hint + 1 for own, hint in zip(student[2:], teacher[2:], strict=True)]
    if min(kernel) < 1:
        raise _cannot("fitnets", student, teacher, "the hint is larger than the guided layer's map")
    return nn.Sequential(nn.Conv2d(student[1], teacher[1], (kernel[0], kernel[1])), nn.ReLU())


def _linear(student: Shape, teacher: Shape) -> nn.Module:
    return nn.Linear(student[-1], teacher[-1])


def _interpolate(student: Shape, teacher: Shape) -> nn.Module:
    _need_maps("interpolate", student, teacher)
    return Interpolation(teacher[2:])


def _auto(student: Shape, teacher: Shape) -> nn.Module:
    if student[1:] == teacher[1:]:
        return nn.Identity()
    if len(student) != 4:
        return _linear(student, teacher)
    return (_interpolate if student[1] == teacher[1] else _conv1x1)(student, teacher)


def _need_maps(kind: str, student: Shape, teacher: Shape) -> None:
    if len(student) != 4:
        raise _cannot(kind, student, teacher, "it needs maps (batch, channels, height, width)")


def _cannot(kind: str, student: Shape, teacher: Shape, why: str) -> ModelMismatch:
    return ModelMismatch(
        f"the adapter {kind!r} cannot bring a feature of shape {student} to {teacher}: {why}. Choose "
        "another kind, or places whose features are alike."
    )


_BUILDERS: dict[Kind, Callable[[Shape, Shape], nn.Module]] = {
    "auto": _auto,
    "identity": _identity,
    "conv1x1": _conv1x1,
    "fitnets": _fitnets,
    "linear": _linear,
    "interpolate": _interpolate,
}
