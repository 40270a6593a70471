"""A weight that is the product of two thin matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import SurgeryFailed
from .base import Encoding


class LowRank(Encoding):
    """A product of two thin matrices, which train together as one tensor.

    For matrices that no two layers can stand for, those of recurrent layers. What trains is ``(rank, rows +
    columns)``, the left factor transposed and beside it the right one; at the beginning the nearest matrix
    of that rank (singular value decomposition), each component shared equally between both.

    The surprising rule: it lies under masks only. Whatever else says which values there are would undo it.

    Args:
        rank: of the product.
        rows: of the matrix.
        columns: of the matrix.
    """

    kind = "low_rank"

    def __init__(self, rank: int, rows: int, columns: int) -> None:
        super().__init__()
        self.rank, self.rows, self.columns = rank, rows, columns
        self._start: Tensor | None = None

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> LowRank:
        """One for a weight of this shape, to be filled."""
        return cls(rows=like.shape[0], columns=like.shape[1], **settings)

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> LowRank:
        """The product of these factors, which train."""
        made = cls(left.shape[1], len(left), right.shape[1])
        made._start = torch.cat([left.T, right], dim=1)
        return made

    def settings(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}

    def right_inverse(self, value: Tensor) -> Tensor:
        """Both factors, from a matrix."""
        if value.shape != (self.rows, self.columns):
            raise SurgeryFailed(
                f"a {self.rows} x {self.columns} matrix is a product of rank {self.rank}: it cannot be cut "
                f"to {' x '.join(map(str, value.shape))}. Remove channels first, and factorize then."
            )
        if self._start is not None:
            start, self._start = self._start, None
            return start.to(value).clone()
        left, size, right = torch.linalg.svd(value.detach().double(), full_matrices=False)
        root = size[: self.rank].sqrt()
        both = torch.cat([left[:, : self.rank] * root, right[: self.rank].T * root])
        return both.T.contiguous().to(value)

    def shape_of(self, original: Tensor) -> torch.Size:
        """That of the product."""
        return torch.Size((self.rows, self.columns))

    def factors(self, original: Tensor) -> tuple[Tensor, Tensor]:
        """The left one ``(rows, rank)`` and the right one ``(rank, columns)``."""
        return original[:, : self.rows].T, original[:, self.rows :]

    def forward(self, original: Tensor) -> Tensor:
        """The effective weight."""
        left, right = self.factors(original)
        product: Tensor = left @ right
        return product
