"""Which codec a tensor gets: the one with the fewest bytes, tables included.

No estimate decides between two codecs that are near each other. The histogram only strikes out a codec
whose least size, whatever the order of the symbols, is above `_MARGIN` times the expected size of
another. The codecs that are left really encode: the whole tensor if it is one chunk, so that the choice
is exact; else its first, middle and last chunk.

`deep_compression` competes for small tensors only, because it decodes more slowly than `gap`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact.bits import width_of
from lilliput.artifact.entropy import entropy_bits

_MARGIN = 1.1
#: Plain tensors stay readable by everyone unless coding them saves something worth it.
_FEWEST_ZEROS = 0.1
_FEWEST_BYTES = 256
#: The most weights for which `deep_compression` is tried.
_MOST_WEIGHTS = 1 << 20


def choose(
    chunks: list[NDArray[np.unsignedinteger]],
    counts: NDArray[np.int64],
    plain: bool,
    encode: Callable[[str, int], bytes | memoryview],
) -> str:
    """The codec for a tensor.

    Args:
        chunks: the symbols of each chunk.
        counts: occurrences of each symbol, or of (zero, not zero) for a plain tensor.
        plain: whether the symbols are bit patterns of values, not codes.
        encode: a chunk, given by its number, as the codec of a name encodes it.
    """
    if plain:
        small = sum(chunk.nbytes for chunk in chunks) < _FEWEST_BYTES
        if small or counts[0] < _FEWEST_ZEROS * counts.sum():
            return "raw"
        names = ["raw", "gap"]
    else:
        names = [*_can_win(counts), "raw"]
    if len(chunks) == 1 and counts.sum() <= _MOST_WEIGHTS:
        names.append("deep_compression")
    probes = sorted({0, len(chunks) // 2, len(chunks) - 1})
    return min(names, key=lambda name: sum(len(encode(name, at)) for at in probes))


def _can_win(counts: NDArray[np.int64]) -> list[str]:
    expected, least = _estimates(counts)
    limit = min(expected.values()) * _MARGIN
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
