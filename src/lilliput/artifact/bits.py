"""Bits, bytes and variable-length integers.

The surprising rule: bits run from the most significant to the least (as on paper), while
multi-byte integers are little-endian (as in memory). Everything a codec reads goes through
`Bytes`, which cannot be pushed past the end of its buffer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lilliput.errors import CorruptArtifact

#: Table look-ups go in blocks of this many, whose temporaries stay in the cache.
BLOCK = 1 << 14


def varint(value: int) -> bytes:
    """Write a non-negative integer, seven bits a byte, lowest first; the top bit says "more".

    Example:
        >>> varint(300).hex()
        'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Bytes:
    """A cursor over a buffer of untrusted bytes.

    Args:
        data: the buffer; it is not copied.

    Raises:
        CorruptArtifact: from every method, when the buffer ends too early.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count < 0 or count > self.left:
            raise CorruptArtifact(f"{count} bytes are needed where only {self.left} are left.")
        self._at += count
        return self._data[self._at - count : self._at]

    def array(self, count: int, dtype: str = "u1") -> NDArray[np.unsignedinteger]:
        """The next `count` little-endian numbers, read-only."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype=dtype)

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """The next variable-length integer, of at most nine bytes (63 bits)."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise CorruptArtifact("an integer is longer than nine bytes.")

    def end(self) -> None:
        """Insist that everything was read."""
        if self.left:
            raise CorruptArtifact(f"{self.left} bytes are left over where the data should end.")


def width_of(largest: int) -> int:
    """Bits of the fixed-width field that holds 0..largest: 0 for 0, 4 for 15, 5 for 16."""
    return int(largest).bit_length()


def pack(symbols: NDArray[np.unsignedinteger], width: int) -> bytes:
    """Pack symbols into fields of `width` bits (0..16), zero bits after the last.

    Example:
        >>> pack(np.array([1, 2, 3], np.uint8), 4).hex()
        '1230'
    """
    if width in (1, 2, 4, 8):
        return _pack_fields_of_byte(symbols.astype(np.uint8, copy=False), width)
    step = 1 << 16  # a multiple of 8, so that every slice but the last ends on a byte
    return b"".join(
        _pack_slice(symbols[start : start + step], width) for start in range(0, len(symbols), step)
    )


def _pack_slice(symbols: NDArray[np.unsignedinteger], width: int) -> bytes:
    big_endian = symbols.astype(f">u{symbols.itemsize}").view(np.uint8)
    bits = np.unpackbits(big_endian).reshape(len(symbols), 8 * symbols.itemsize)
    return np.packbits(bits[:, bits.shape[1] - width :]).tobytes()


def _pack_fields_of_byte(symbols: NDArray[np.uint8], width: int) -> bytes:
    fields = 8 // width
    words = np.pad(symbols, (0, -len(symbols) % fields)).view(f"<u{fields}")
    return (words * _copies(width) >> 8 * (fields - 1)).astype(np.uint8).tobytes()


def _copies(width: int) -> int:
    """A product with this is 8 / width copies of a number, each 8 + width bits above the last.

    One product moves all fields of a byte at once. From a word with a field in each byte it
    gathers the fields in the highest byte; and in the copies of a byte of fields, every field
    lies at the top of a byte of its own. No two copies meet in a bit, so nothing is carried.
    """
    return sum(1 << (8 + width) * copy for copy in range(8 // width))


def packed_size(count: int, width: int) -> int:
    """Bytes that `count` fields of `width` bits take."""
    return (count * width + 7) // 8


def unpack(packed: NDArray[np.uint8], width: int, count: int) -> NDArray[np.unsignedinteger]:
    """Undo `pack`: uint8 symbols for widths up to 8, else uint16.

    Args:
        packed: exactly `packed_size(count, width)` bytes.
        width: bits of a field, 0..16.
        count: number of symbols.
    """
    if width == 0:
        return np.zeros(count, np.uint8)
    if width == 8:
        return packed
    if width in (1, 2, 4):
        return _unpack_fields_of_byte(packed, width)[:count]
    padded = np.zeros(-(-count // 8) * width + 2, np.uint8)
    padded[: len(packed)] = packed
    groups = padded[:-2].reshape(-1, width)  # eight fields fill `width` bytes exactly
    out = np.empty((len(groups), 8), np.uint8 if width <= 8 else np.uint16)
    for field in range(8):
        out[:, field] = _field(groups, field * width, width)
    return out.reshape(-1)[:count]


def _unpack_fields_of_byte(packed: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    words = packed.astype(f"<u{8 // width}")
    words *= _copies(width)
    fields = words.view(np.uint8)
    fields >>= 8 - width
    return fields


def _field(groups: NDArray[np.uint8], start: int, width: int) -> NDArray[np.uint32]:
    first, last = start // 8, (start + width - 1) // 8
    value = groups[:, first].astype(np.uint32)
    for column in range(first + 1, last + 1):
        value <<= 8
        value |= groups[:, column]
    value >>= 8 * (last + 1) - start - width
    value &= (1 << width) - 1
    return value


def pack_variable(codes: NDArray[np.uint64], lengths: NDArray[np.int64]) -> bytes:
    """Concatenate codes of 1..56 bits each, zero bits after the last.

    Args:
        codes: the bits of each code, right-aligned.
        lengths: the number of bits of each code.
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    word, room = starts >> 6, 64 - (starts & 63) - lengths
    fits = np.maximum(room, 0).astype(np.uint64)
    spills = np.maximum(-room, 0).astype(np.uint64)
    words = np.zeros(int(ends[-1] >> 6) + 2, np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))  # every word starts with some code
    words[word[first]] = np.bitwise_or.reduceat(codes << fits >> spills, first)
    crossing = np.flatnonzero(room < 0)  # at most one code crosses each word boundary
    words[word[crossing] + 1] |= codes[crossing] << (np.uint64(64) - spills[crossing])
    return words.astype(">u8").tobytes()[: (int(ends[-1]) + 7) // 8]
