"""`gap`: runs of zeros and the symbols between them, each Huffman coded by zlib.

For sparse tensors: size and time follow the symbols that are not zero.

Chunk::

    varint z    symbols that are not zero
    varint e    escapes
    stream      z + e run bytes: 0..254 zeros and then a symbol; 255: 255 zeros and no symbol
    stream x b  the z symbols, a stream for each of their b bytes, the least significant first

Zeros after the last symbol are not stored. `streams` says what a stream is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact import streams
from lilliput.artifact.bits import Bytes, varint
from lilliput.artifact.codecs._codec import Sparse, Symbols, join_planes, planes
from lilliput.errors import CorruptArtifact

_ESCAPE = 255


class Gap:
    """Runs and symbols."""

    def encode(self, symbols: Symbols) -> bytes:
        """Encode runs, then symbols."""
        positions = np.flatnonzero(symbols != 0)
        runs = _run_bytes(np.diff(positions, prepend=-1) - 1)
        head = varint(len(positions)) + varint(len(runs) - len(positions))
        values = (streams.encode(plane) for plane in planes(symbols[positions]))
        return head + streams.encode(runs) + b"".join(values)

    def decode(self, data: Bytes, count: int, itemsize: int) -> Sparse:
        """Decode to positions and symbols."""
        nonzeros, escapes = data.varint(), data.varint()
        if nonzeros > count or escapes > count // _ESCAPE:
            raise CorruptArtifact(f"{nonzeros} symbols and {escapes} escapes in {count} weights.")
        positions = _positions(streams.decode(data, nonzeros + escapes), nonzeros)
        if nonzeros and positions[-1] >= count:
            raise CorruptArtifact(f"position {positions[-1]} lies beyond {count} weights.")
        return Sparse(positions, join_planes([streams.decode(data, nonzeros) for _ in range(itemsize)]))


def _run_bytes(runs: NDArray[np.int64]) -> NDArray[np.uint8]:
    escapes = runs // _ESCAPE
    if not escapes.any():
        return runs.astype(np.uint8)
    ends = np.cumsum(escapes + 1) - 1
    out = np.full(ends[-1] + 1, _ESCAPE, np.uint8)
    out[ends] = runs % _ESCAPE
    return out


def _positions(runs: NDArray[np.uint8], nonzeros: int) -> NDArray[np.int64]:
    steps = runs.astype(np.int64)
    if len(runs) == nonzeros:  # no escapes: the common case, quicker
        steps += 1
        positions = np.cumsum(steps, out=steps)
        positions -= 1
        return positions
    has_symbol = runs != _ESCAPE
    steps += has_symbol
    positions = (np.cumsum(steps, out=steps) - 1)[has_symbol]
    if len(positions) != nonzeros:
        raise CorruptArtifact(f"{len(positions)} runs end in a symbol where {nonzeros} should.")
    return positions
