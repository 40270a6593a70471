"""Canonical Huffman codes over bytes, decoded in parallel lanes by numpy.

A symbol at a time is too slow in Python, so a stream is cut into lanes of 1024 symbols and the
length in bits of each lane is stored (2 bytes, about 0.3 % of a stream). The decoder steps through
all lanes at once: look 12 bits ahead, ask one table for symbol and length, advance. Codes are
therefore at most 12 bits long; package-merge makes them optimal under that limit.

The code is canonical: codes sorted by (length, symbol) count upwards, so that lengths alone
define it, and the decoding table is the sorted symbols, each repeated 2^(12 - length) times.

A stream of ``count`` symbols (the reader knows the count)::

    byte mode     0 stored: count bytes | 1 constant: the byte | 2 Huffman, as follows
    varint T      number of code lengths, for symbols 0..T-1
    ceil(T/2)     code lengths, 4 bits each, high half first; 0: symbol not used
    u16 x lanes   bits of each lane
    bits          the codes, most significant bit first

References:
    Larmore and Hirschberg, A fast algorithm for optimal length-limited Huffman codes, JACM 1990.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact.bits import Bytes, pack, pack_variable, packed_size, unpack, varint
from lilliput.errors import CorruptArtifact

LONGEST = 12
LANE = 1024
_STORED, _CONSTANT, _HUFFMAN = 0, 1, 2

Symbols = NDArray[np.unsignedinteger]


def code_lengths(counts: NDArray[np.int64], longest: int = LONGEST) -> NDArray[np.int64]:
    """Lengths of an optimal prefix code whose codes have at most `longest` bits.

    Args:
        counts: occurrences of each symbol, at least two of them not zero.
        longest: the limit; 2^longest symbols at most.

    Returns:
        A length for each symbol, 0 for those that do not occur.

    Example:
        >>> code_lengths(np.array([5, 0, 1, 1]))
        array([1, 0, 2, 2])
    """
    used = np.flatnonzero(counts)
    used = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[used]
    row, is_leaf = leaves, [np.ones(len(leaves), bool)]
    for _ in range(longest - 1):  # pair the cheapest items, and offer the leaves again
        pairs = row[: len(row) // 2 * 2].reshape(-1, 2).sum(axis=1)
        both = np.concatenate([leaves, pairs])
        order = np.argsort(both, kind="stable")
        row = both[order]
        is_leaf.append(order < len(leaves))
    sorted_lengths = np.zeros(len(leaves), np.int64)
    taken = 2 * len(leaves) - 2
    for flags in reversed(is_leaf):
        chosen = int(np.count_nonzero(flags[:taken]))
        sorted_lengths[:chosen] += 1
        taken = 2 * (taken - chosen)
    lengths = np.zeros(len(counts), np.int64)
    lengths[used] = sorted_lengths
    return lengths


def encoded_size(counts: NDArray[np.int64]) -> int:
    """Exact bytes of `encode` on a stream with these counts of symbols, nothing being encoded."""
    total, used = int(counts.sum()), np.flatnonzero(counts)
    if len(used) == 1:
        return 2
    if total == 0:
        return 1
    lengths = code_lengths(counts)
    table = int(used[-1]) + 1
    bits = int(lengths @ counts)
    huffman = len(varint(table)) + packed_size(table, 4) + 2 * -(-total // LANE) + -(-bits // 8)
    return 1 + min(total, huffman)


def encode(symbols: NDArray[np.uint8]) -> bytes:
    """Encode bytes as one stream, the smallest of stored, constant and Huffman."""
    counts = np.bincount(symbols, minlength=1)
    if len(symbols) and counts.max() == len(symbols):
        return bytes([_CONSTANT, symbols[0]])
    if encoded_size(counts) == 1 + len(symbols):
        return bytes([_STORED]) + symbols.tobytes()
    lengths = code_lengths(counts)
    _, codes = _canonical(lengths)
    bits = lengths[symbols]
    starts = np.arange(0, len(symbols), LANE)
    lanes = np.add.reduceat(bits, starts).astype("<u2").tobytes()
    table = varint(len(lengths)) + pack(lengths.astype(np.uint8), 4)
    return bytes([_HUFFMAN]) + table + lanes + pack_variable(codes[symbols], bits)


def decode(data: Bytes, count: int) -> NDArray[np.uint8]:
    """Decode one stream of `count` symbols.

    Raises:
        CorruptArtifact: when the table is no complete prefix code, or the lanes do not fit.
    """
    mode = data.byte()
    if mode == _STORED:
        return data.array(count)
    if mode == _CONSTANT:
        return np.full(count, data.byte(), np.uint8)
    if mode != _HUFFMAN:
        raise CorruptArtifact(f"a Huffman stream has mode {mode}; 0, 1 and 2 exist.")
    table, _ = _canonical(_read_lengths(data))
    lanes = data.array(-(-count // LANE), "<u2").astype(np.int64)
    bits = data.array(packed_size(int(lanes.sum()), 1))
    return _decode_lanes(bits, lanes, table, count)


def _read_lengths(data: Bytes) -> NDArray[np.int64]:
    size = data.varint()
    if not 2 <= size <= 256:
        raise CorruptArtifact(f"a Huffman table has {size} symbols; 2 to 256 are possible.")
    lengths = unpack(data.array(packed_size(size, 4)), 4, size).astype(np.int64)
    used = lengths[lengths > 0]
    if lengths.max() > LONGEST or (1 << LONGEST - used).sum() != 1 << LONGEST:
        raise CorruptArtifact("a Huffman table is not a complete prefix code of 12 bits at most.")
    return lengths


def _canonical(lengths: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
    """The decoding table (symbol * 16 + length, for every 12 bits), and the code of each symbol."""
    used = np.flatnonzero(lengths)
    order = used[np.argsort(lengths[used], kind="stable")]
    share = 1 << LONGEST - lengths[order]
    table = np.repeat(order << 4 | lengths[order], share).astype(np.uint16)
    codes = np.zeros(len(lengths), np.uint64)
    codes[order] = (np.cumsum(share) - share) >> LONGEST - lengths[order]
    return table, codes


def _decode_lanes(
    bits: NDArray[np.uint8], lanes: NDArray[np.int64], table: NDArray[np.uint16], count: int
) -> NDArray[np.uint8]:
    ends = np.cumsum(lanes)
    at = ends - lanes
    window = _windows(bits)
    steps = np.empty((LANE, len(lanes)), np.uint16)
    last = count - LANE * (len(lanes) - 1)  # symbols in the last lane
    for step in range(min(count, LANE)):
        active = len(lanes) - (step >= last)
        here = at[:active]
        ahead = window[here >> 3] >> (12 - (here & 7)) & 0xFFF
        entry = table[ahead]
        steps[step, :active] = entry
        here += entry & 15
    if not np.array_equal(at, ends):
        raise CorruptArtifact("a Huffman lane does not end where the next one starts.")
    return (steps.T.reshape(-1)[:count] >> 4).astype(np.uint8)


def _windows(bits: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The 24 bits from each byte on; a hostile lane overruns by 12 * 1024 bits at most."""
    padded = np.zeros(len(bits) + LANE * LONGEST // 8 + 8, np.uint32)
    padded[: len(bits)] = bits
    window = padded[:-2] << np.uint32(16)
    window |= padded[1:-1] << np.uint32(8)
    window |= padded[2:]
    return window
