"""A stream of bytes, Huffman coded by the standard library's zlib (`Z_HUFFMAN_ONLY`, raw deflate).

Matching (LZ77) finds nothing in weights, so only deflate's Huffman stage is used: about 1.006 of
the order-0 entropy, and inflated at 200 MB/s. Small symbols share a byte before that (four symbols
of two bits, say): fewer bytes to inflate, and codes of less than one bit a symbol.

Streams of widely spread bytes are *split*, which doubles the speed. Bytes are ranked by frequency.
Ranks that share their high four bits are about equally frequent, so the low four bits are stored
as they are, and only the high ones are Huffman coded, two symbols a byte.

A stream of ``count`` bytes (the reader knows the count)::

    byte mode     8, 4, 2, 1: bits of a symbol in the deflated bytes | 0x44: split | 0: stored
    mode 0        count bytes, as they are
    mode 0x44     256 bytes: the byte of each rank; then as follows, the symbols being high halves
    else          varint length, then that many bytes of raw deflate (RFC 1951), which inflate to
                  exactly ceil(count * bits / 8) bytes, fields of `bits` bits, first field highest
    mode 0x44     then ceil(count / 2) bytes: the low halves, fields of 4 bits

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
_BLOCK = 1 << 15
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
    if mode != _SPLIT:
        return bytes([mode]) + _deflated(data, mode)
    by_rank = np.argsort(-np.bincount(data, minlength=256), kind="stable").astype(np.uint8)
    ranks = np.argsort(by_rank).astype(np.uint8)[data]
    return bytes([mode]) + by_rank.tobytes() + _deflated(ranks >> 4, 4) + pack(ranks & 15, 4)


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
    if mode == _SPLIT:
        table = _pairs(data.array(256))
        return _join(_inflated(data, packed_size(count, 4)), data.array(-(-count // 2)), table)[:count]
    if mode not in (1, 2, 4, 8):
        raise CorruptArtifact(f"a stream has mode {mode}, which does not exist.")
    return unpack(_inflated(data, packed_size(count, mode)), mode, count)


def _inflated(data: Bytes, size: int) -> NDArray[np.uint8]:
    deflated = data.take(data.varint())
    if size > 8 * len(deflated):
        raise CorruptArtifact(f"{len(deflated)} bytes cannot hold a stream of {size}.")
    return np.frombuffer(inflate(deflated, size), np.uint8)


def _pairs(by_rank: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Two symbols for every 16 bits: their two high halves, then their two low halves."""
    symbol = by_rank.reshape(16, 16)
    table = np.empty((16, 16, 16, 16, 2), np.uint8)
    table[..., 0] = symbol[:, None, :, None]
    table[..., 1] = symbol[None, :, None, :]
    return table.reshape(-1).view(np.uint16)


def _join(
    high: NDArray[np.uint8], low: NDArray[np.uint8], table: NDArray[np.uint16]
) -> NDArray[np.uint8]:
    out = np.empty(len(high), np.uint16)
    for start in range(0, len(high), _BLOCK):  # blocks that stay in the cache
        part = slice(start, start + _BLOCK)
        table.take(high[part].astype(np.uint16) << 8 | low[part], out=out[part], mode="clip")
    return out.view(np.uint8)
