"""What an artifact weighs: real bytes beside the order-0 entropy.

The entropy says what training has gained (zeros, few values); the ratio of real bytes to it says
what coding has gained or lost. They are counted for the same things: a tensor's weights, without
its codebook, which is part of the model and listed apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact.entries import Entry
from lilliput.artifact.entropy import entropy_bits


@dataclass(frozen=True)
class TensorReport:
    """The size of one tensor.

    Attributes:
        name: the tensor's name.
        codec: the codec that holds it.
        shape: its shape.
        weights: its number of values.
        nonzeros: values that are not zero.
        levels: values of its codebook, 0 for a plain tensor.
        bytes: bytes of its payload, codebook included.
        codebook_bytes: bytes of its codebook; 0 where it shares another's.
        entropy_bytes: entropy per weight, zero as a symbol, times the weights. For a plain tensor:
            its bytes as they are stored; of a coded one the entropy of where the zeros are plus
            the bytes of the others, if that is less.
        dense_bytes: bytes decoded.
    """

    name: str
    codec: str
    shape: tuple[int, ...]
    weights: int
    nonzeros: int
    levels: int
    bytes: int
    codebook_bytes: int
    entropy_bytes: float
    dense_bytes: int

    @property
    def ratio(self) -> float:
        """Decoded bytes over stored bytes."""
        return self.dense_bytes / max(1, self.bytes)

    @property
    def is_coded(self) -> bool:
        """Whether an entropy is meaningful for it: it is not stored as it is."""
        return self.levels > 0 or self.codec not in ("raw", "f16")


@dataclass(frozen=True)
class SizeReport:
    """The size of a file, and of each tensor in it.

    Attributes:
        path: the file.
        profile: "safetensors" or "compact".
        file_bytes: `os.path.getsize` of the file.
        header_bytes: of these, everything that is no payload.
        tensors: one report a tensor, in the writer's order.
    """

    path: str
    profile: str
    file_bytes: int
    header_bytes: int
    tensors: tuple[TensorReport, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors decoded."""
        return sum(tensor.dense_bytes for tensor in self.tensors)

    @property
    def weights(self) -> int:
        """Values of all tensors."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def nonzeros(self) -> int:
        """Values that are not zero, of all tensors."""
        return sum(tensor.nonzeros for tensor in self.tensors)

    @property
    def entropy_bytes(self) -> float:
        """Entropies of all tensors, those stored as they are at their stored size."""
        return sum(tensor.entropy_bytes for tensor in self.tensors)

    @property
    def ratio(self) -> float:
        """Decoded bytes over bytes on disk."""
        return self.dense_bytes / self.file_bytes

    @property
    def entropy_ratio(self) -> float:
        """Coded bytes, without codebooks, over the order-0 entropy of the same tensors."""
        coded = [tensor for tensor in self.tensors if tensor.is_coded]
        entropy = sum(tensor.entropy_bytes for tensor in coded)
        real = sum(tensor.bytes - tensor.codebook_bytes for tensor in coded)
        return real / entropy if entropy else 1.0


def report_tensor(name: str, entry: Entry, counts: NDArray[np.int64] | None) -> TensorReport:
    """The report of one tensor, given the counts of its symbols if it has a codebook."""
    if counts is not None:
        entropy = entropy_bits(counts) / 8
    elif entry.is_plain:
        entropy = float(entry.size)
    else:
        zeros = np.array([entry.weights - entry.nonzeros, entry.nonzeros])
        values = entropy_bits(zeros) / 8 + entry.nonzeros * entry.itemsize
        entropy = min(values, float(entry.size))  # bytes that repeat are coded in less
    return TensorReport(
        name=name,
        codec=entry.codec,
        shape=entry.shape,
        weights=entry.weights,
        nonzeros=entry.nonzeros,
        levels=entry.levels,
        bytes=entry.size,
        codebook_bytes=entry.codebook_bytes,
        entropy_bytes=entropy,
        dense_bytes=entry.nbytes,
    )
