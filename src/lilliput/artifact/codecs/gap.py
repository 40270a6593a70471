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
        positions = _ends(runs + has_symbol.view(np.uint8), escape)  # at most 255: no overflow
        if len(positions) and positions[-1] >= count:
            raise CorruptArtifact(f"position {positions[-1]} lies beyond {count} weights.")
        symbols = join_planes([streams.decode(data, nonzeros) for _ in range(itemsize)])
        return Sparse(positions, _spread(symbols, has_symbol) if escapes else symbols)


def _best_escape(runs: NDArray[np.int64]) -> int:
    """The smaller one where it is rarely needed: half the bytes to decode, at the same size."""
    small, large = _ESCAPES
    return small if 10 * np.count_nonzero(runs >= small) <= len(runs) else large


def _run_bytes(runs: NDArray[np.int64], escape: int) -> NDArray[np.uint8]:
    long = np.flatnonzero(runs >= escape)
    short = runs.astype(np.uint8)
    short[long] = runs[long] % escape
    return np.insert(short, np.repeat(long, runs[long] // escape), escape)


def _ends(steps: NDArray[np.uint8], largest: int) -> NDArray[np.int64]:
    """`np.cumsum(steps) - 1`, without waiting for each sum before the next: in 2/3 of the time.

    A word of eight steps (of four if their sum exceeds a byte) times 1 + 2^8 + 2^16 + ... holds
    the running sums of these steps, so that only the words are left to add up one by one.
    """
    kind, ones = ("<u1", 0x0101010101010101) if 8 * largest < 256 else ("<u2", 0x0001000100010001)
    fields = 8 // np.dtype(kind).itemsize
    sums = np.zeros(-(-len(steps) // fields) * fields, kind)
    sums[: len(steps)] = steps
    words = sums.view("<u8")
    words *= ones
    totals = sums[fields - 1 :: fields]
    ends = np.repeat(np.cumsum(totals, dtype=np.int64) - totals - 1, fields)
    ends += sums
    return ends[: len(steps)]


def _spread(symbols: Symbols, has_symbol: NDArray[np.bool_]) -> Symbols:
    """A zero for each escape, which is quicker than to take its position out."""
    spread = np.zeros(len(has_symbol), symbols.dtype)
    spread[has_symbol] = symbols
    return spread
