"""`gap`: runs of zeros and the symbols between them, each Huffman coded by zlib.

For sparse tensors: size and time follow the symbols that are not zero.

Chunk::

    byte E      the escape, 15 or 255
    varint z    symbols that are not zero
    varint e    escapes
    stream      z + e run bytes: 0..E-1 zeros and then a symbol; E: E zeros and no symbol
    stream x b  the z symbols, a stream for each of their b bytes, the least significant first

Zeros after the last symbol are not stored. `streams` says what a stream is; with short runs the
escape is 15, so that it packs two runs to a byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact import streams
from lilliput.artifact.bits import Bytes, varint
from lilliput.artifact.codecs._codec import Sparse, Symbols, join_planes, planes
from lilliput.errors import CorruptArtifact

_ESCAPES = (15, 255)


class Gap:
    """Runs and symbols."""

    def encode(self, symbols: Symbols) -> bytes:
        """Encode runs, then symbols."""
        positions = np.flatnonzero(symbols != 0)
        runs = np.diff(positions, prepend=-1) - 1
        escape = _best_escape(runs)
        coded = _run_bytes(runs, escape)
        head = bytes([escape]) + varint(len(runs)) + varint(len(coded) - len(runs))
        values = (streams.encode(plane) for plane in planes(symbols[positions]))
        return head + streams.encode(coded) + b"".join(values)

    def decode(self, data: Bytes, count: int, itemsize: int) -> Sparse:
        """Decode to positions and symbols; escapes are among them, with symbol 0."""
        escape, nonzeros, escapes = data.byte(), data.varint(), data.varint()
        if escape not in _ESCAPES or nonzeros + escape * escapes > count:
            raise CorruptArtifact(f"{nonzeros} symbols, {escapes} escapes in {count} weights.")
        runs = streams.decode(data, nonzeros + escapes)
        has_symbol = runs < escape
        if np.count_nonzero(has_symbol) != nonzeros or runs.max(initial=0) > escape:
            raise CorruptArtifact(f"the runs do not end in {nonzeros} symbols.")
        symbols = join_planes([streams.decode(data, nonzeros) for _ in range(itemsize)])
        steps = runs + has_symbol.view(np.uint8)  # at most 255: no overflow
        return Sparse(steps, _spread(symbols, has_symbol) if escapes else symbols, count)


def _best_escape(runs: NDArray[np.int64]) -> int:
    """The smaller one where it is rarely needed: half the bytes to decode, at the same size."""
    small, large = _ESCAPES
    return small if 10 * np.count_nonzero(runs >= small) <= len(runs) else large


def _run_bytes(runs: NDArray[np.int64], escape: int) -> NDArray[np.uint8]:
    long = np.flatnonzero(runs >= escape)
    short = runs.astype(np.uint8)
    short[long] = runs[long] % escape
    return np.insert(short, np.repeat(long, runs[long] // escape), escape)


def _spread(symbols: Symbols, has_symbol: NDArray[np.bool_]) -> Symbols:
    """Put a zero where there is an escape; it is quicker than to drop the escape's position."""
    spread = np.zeros(len(has_symbol), symbols.dtype)
    spread[has_symbol] = symbols
    return spread
