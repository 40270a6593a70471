"""What every codec has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact.bits import Bytes

Symbols = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Sparse:
    """Symbols at increasing positions of a chunk; symbol 0 everywhere else.

    Attributes:
        positions: int64 indices into the flattened chunk.
        symbols: the symbol at each position; a filler of `deep_compression` has symbol 0.
    """

    positions: NDArray[np.int64]
    symbols: Symbols


Decoded = Symbols | Sparse


class Codec(Protocol):
    """Turns the symbols of one chunk into bytes and back."""

    def encode(self, symbols: Symbols) -> bytes | memoryview:
        """Encode a chunk of uint8, uint16, uint32 or uint64 symbols (1-D)."""

    def decode(self, data: Bytes, count: int, itemsize: int) -> Decoded:
        """Decode a chunk of `count` symbols of `itemsize` bytes each.

        Raises:
            CorruptArtifact: when the bytes are not what `encode` could have written.
        """


def planes(symbols: Symbols) -> NDArray[np.uint8]:
    """The bytes of each significance as a row: (itemsize, count), least significant first."""
    little_endian = symbols.astype(f"<u{symbols.itemsize}", copy=False)
    return little_endian.view(np.uint8).reshape(len(symbols), symbols.itemsize).T


def join_planes(rows: list[NDArray[np.uint8]]) -> Symbols:
    """Undo `planes`."""
    if len(rows) == 1:
        return rows[0]
    return np.stack(rows, axis=1).view(f"<u{len(rows)}").reshape(-1)
