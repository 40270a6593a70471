"""Which codec a tensor gets: the one with the fewest bytes, tables included.

No estimate decides between two codecs that are near each other. The histogram only strikes out a codec
whose least size, whatever the order of the symbols, is above `_MARGIN` times the expected size of
another, and by more than tables may take. The codecs that are left really encode: the whole tensor if
it is one chunk, so that the choice is exact among them; else its first, middle and last chunk.

Plain values stay as they are, which every program can read, unless coding them saves something worth
it; of floats that are hardly ever zero, a quarter. Whether it can is told by a sample of their bytes:
a large tensor whose bytes are nearly random, as those of float32 are, is not encoded to find out.

`deep_compression` competes for small tensors only, because it decodes more slowly than `gap`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact.bits import width_of
from lilliput.artifact.codecs._codec import planes
from lilliput.artifact.entropy import entropy_bits

_MARGIN = 1.1
#: The most that the tables and headers of a codec take, which the estimates leave out.
_TABLE_BITS = 8 * 600
#: Plain floats with so many zeros may be coded however little it saves, others only if they shrink
#: to this share; any plain tensor must save more bytes than the names of its codec differ by.
_FEWEST_ZEROS, _MOST_KEPT = 0.1, 0.75
_FEWEST_SAVED = 16
#: The most weights for which `deep_compression` is tried, of tensors with few zeros the second.
_MOST_WEIGHTS, _MOST_DENSE = 1 << 20, 1 << 14
_SAMPLE = 1 << 14


def choose(
    chunks: list[NDArray[np.unsignedinteger]],
    counts: NDArray[np.int64],
    plain: str,
    encode: Callable[[str, int], bytes | memoryview],
) -> str:
    """The codec for a tensor.

    Args:
        chunks: the symbols of each chunk.
        counts: occurrences of each symbol, or of (zero, not zero) for a plain tensor.
        plain: the dtype whose bit patterns the symbols are; "" if they are codes.
        encode: a chunk, given by its number, as the codec of a name encodes it.
    """
    probes = sorted({0, len(chunks) // 2, len(chunks) - 1})
    sparse = has_many_zeros(counts)
    largest = float(sum(chunks[at].nbytes for at in probes))
    if plain:
        largest = min(largest - _FEWEST_SAVED, largest * _kept(plain, sparse))
        if _least([chunks[at] for at in probes]) > largest:
            return "raw"
        names = ["packed"] * (chunks[0].itemsize <= 2) + ["dense"] + ["gap"] * bool(counts[0])
    else:
        names = _can_win(counts)
    if len(chunks) == 1 and counts.sum() <= (_MOST_WEIGHTS if sparse or not plain else _MOST_DENSE):
        names.append("deep_compression")
    sizes = {name: sum(len(encode(name, at)) for at in probes) for name in names}
    best = min(sizes, key=lambda name: sizes[name])
    return best if sizes[best] < largest else "raw"


def has_many_zeros(counts: NDArray[np.int64]) -> bool:
    """Whether a sparse codec is worth a try, by the counts of (zero, not zero) or of all codes."""
    return bool(counts[0] >= _FEWEST_ZEROS * counts.sum())


def _kept(dtype: str, sparse: bool) -> float:
    """The largest share of its bytes at which a plain tensor is coded."""
    return 1.0 if sparse or "F" not in dtype else _MOST_KEPT


def _least(chunks: list[NDArray[np.unsignedinteger]]) -> float:
    """Bytes under the limits of all codecs for plain values, by a sample drawn at random.

    No codec is better than an ideal coder of each byte plane of what is not zero; nor than one that
    stores a plane, where a table of its values would not pay.
    """
    random = np.random.default_rng(0)  # always the same: equal tensors give equal files
    drawn = [
        chunk if len(chunk) <= _SAMPLE else chunk[random.integers(len(chunk), size=_SAMPLE)]
        for chunk in chunks
    ]
    sample = np.concatenate(drawn)
    present = sample[sample != 0]
    bits = sum(_plane_bits(plane) for plane in planes(present))
    return bits / 8 * sum(map(len, chunks)) / max(1, len(sample))


def _plane_bits(plane: NDArray[np.uint8]) -> float:
    counts = np.bincount(plane, minlength=256)
    distinct = np.count_nonzero(counts)
    table = 3 * distinct + 32 * (distinct > 1)
    return min(8.0 * len(plane), entropy_bits(counts) + table)


def _can_win(counts: NDArray[np.int64]) -> list[str]:
    expected, least = _estimates(counts)
    limit = min(expected.values()) * _MARGIN + _TABLE_BITS
    return [name for name, bits in least.items() if bits <= limit]


def _estimates(counts: NDArray[np.int64]) -> tuple[dict[str, float], dict[str, float]]:
    """Bits under the limits of each codec: if symbols are independent, and if zeros are in blocks.

    In both an ideal coder of symbols is assumed, with at least one bit for each byte of a stream.
    """
    total, rest = int(counts.sum()), int(counts[1:].sum())
    width = width_of(int(np.flatnonzero(counts)[-1])) if total else 0
    share = next(bits for bits in (1, 2, 4, 8, 16) if bits >= width)  # of a byte, see streams
    values = max(entropy_bits(counts[1:]), rest * share / 8)
    where = entropy_bits(np.array([total - rest, rest]))
    dense = max(entropy_bits(counts), total * share / 8)
    packed = float(total * width)
    expected = {"packed": packed, "dense": dense, "gap": max(where, rest) + values}
    return expected, expected | {"gap": rest + values}
