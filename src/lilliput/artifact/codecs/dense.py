"""`dense`: every symbol, zero included, Huffman coded by zlib.

For tensors with few zeros, such as eight-bit integers.

Chunk: one stream (`streams`) per byte of a symbol, the least significant byte first, each of
``count`` bytes.
"""

from __future__ import annotations

from lilliput.artifact import streams
from lilliput.artifact.bits import Bytes
from lilliput.artifact.codecs._codec import Symbols, join_planes, planes


class Dense:
    """Every symbol, Huffman coded."""

    def encode(self, symbols: Symbols) -> bytes:
        """Encode each byte plane."""
        return b"".join(streams.encode(plane) for plane in planes(symbols))

    def decode(self, data: Bytes, count: int, itemsize: int) -> Symbols:
        """Decode each byte plane."""
        return join_planes([streams.decode(data, count) for _ in range(itemsize)])
