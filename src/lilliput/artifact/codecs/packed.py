"""`packed`: fixed-width fields.

Chunk::

    byte w    width of a field, 0..16: the bits of the largest symbol
    bits      count fields of w bits, most significant bit first, zero bits up to a whole byte
"""

from __future__ import annotations

from lilliput.artifact.bits import Bytes, pack, packed_size, unpack, width_of
from lilliput.artifact.codecs._codec import Symbols
from lilliput.errors import CorruptArtifact


class Packed:
    """Fixed-width fields."""

    def encode(self, symbols: Symbols) -> bytes:
        """Pack codes, which have 16 bits at most."""
        width = width_of(int(symbols.max(initial=0)))
        return bytes([width]) + pack(symbols, width)

    def decode(self, data: Bytes, count: int, itemsize: int) -> Symbols:
        """Unpack."""
        width = data.byte()
        if width > 8 * min(itemsize, 2):
            raise CorruptArtifact(f"fields of {width} bits do not fit symbols of {itemsize} bytes.")
        fields = unpack(data.array(packed_size(count, width)), width, count)
        return fields.astype(f"u{itemsize}", copy=False)
