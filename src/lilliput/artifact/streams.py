"""A stream of bytes, Huffman coded by the standard library's zlib (`Z_HUFFMAN_ONLY`, raw deflate).

Matching (LZ77) finds nothing in weights, so only deflate's Huffman stage is used: about 1.006 of
the order-0 entropy, and inflated at 200 MB/s. Small symbols share a byte before that (four symbols
of two bits, say): fewer bytes to inflate, and codes of less than one bit a symbol.

Streams of more than 16 values are *split* where that costs next to nothing, for it doubles the
speed: bytes are ranked by frequency, and the rank is cut in two. Ranks with the same high part are
about equally frequent, so that their low bits (1, 2 or 4) are stored as they are. Only the high
part, four bits, is Huffman coded, two symbols a byte.

A stream of ``count`` bytes (the reader knows the count)::

    byte mode     8, 4, 2, 1: bits of a symbol in the deflated bytes | 0: stored
                  | 0x41, 0x42, 0x44: split, with 1, 2 or 4 low bits
    mode 0        count bytes, as they are
    split         16 * 2^low bytes: the byte of each rank; then the high parts, 4 bits each, as
                  follows; then ceil(count / 2) fields of 2 * low bits: the low parts in pairs
    else          varint length, then that many bytes of raw deflate (RFC 1951), which inflate to
                  exactly ceil(count * bits / 8) bytes: symbols, the first in the highest bits

Deflated without matches a byte takes at least one bit: a reader refuses a stream that claims more
than eight times its length, before it allocates anything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact.bits import BLOCK, Bytes, pack, packed_size, unpack, varint, width_of
from lilliput.artifact.deflate import HUFFMAN_ONLY, deflate, inflate
from lilliput.errors import CorruptArtifact

_STORED, _SPLIT = 0, 0x40
_LOW_BITS = (1, 2, 4)
_SAMPLE = 1 << 16
#: A mode with fewer bytes to inflate may be this much larger: the price of decoding twice as fast.
_TOLERANCE = 1.004


def encode(data: NDArray[np.uint8]) -> bytes:
    """Encode bytes as one stream, in the smallest mode.

    Streams above 256 kB choose the mode by four samples of 16 kB, spread evenly.
    """
    if len(data) <= 4 * _SAMPLE:
        return min((_encode(data, mode) for mode in _modes(data)), key=len)
    sample = np.concatenate([part[: _SAMPLE // 4] for part in np.array_split(data, 4)])
    sizes = {mode: len(_encode(sample, mode)) for mode in _modes(data)}
    for mode in sizes:
        sizes[mode] -= _table_size(mode)  # it weighs nothing in the long stream
    limit = min(sizes.values()) * _TOLERANCE
    return _encode(data, next(mode for mode, size in sizes.items() if size <= limit))


def _modes(data: NDArray[np.uint8]) -> list[int]:
    """Modes that fit, the quickest to decode first."""
    width = width_of(int(data.max(initial=0)))
    narrow = [bits for bits in (1, 2, 4) if bits >= width]
    split = [_SPLIT | low for low in _LOW_BITS if 4 + low >= width]
    return [(narrow + split)[0], 8, _STORED]


def _table_size(mode: int) -> int:
    return 16 << (mode & 15) if mode & _SPLIT else 0


def _encode(data: NDArray[np.uint8], mode: int) -> bytes:
    if mode == _STORED:
        return bytes([mode]) + data.tobytes()
    if not mode & _SPLIT:
        return bytes([mode]) + _deflated(data, mode)
    low = mode & 15
    by_rank = np.argsort(-np.bincount(data, minlength=256), kind="stable").astype(np.uint8)
    rank_of = np.argsort(by_rank).astype(np.uint8).tobytes()
    ranks = np.frombuffer(data.tobytes().translate(rank_of), np.uint8)  # 4 times as fast as take
    lows = pack(np.bitwise_and(ranks, (1 << low) - 1), low)
    return (
        bytes([mode])
        + by_rank[: 16 << low].tobytes()
        + _deflated(np.right_shift(ranks, low), 4)
        + lows
    )


def _deflated(symbols: NDArray[np.uint8], width: int) -> bytes:
    coded = deflate(pack(symbols, width), HUFFMAN_ONLY)
    return varint(len(coded)) + coded


def decode(data: Bytes, count: int) -> NDArray[np.uint8]:
    """Decode one stream of `count` bytes.

    Raises:
        CorruptArtifact: when the mode is unknown, or the stream does not inflate to that length.
    """
    mode = data.byte()
    if mode == _STORED:
        return data.array(count)
    if mode in (1, 2, 4, 8):
        return unpack(_inflated(data, packed_size(count, mode)), mode, count)
    if mode & ~15 != _SPLIT or (low := mode & 15) not in _LOW_BITS:
        raise CorruptArtifact(f"a stream has mode {mode}, which does not exist.")
    table = _pairs(data.array(_table_size(mode)), low)
    high = _inflated(data, packed_size(count, 4))
    lows = unpack(data.array(packed_size(len(high), 2 * low)), 2 * low, len(high))
    return _join(high, lows, table, 2 * low)[:count]


def _inflated(data: Bytes, size: int) -> NDArray[np.uint8]:
    deflated = data.take(data.varint())
    if size > 8 * len(deflated):
        raise CorruptArtifact(f"{len(deflated)} bytes cannot hold a stream of {size}.")
    return np.frombuffer(inflate(deflated, size), np.uint8)


def _pairs(by_rank: NDArray[np.uint8], low: int) -> NDArray[np.uint16]:
    """Two symbols for each pair of high parts followed by a pair of low parts."""
    symbol = by_rank.reshape(16, 1 << low)
    table = np.empty((16, 16, 1 << low, 1 << low, 2), np.uint8)
    table[..., 0] = symbol[:, None, :, None]
    table[..., 1] = symbol[None, :, None, :]
    return table.reshape(-1).view(np.uint16)


def _join(
    high: NDArray[np.uint8], low: NDArray[np.uint8], table: NDArray[np.uint16], shift: int
) -> NDArray[np.uint8]:
    out = np.empty(len(high), np.uint16)
    for start in range(0, len(high), BLOCK):
        part = slice(start, start + BLOCK)
        pairs = high[part].astype(np.uint16) << shift | low[part]
        table.take(pairs, out=out[part], mode="clip")
    return out.view(np.uint8)
