"""Codecs: how the symbols of a tensor become bytes.

A codec sees symbols only, never values: unsigned integers that are codes into a codebook, or the
bit patterns of plain values. Each is lossless on any symbols; the sparse ones are cheap where
symbol 0 is frequent. One chunk (some whole rows of a tensor, flattened) is coded on its own.

A codec is a module-level object with two methods (`Codec`), listed in `CODECS`. Its module's
docstring is its part of the specification.
"""

from __future__ import annotations

from lilliput.artifact.codecs._codec import Codec, Decoded, Sparse
from lilliput.artifact.codecs.deep_compression import DeepCompression
from lilliput.artifact.codecs.dense import Dense
from lilliput.artifact.codecs.gap import Gap
from lilliput.artifact.codecs.packed import Packed
from lilliput.artifact.codecs.raw import Raw

#: Codecs by their number in the compact profile.
CODECS: dict[str, Codec] = {
    "raw": Raw(),
    "f16": Raw(),
    "packed": Packed(),
    "deep_compression": DeepCompression(),
    "gap": Gap(),
    "dense": Dense(),
}

#: Codecs whose size and time follow the symbols that are not 0.
SPARSE = ("deep_compression", "gap")

__all__ = ["CODECS", "SPARSE", "Codec", "Decoded", "Sparse"]
