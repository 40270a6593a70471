"""What every codec has in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact.bits import BLOCK, Bytes
from lilliput.errors import CorruptArtifact

Symbols = NDArray[np.unsignedinteger]


class Sparse:
    """Symbols at increasing positions of a chunk; symbol 0 everywhere else.

    The positions are sums of steps, and `np.cumsum` waits for each sum before the next. Here a
    word of eight steps (of four if their sum exceeds a byte) times 1 + 2^8 + 2^16 + ... holds the
    sums of its first one, two, three, ... steps, so that only the words are added up one by one.

    Args:
        steps: from each position to the next, at most 256; the first one from -1.
        symbols: the symbol at each position; fillers and escapes have symbol 0.
        count: symbols of the chunk.

    Raises:
        CorruptArtifact: when a position lies beyond the chunk.

    Example:
        >>> Sparse(np.array([2, 1, 4], np.uint8), np.array([7, 5, 9], np.uint8), 10).positions
        array([1, 2, 6])
    """

    def __init__(self, steps: NDArray[np.unsignedinteger], symbols: Symbols, count: int) -> None:
        self.symbols = symbols
        small = 8 * int(steps.max(initial=0)) < 256
        self._sums = np.zeros(-(-len(steps) // 8) * 8, "<u1" if small else "<u2")
        self._sums[: len(steps)] = steps
        words = self._sums.view("<u8")
        words *= 0x0101010101010101 if small else 0x0001000100010001
        self._in_word = 8 if small else 4
        self._before = np.full(len(words), -1)
        self._before[1:] += np.cumsum(self._sums[self._in_word - 1 : -1 : self._in_word], dtype=int)
        if len(steps) and (last := int(self._before[-1]) + int(self._sums[-1])) >= count:
            raise CorruptArtifact(f"position {last} lies beyond {count} weights.")

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], Symbols]]:
        """Positions (int64 indices into the flattened chunk) and symbols, some at a time."""
        for start in range(0, len(self.symbols), BLOCK):
            stop = start + BLOCK
            symbols = self.symbols[start:stop]
            words = self._before[start // self._in_word : stop // self._in_word]
            positions = np.repeat(words, self._in_word)
            positions += self._sums[start:stop]
            yield positions[: len(symbols)], symbols

    @property
    def positions(self) -> NDArray[np.int64]:
        """All positions."""
        return np.concatenate([np.empty(0, np.int64), *(where for where, _ in self.blocks())])


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
