"""What a file says of each tensor, and the rules that it must keep.

A payload is a sequence of *parts*, one a chunk of whole rows, each with its length and CRC-32; the
first part begins with the codebook. Nothing here trusts a number from the file.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lilliput.artifact.codecs import CODECS
from lilliput.artifact.json_text import string
from lilliput.artifact.tensors import DTYPES
from lilliput.errors import CorruptArtifact, UnsupportedArtifact

VERSION = 1
SECTIONS = ("structure", "recipe", "figures")
CODEC_NAMES, DTYPE_NAMES = list(CODECS), list(DTYPES)
MOST_AXES = 32
_MOST_WEIGHTS = 1 << 48


@dataclass(frozen=True)
class Entry:
    """Everything that a reader must know of one tensor.

    Attributes:
        codec: name of the codec.
        shape: the tensor's shape.
        dtype: name of the dtype that a reader returns.
        stored: name of the dtype of the stored values, or of the codebook.
        nonzeros: values that are not zero.
        parts: length in bytes and CRC-32 of each part.
        rows: rows of a chunk; the last one may have fewer. 0: all rows are one chunk.
        levels: values of the codebook; 0 for a plain tensor.
        book: name of the tensor whose codebook this one shares, or "" for its own.
        offset: first byte of the payload in the file.
    """

    codec: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    nonzeros: int
    parts: tuple[tuple[int, int], ...]
    rows: int = 0
    levels: int = 0
    book: str = ""
    offset: int = field(default=0, compare=False)

    @property
    def weights(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def row_size(self) -> int:
        """Values in one row (one index of the first axis)."""
        return math.prod(self.shape[1:])

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, never 0."""
        return self.rows or max(1, _row_count(self.shape))

    @property
    def itemsize(self) -> int:
        """Bytes of a symbol."""
        if self.levels:
            return 1 if self.levels <= 256 else 2
        return np.dtype(DTYPES[self.stored]).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.weights * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def codebook_bytes(self) -> int:
        """Bytes of the codebook at the beginning of the first part."""
        return 0 if self.book else self.levels * np.dtype(DTYPES[self.stored]).itemsize

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """First byte of each part in the payload, and at last the end of the payload."""
        return tuple(itertools.accumulate((length for length, _ in self.parts), initial=0))

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return self.starts[-1]

    @property
    def is_plain(self) -> bool:
        """Whether the payload is an ordinary tensor, readable without Lilliput."""
        return self.codec in ("raw", "f16") and not self.levels


@dataclass(frozen=True)
class Document:
    """The entries in the writer's order, and the caller's sections."""

    entries: dict[str, Entry]
    sections: dict[str, Any]
    required: tuple[str, ...] = ()


def _row_count(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def chunk_count(shape: tuple[int, ...], rows: int) -> int:
    """Chunks of a tensor with `rows` rows a chunk; a tensor without values has one."""
    return max(1, -(-_row_count(shape) // rows)) if rows else 1


def document_from(inner: dict[str, Any], entries: dict[str, Entry]) -> Document:
    """The document, from the parsed JSON without the entries."""
    required = inner.pop("q", [])
    if not isinstance(required, list):
        raise CorruptArtifact("the list of required features is no list.")
    sections = {key: inner[key] for key in SECTIONS if key in inner}
    return Document(entries, sections, tuple(map(string, required)))


def check(entry: Entry, entries: dict[str, Entry]) -> None:
    """Refuse an entry that contradicts itself, or the tensor whose codebook it shares.

    Raises:
        UnsupportedArtifact: for a codec or dtype that is not known.
        CorruptArtifact: for everything else.
    """
    for name, known in ((entry.codec, CODECS), (entry.dtype, DTYPES), (entry.stored, DTYPES)):
        if name not in known:
            raise UnsupportedArtifact(f"it uses {name!r:.40}: install a newer Lilliput.")
    axes = [max(1, axis) for axis in entry.shape]
    if len(axes) > MOST_AXES or math.prod(axes) > _MOST_WEIGHTS:
        raise CorruptArtifact("its shape is impossible: 2^48 values in 32 axes are the limit.")
    if chunk_count(entry.shape, entry.rows) != len(entry.parts):
        raise CorruptArtifact(f"it has {len(entry.parts)} parts, which does not fit its rows.")
    if entry.nonzeros > entry.weights or entry.levels > 1 << 16:
        raise CorruptArtifact("its counts are impossible.")
    rounded = entry.dtype == "F32" and entry.stored == "F16"
    if entry.dtype != entry.stored and not rounded:
        raise CorruptArtifact(f"{entry.stored} values cannot stand for {entry.dtype}.")
    if entry.levels:
        _check_codebook(entry, entries)
    if entry.is_plain and entry.size != entry.weights * entry.itemsize:
        raise CorruptArtifact(f"{entry.size} bytes are not {entry.weights} values.")


def _check_codebook(entry: Entry, entries: dict[str, Entry]) -> None:
    if entry.dtype != "F32":
        raise CorruptArtifact(f"a codebook of {entry.dtype} is not possible.")
    if not entry.book:
        if entry.parts[0][0] < entry.codebook_bytes:
            raise CorruptArtifact("its codebook is longer than its first part.")
        return
    owner = entries.get(entry.book)
    if owner is None or owner.book or (owner.levels, owner.stored) != (entry.levels, entry.stored):
        raise CorruptArtifact(f"it shares the codebook of {entry.book!r:.40}, which does not fit.")
