"""Shared values: weights that are looked up in a small table.

Source: Han, Mao & Dally 2016, "Deep Compression", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import clustering
from .base import Encoding


class Codebook(Encoding):
    """Shared values: the centroids train, the assignment of weights to them is frozen.

    Code 0 is the zero that pruning left; it has no centroid and stays exactly zero. Code ``k`` is
    centroid ``k - 1``. Several layers may share one codebook, see :func:`share_codebook`.

    Args:
        codes: integers in the weight's shape, 0 to the number of centroids.
        centroids: float, shape ``(clusters,)``; where training starts.
        book: name of a codebook that several weights share.
    """

    kind = "codebook"
    depth = (
        -1
    )  # inside a grid: its values go to the grid, while a list of values has no filters to scale
    codes: Tensor

    def __init__(self, codes: Tensor, centroids: Tensor, book: str = "") -> None:
        super().__init__()
        self.register_buffer(
            "codes", codes.to(torch.uint8 if len(centroids) < 256 else torch.int32)
        )
        self._start = centroids.detach().clone()
        self.book = book
        # What trains, where several weights share it; in a tuple, lest torch takes it for a part of this.
        self.shared: tuple[nn.Parameter, ...] = ()
        self._members: tuple[Tensor, Tensor | None] | None = None

    @classmethod
    def empty(cls, like: Tensor, settings: dict[str, Any]) -> Codebook:
        """One for a weight of this shape, to be filled."""
        codes = torch.ones_like(like, dtype=torch.int32)
        return cls(codes, like.new_zeros(settings["clusters"]), settings.get("book", ""))

    @classmethod
    def fitted(cls, value: Tensor, bits: int, init: clustering.Init, seed: int = 0) -> Codebook:
        """Cluster the non-zero entries of a weight so that a code fits into ``bits`` bits.

        Where the weight has zeros, one code is theirs.
        """
        flat = value.detach().cpu().reshape(-1)
        places = flat.nonzero().view(-1)
        clusters = 2**bits - (len(places) < len(flat))
        found = clustering.kmeans(flat[places].numpy(), clusters, init=init, seed=seed)
        codes = torch.zeros(len(flat), dtype=torch.int32)
        codes[places] = torch.from_numpy(found.codes.astype("int32")) + 1
        centroids = torch.from_numpy(found.centroids).to(value.device)
        return cls(
            torch.zeros_like(value, dtype=torch.int32).copy_(codes.view(value.shape)), centroids
        )

    @property
    def start(self) -> Tensor:
        """The centroids from which training starts, shape ``(clusters,)``."""
        return self._start

    def settings(self) -> dict[str, Any]:
        """How many centroids there are, and whose they are."""
        return {"clusters": len(self._start), **({"book": self.book} if self.book else {})}

    def right_inverse(self, value: Tensor) -> Tensor:
        """The centroids are what trains."""
        return self._start.to(value)

    def shape_of(self, original: Tensor) -> torch.Size:
        """That of the codes; what trains are the centroids."""
        return self.codes.shape

    def members(self) -> tuple[Tensor, Tensor | None]:
        """Centroid number of each non-zero weight and its place; places None where none is zero."""
        if self._members is None or self._members[0].device != self.codes.device:
            flat = self.codes.reshape(-1)
            places = flat.nonzero().view(-1)
            dense = len(places) == flat.numel()
            self._members = (
                (flat if dense else flat[places]).long() - 1,
                None if dense else places,
            )
        return self._members

    def forward(self, centroids: Tensor) -> Tensor:
        """The effective weight."""
        codes = self.codes  # looked up once: torch's attributes are slow
        weight = _lookup(centroids, *self.members(), codes.shape)
        # The codes are laid out as the layer is: hand the weight over in the same layout.
        channels_last = codes.ndim == 4 and not codes.is_contiguous()
        return weight.contiguous(memory_format=torch.channels_last) if channels_last else weight

    def table(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes in the weight's shape, and the value of each code; the zero has one where it occurs."""
        if self.members()[1] is None and not self.book:
            return self.codes - 1, centroids
        return self.codes, torch.cat([centroids.new_zeros(1), centroids])

    def forget(self) -> None:
        """Drop the list of members."""
        self._members = None


def _lookup(centroids: Tensor, codes: Tensor, places: Tensor | None, shape: torch.Size) -> Tensor:
    """The centroid of each member, at its place among zeros.

    Differentiated, it sums over the members of each cluster, which is equation 3 of Deep Compression:
    dL/dC_k is the sum of dL/dW_ij over all ij with I_ij = k.
    """
    values = centroids.index_select(0, codes)
    if places is not None:
        # Its gradient, an index_select, is faster than the gather of scatter_.
        values = centroids.new_zeros(shape.numel()).index_copy_(0, places, values)
    return values.view(shape)
