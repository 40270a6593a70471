"""A stream of bytes, Huffman coded by the standard library's zlib (`Z_HUFFMAN_ONLY`, raw deflate).

Matching (LZ77) finds nothing in weights, so only deflate's Huffman stage is used: 1.005 of the
order-0 entropy, decoded at 200 MB/s. Small symbols share a byte before that (four symbols of two
bits, say): fewer bytes to decode, and codes of less than one bit a symbol. In streams of widely
spread bytes the low four bits are nearly random: *split* stores them as they are, and Huffman
codes only the high four, two symbols a byte, which doubles the speed.

A stream of ``count`` bytes (the reader knows the count)::

    byte mode     8, 4, 2, 1: bits of a symbol in the deflated bytes | 0x44: split | 0: stored
    mode 0        count bytes, as they are
    else          varint length, then that many bytes of raw deflate (RFC 1951), which inflate to
                  exactly ceil(count * bits / 8) bytes (bits = 4 for split)
    mode 0x44     then ceil(count / 2) bytes: the low halves, packed

Deflated without matches a byte takes at least one bit: a reader refuses a stream that claims more
than eight times its length, before it allocates anything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact.bits import Bytes, pack, packed_size, unpack, varint, width_of
from lilliput.artifact.deflate import HUFFMAN_ONLY, deflate, inflate
from lilliput.errors import CorruptArtifact

_STORED, _SPLIT = 0, 0x44
_SAMPLE = 1 << 16
#: A mode with fewer bytes to inflate may be this much larger: the price of decoding twice as fast.
_TOLERANCE = 1.0025


def encode(data: NDArray[np.uint8]) -> bytes:
    """Encode bytes as one stream, in the smallest mode.

    Streams above 256 kB choose the mode by four samples of 16 kB, spread evenly.
    """
    if len(data) <= 4 * _SAMPLE:
        return min((_encode(data, mode) for mode in _modes(data)), key=len)
    sample = np.concatenate([part[: _SAMPLE // 4] for part in np.array_split(data, 4)])
    sizes = {mode: len(_encode(sample, mode)) for mode in _modes(data)}
    limit = min(sizes.values()) * _TOLERANCE
    return _encode(data, next(mode for mode, size in sizes.items() if size <= limit))


def _modes(data: NDArray[np.uint8]) -> list[int]:
    """Modes that fit, the quickest to decode first."""
    width = width_of(int(data.max(initial=0)))
    narrow = [bits for bits in (1, 2, 4) if bits >= width][:1]
    return [*(narrow or [_SPLIT]), 8, _STORED]


def _encode(data: NDArray[np.uint8], mode: int) -> bytes:
    if mode == _STORED:
        return bytes([mode]) + data.tobytes()
    high, low = data, b""
    if mode == _SPLIT:
        high, low = data >> 4, pack(data & 15, 4)
    deflated = deflate(pack(high, mode & 15), HUFFMAN_ONLY)
    return bytes([mode]) + varint(len(deflated)) + deflated + low


def decode(data: Bytes, count: int) -> NDArray[np.uint8]:
    """Decode one stream of `count` bytes.

    Raises:
        CorruptArtifact: when the mode is unknown, or the stream does not inflate to that length.
    """
    mode = data.byte()
    if mode == _STORED:
        return data.array(count)
    if mode not in (1, 2, 4, 8, _SPLIT):
        raise CorruptArtifact(f"a stream has mode {mode}, which does not exist.")
    width = mode & 15
    deflated = data.take(data.varint())
    size = packed_size(count, width)
    if size > 8 * len(deflated):
        raise CorruptArtifact(f"{len(deflated)} bytes cannot hold a stream of {size}.")
    high = unpack(np.frombuffer(inflate(deflated, size), np.uint8), width, count)
    if mode != _SPLIT:
        return high
    return high << 4 | unpack(data.array(packed_size(count, 4)), 4, count)
