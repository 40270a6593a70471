"""Codecs against brute force, closed forms and each other, on generated symbols."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lilliput.artifact import huffman, streams
from lilliput.artifact.bits import Bytes, pack, pack_variable, unpack, varint, width_of
from lilliput.artifact.codecs import CODECS, Sparse
from lilliput.artifact.codecs.deep_compression import (
    DeepCompression,
    best_index_bits,
    relative_index,
)
from lilliput.artifact.entropy import entropy_bits

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def symbols(draw, dtypes=("u1", "u2", "u4", "u8"), most=3000):
    """Symbols of every density: all zeros, long runs, hardly any zero."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    rng = np.random.default_rng(draw(SEEDS))
    size = draw(st.integers(0, most))
    kept = draw(st.sampled_from([0.0, 0.002, 0.05, 0.3, 1.0]))
    largest = draw(st.sampled_from([1, 3, 15, 16, 200, 2 ** (8 * dtype.itemsize) - 1]))
    values = rng.integers(0, min(largest, 2**63 - 1), size, endpoint=True)
    return np.where(rng.random(size) < kept, values, 0).astype(dtype)


def expand(decoded, count, dtype):
    if not isinstance(decoded, Sparse):
        return decoded
    out = np.zeros(count, dtype)
    for position, symbol in zip(decoded.positions, decoded.symbols, strict=True):
        out[position] = symbol
    return out


@pytest.mark.parametrize("name", CODECS)
@given(data=symbols())
@settings(max_examples=60, deadline=None)
def test_codecs_are_lossless(name, data):
    if name == "packed" and data.itemsize > 2:
        return
    coded = Bytes(CODECS[name].encode(data))
    decoded = CODECS[name].decode(coded, len(data), data.itemsize)
    coded.end()
    assert np.array_equal(expand(decoded, len(data), data.dtype), data)


@given(data=symbols(dtypes=("u1", "u2")), width=st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_deep_compression_is_lossless_at_every_index_width(data, width):
    coded = Bytes(DeepCompression(width).encode(data))
    assert np.array_equal(
        expand(DeepCompression().decode(coded, len(data), data.itemsize), len(data), data.dtype),
        data,
    )


@given(data=symbols(dtypes=("u1", "u4")))
@settings(max_examples=40, deadline=None)
def test_best_index_width_is_the_smallest_of_all_by_really_encoding(data):
    sizes = [len(DeepCompression(width).encode(data)) for width in range(9)]
    assert sizes[best_index_bits(data)] == min(sizes)


def relative_index_one_by_one(data, width):
    """As the paper tells it: walk along, and store a filler zero where the gap overflows."""
    gaps, codes, zeros = [], [], 0
    for at, symbol in enumerate(data):
        overflows = zeros == (1 << width) - 1 and data[at:].any()
        if symbol or overflows:
            gaps.append(zeros)
            codes.append(int(symbol))
            zeros = 0
        else:
            zeros += 1
    return gaps, codes


@given(data=symbols(dtypes=("u1",), most=500), width=st.integers(0, 8))
@settings(max_examples=80, deadline=None)
def test_relative_index_is_the_papers(data, width):
    gaps, codes = relative_index(data, width)
    assert (gaps.tolist(), codes.tolist()) == relative_index_one_by_one(data, width)
    ends = np.cumsum(gaps.astype(int) + 1) - 1  # a gap of 255 fills its byte
    assert np.array_equal(ends[codes != 0], np.flatnonzero(data))


def test_forty_zeros_with_a_four_bit_index():
    data = np.zeros(60, np.uint8)
    data[40] = 7
    gaps, codes = relative_index(data, 4)
    assert gaps.tolist() == [15, 15, 8]
    assert codes.tolist() == [0, 0, 7]
    assert (gaps + 1).sum() - 1 == 40


@given(st.lists(st.integers(0, 2**62)))
def test_varints_round_trip(values):
    data = Bytes(b"".join(map(varint, values)))
    assert [data.varint() for _ in values] == values
    assert data.left == 0


@given(data=symbols(dtypes=("u1", "u2"), most=200))
@settings(max_examples=80, deadline=None)
def test_packing_is_the_binary_numbers_side_by_side(data):
    width = width_of(int(data.max(initial=0)))
    text = "".join(f"{int(symbol):0{width}b}" for symbol in data) if width else ""
    packed = pack(data, width)
    assert packed == bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))
    assert np.array_equal(unpack(np.frombuffer(packed, np.uint8), width, len(data)), data)


@given(SEEDS, st.integers(1, 400))
@settings(max_examples=50, deadline=None)
def test_variable_packing_is_the_binary_numbers_side_by_side(seed, size):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 56, size, endpoint=True)
    codes = [int(rng.integers(0, 2**length)) for length in lengths.tolist()]
    text = "".join(f"{code:0{length}b}" for code, length in zip(codes, lengths, strict=True))
    expected = bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))
    assert pack_variable(np.array(codes, np.uint64), lengths) == expected


def huffman_bits(counts):
    """The total of Huffman's own algorithm: the sum of all merged weights."""
    heap = [int(count) for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@given(arrays(np.int64, st.integers(2, 60), elements=st.integers(0, 10**6)))
def test_code_lengths_are_optimal_and_complete(counts):
    if np.count_nonzero(counts) < 2:
        return
    lengths = huffman.code_lengths(counts, longest=40)
    used = lengths[counts > 0]
    assert (lengths[counts == 0] == 0).all()
    assert sum(2.0**-length for length in used.tolist()) == 1
    assert lengths @ counts == huffman_bits(counts)
    assert entropy_bits(counts) <= lengths @ counts + 1e-6
    assert lengths @ counts <= entropy_bits(counts) + counts.sum()


def best_limited(counts, longest):
    """The least total under a length limit, over all complete codes: brute force."""
    ordered = sorted((int(c) for c in counts if c), reverse=True)

    def fill(index, room, shortest):
        if index == len(ordered):
            return 0 if room >= 0 else math.inf
        return min(
            (
                ordered[index] * length + fill(index + 1, room - 2 ** (longest - length), length)
                for length in range(shortest, longest + 1)
                if room >= 2 ** (longest - length)
            ),
            default=math.inf,
        )

    return fill(0, 2**longest, 1)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_limited_code_lengths_are_optimal(counts):
    lengths = huffman.code_lengths(np.array(counts), longest=3)
    assert lengths.max() <= 3
    assert lengths @ np.array(counts) == best_limited(counts, 3)


def test_fibonacci_counts_stay_within_the_limit():
    counts = np.array([1, 1] + [0] * 38)
    for i in range(2, 40):
        counts[i] = counts[i - 1] + counts[i - 2]
    assert huffman.code_lengths(counts).max() == huffman.LONGEST


@given(data=symbols(dtypes=("u1",), most=6000))
@settings(max_examples=60, deadline=None)
def test_huffman_streams_round_trip_and_their_size_is_known_before(data):
    coded = huffman.encode(data)
    assert len(coded) == huffman.encoded_size(np.bincount(data, minlength=256))
    stream = Bytes(coded)
    assert np.array_equal(huffman.decode(stream, len(data)), data)
    stream.end()


@pytest.mark.parametrize("mode", [1, 2, 4, 8, 0x41, 0x42, 0x44, 0])
@given(seed=SEEDS, size=st.integers(0, 2000))
@settings(max_examples=20, deadline=None)
def test_every_mode_of_a_stream_round_trips(mode, seed, size):
    bits = 4 + (mode & 15) if mode & 0x40 else mode or 8
    data = np.random.default_rng(seed).integers(0, 2**bits, size).astype(np.uint8)
    stream = Bytes(streams._encode(data, mode))
    assert np.array_equal(streams.decode(stream, size), data)
    stream.end()


def test_long_streams_round_trip():
    data = np.random.default_rng(0).normal(128, 30, 400_001).clip(0, 255).astype(np.uint8)
    assert np.array_equal(streams.decode(Bytes(streams.encode(data)), len(data)), data)


@pytest.mark.parametrize(("counts", "bits"), [([4, 4], 8), ([8], 0), ([], 0), ([1] * 16, 64)])
def test_entropy_of_uniform_counts(counts, bits):
    assert entropy_bits(np.array(counts, np.int64)) == bits
