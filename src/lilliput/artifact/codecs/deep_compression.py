"""`deep_compression`: relative index, codes, and canonical Huffman over both, as in the paper.

A weight is stored as the number of zeros before it, in w bits, and its code. Where more than
2^w - 1 zeros lie in between, a *filler zero* is stored: the largest gap, and code 0. Position =
cumsum(gap + 1) - 1, as in the authors' own file. With w = 0 every weight is stored, zeros too.

Faithful: the fillers, one Huffman code for gaps and one for codes, tables counted. Different: w is
chosen for each chunk by exact cost (0..8 bits) unless it is given, where the paper takes 8 bits in
convolutions and 5 in fully connected layers; the lanes of `huffman` cost 0.3 % and buy a decoder
without a Python loop over weights. Tensors without a codebook (the paper's P) keep their values,
byte plane by byte plane.

Chunk::

    varint n    entries: weights that are not zero, and fillers
    byte w      bits of a gap, 0..8
    stream      n gaps; absent when w = 0
    stream x b  n symbols, a stream for each of their b bytes, the least significant first

`huffman` says what a stream is. Zeros after the last entry are not stored.

References:
    Han, Mao, Dally: Deep Compression, ICLR 2016, arXiv:1510.00149.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact import huffman
from lilliput.artifact.bits import Bytes, packed_size, varint, width_of
from lilliput.artifact.codecs._codec import Sparse, Symbols, join_planes, planes
from lilliput.errors import CorruptArtifact

WIDEST = 8


@dataclass(frozen=True)
class DeepCompression:
    """Relative index and canonical Huffman codes.

    Attributes:
        index_bits: the width w of a gap, 0..8; None takes the best for each chunk.
    """

    index_bits: int | None = None

    def encode(self, symbols: Symbols) -> bytes:
        """Encode gaps, then symbols."""
        width = best_index_bits(symbols) if self.index_bits is None else self.index_bits
        gaps, entries = relative_index(symbols, width)
        streams = [gaps, *planes(entries)] if width else planes(entries)
        return varint(len(gaps)) + bytes([width]) + b"".join(map(huffman.encode, streams))

    def decode(self, data: Bytes, count: int, itemsize: int) -> Sparse:
        """Decode to positions and symbols; fillers are among them, with symbol 0."""
        entries, width = data.varint(), data.byte()
        if entries > count or width > WIDEST:
            raise CorruptArtifact(f"{entries} entries, {width}-bit index, in {count} weights.")
        gaps = huffman.decode(data, entries) if width else np.zeros(entries, np.uint8)
        if int(gaps.max(initial=0)) >> width:
            raise CorruptArtifact(f"gap {gaps.max()} does not fit a {width}-bit index.")
        symbols = join_planes([huffman.decode(data, entries) for _ in range(itemsize)])
        return Sparse(np.add(gaps, 1, dtype=np.uint16), symbols, count)


def relative_index(symbols: Symbols, index_bits: int) -> tuple[NDArray[np.uint8], Symbols]:
    """The paper's relative index: gaps and symbols of equal length, fillers included.

    Example:
        >>> gaps, entries = relative_index(np.array([0, 7, 0, 0, 0, 0, 0, 9], np.uint8), 2)
        >>> gaps.tolist(), entries.tolist()  # five zeros before the 9: a filler takes four
        ([1, 3, 1], [7, 0, 9])
    """
    where = np.flatnonzero(symbols != 0)
    runs = np.diff(where, prepend=-1) - 1
    ends = np.cumsum((runs >> index_bits) + 1) - 1
    size = int(ends[-1]) + 1 if len(ends) else 0
    gaps = np.full(size, (1 << index_bits) - 1, np.uint8)
    entries = np.zeros(size, symbols.dtype)
    gaps[ends] = runs & ((1 << index_bits) - 1)
    entries[ends] = symbols[where]
    return gaps, entries


def best_index_bits(symbols: Symbols) -> int:
    """The index width with the smallest chunk.

    Exact without encoding: a filler is one more largest gap and one more symbol 0, so the
    histograms of runs and of symbols give the histogram of every stream at every width, and
    `huffman.encoded_size` gives its bytes. Above the width of the longest run all widths are equal.
    """
    where = np.flatnonzero(symbols != 0)
    runs = np.bincount(np.diff(where, prepend=-1) - 1, minlength=1)
    present = [np.bincount(plane, minlength=256) for plane in planes(symbols[where])]
    widest = min(WIDEST, width_of(len(runs) - 1))
    return min(range(widest + 1), key=lambda width: _size(runs, present, width))


def _size(runs: NDArray[np.int64], present: list[NDArray[np.int64]], index_bits: int) -> int:
    """Bytes of a chunk, from the histogram of runs and those of the planes of its symbols."""
    run = np.flatnonzero(runs)
    fillers = int((run >> index_bits) @ runs[run])
    largest = (1 << index_bits) - 1
    gaps = np.zeros(largest + 1, np.int64)
    np.add.at(gaps, run & largest, runs[run])
    gaps[largest] += fillers
    zeros = np.zeros(256, np.int64)
    zeros[0] = fillers
    streams = [gaps] * (index_bits > 0) + [plane + zeros for plane in present]
    return len(varint(int(gaps.sum()))) + 1 + sum(map(huffman.encoded_size, streams))


@dataclass(frozen=True)
class PaperColumns:
    """Bytes of one tensor after each step of the paper.

    Attributes:
        index_bits: width of the relative index.
        entries: stored weights, fillers included.
        pruned: P, relative index and float32 values.
        quantized: P+Q, relative index, fixed-width codes, and the float32 codebook.
        coded: P+Q+H, Huffman coded, tables and the float32 codebook included.
    """

    index_bits: int
    entries: int
    pruned: int
    quantized: int
    coded: int


def paper_columns(codes: Symbols, levels: int, index_bits: int | None = None) -> PaperColumns:
    """The paper's columns P, P+Q and P+Q+H for one tensor.

    Args:
        codes: codes of any shape; code 0 is the zero.
        levels: entries of the codebook, zero included.
        index_bits: width of the relative index; None takes the best for P+Q+H.
    """
    flat = codes.reshape(-1)
    width = best_index_bits(flat) if index_bits is None else index_bits
    entries = len(relative_index(flat, width)[0])
    codebook = 4 * levels
    return PaperColumns(
        index_bits=width,
        entries=entries,
        pruned=packed_size(entries, width + 32),
        quantized=packed_size(entries, width + width_of(levels - 1)) + codebook,
        coded=len(DeepCompression(width).encode(flat)) + codebook,
    )
