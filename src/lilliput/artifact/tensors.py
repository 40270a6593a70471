"""What goes into an artifact: arrays, codes with a codebook, and the bits of bfloat16.

NumPy has no bfloat16, so such a tensor is given, and returned, as the uint16 of its bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lilliput.errors import InputError

#: Names of dtypes (those of safetensors) by their number in the compact profile.
DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items() if name != "BF16"}


@dataclass(frozen=True)
class Coded:
    """A tensor whose values are looked up in a codebook: ``value = codebook[code]``.

    If the tensor has zeros, ``codebook[0] == 0.0`` is the zero: the sparse codecs are cheap where
    code 0 is frequent.

    Attributes:
        codes: uint8 or uint16, in the tensor's shape.
        codebook: float32, 1 to 65,536 values.

    Raises:
        InputError: for another dtype, or a code beyond the codebook.

    Example:
        >>> Coded(np.array([[0, 2], [1, 0]], np.uint8), np.array([0, -1, 1], np.float32)).shape
        (2, 2)
    """

    codes: NDArray[np.unsignedinteger]
    codebook: NDArray[np.float32]

    @classmethod
    def of(cls, values: NDArray[Any], *, frequent_first: bool = False) -> Coded:
        """The codes of a tensor of few values, at most 65,536.

        Args:
            values: of any shape; they are kept in 32 bits, and the sign of zero is not.
            frequent_first: give code 0 to the value that most entries have, instead of to zero.

        Raises:
            InputError: there are more values, or one that 32 bits do not hold.

        Example:
            >>> Coded.of(np.array([5.0, 0.0, 5.0])).codebook.tolist()
            [0.0, 5.0]
        """
        table, inverse, counts = _distinct(values)
        order = np.argsort(-counts if frequent_first else table != 0, kind="stable")
        book = table[order].astype(np.float32) + np.float32(0)
        if not np.array_equal(book, table[order], equal_nan=True):
            raise InputError(
                f"a codebook holds float32, and some of these {values.dtype} values are none."
            )
        narrow: type[np.unsignedinteger] = np.uint8 if len(book) <= 256 else np.uint16
        codes = np.argsort(order, kind="stable").astype(narrow)[inverse].reshape(values.shape)
        return cls(codes, book if len(book) else np.zeros(1, np.float32))

    def __post_init__(self) -> None:
        if self.codes.dtype not in (np.uint8, np.uint16):
            raise InputError(f"codes are {self.codes.dtype}; give uint8 or uint16.")
        if self.codebook.dtype != np.float32 or self.codebook.ndim != 1:
            kind, shape = self.codebook.dtype, self.codebook.shape
            raise InputError(f"the codebook is {kind} of shape {shape}; give float32, one axis.")
        if not 1 <= len(self.codebook) <= 1 << 16:
            raise InputError(
                f"a codebook has 1 to 65,536 values; this one has {len(self.codebook)}."
            )
        if self.codes.size and self.codes.max() >= len(self.codebook):
            raise InputError(
                f"code {self.codes.max()} has no value: the codebook has {len(self.codebook)}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.codes.shape


def _distinct(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.intp]]:
    """The values that occur, ascending; for each entry the number of its own; how often each occurs."""
    flat = values.reshape(-1)
    small = flat.astype(np.int16) if _has_small_range(flat) else None
    if small is None or not np.array_equal(small, flat):
        return np.unique(flat, return_inverse=True, return_counts=True)
    low = int(small.min())  # whole numbers are counted; sorting them takes several times as long
    counts = np.bincount((small - low).astype(np.uint8))
    occurs = counts.nonzero()[0]
    numbers = np.zeros(len(counts), np.intp)
    numbers[occurs] = np.arange(len(occurs))
    return (occurs + low).astype(values.dtype), numbers[small - low], counts[occurs]


def _has_small_range(flat: NDArray[Any]) -> bool:
    if not flat.size or flat.dtype.kind not in "fiu":
        return False
    low, high = float(flat.min()), float(flat.max())  # of not-a-number all comparisons are false
    return -(1 << 14) <= low <= high < 1 << 14 and high - low < 256


@dataclass(frozen=True)
class BFloat16:
    """A bfloat16 tensor as the uint16 of its bits."""

    bits: NDArray[np.uint16]

    def __post_init__(self) -> None:
        if self.bits.dtype != np.uint16:
            raise InputError(f"the bits of bfloat16 are uint16; these are {self.bits.dtype}.")


Tensor = np.ndarray | Coded | BFloat16


@dataclass(frozen=True)
class Symbols:
    """A tensor as the codecs see it.

    Attributes:
        flat: unsigned integers: codes, or the bit patterns of values as they are stored.
        shape: the tensor's shape.
        dtype: name of the dtype that a reader returns.
        stored: name of the dtype of the stored values, or of the codebook.
        codebook: the codebook as stored, or None for plain values.
    """

    flat: NDArray[np.unsignedinteger]
    shape: tuple[int, ...]
    dtype: str
    stored: str
    codebook: NDArray[np.floating] | None = None


def to_symbols(name: str, tensor: Tensor, floats: str) -> Symbols:
    """Lay a tensor out for the codecs.

    Args:
        name: the tensor's name, for errors.
        tensor: what the caller gave.
        floats: "float16" stores float32 values and codebooks as float16 where `fits_float16`; a
            codebook that loses nothing is always stored so.
    """
    if isinstance(tensor, Coded):
        book = _shrink(_shrink_exactly(tensor.codebook), floats)
        small = "u1" if len(book) <= 256 else "<u2"
        codes: NDArray[np.unsignedinteger] = np.ascontiguousarray(tensor.codes, small).reshape(-1)
        return Symbols(codes, tensor.shape, "F32", _NAMES[book.dtype], book)
    if isinstance(tensor, BFloat16):
        bits = np.ascontiguousarray(tensor.bits).reshape(-1)
        return Symbols(bits, tensor.bits.shape, "BF16", "BF16")
    values = _little_endian(name, tensor)
    stored = _shrink(values, floats)
    patterns: NDArray[np.unsignedinteger] = stored.reshape(-1).view(f"<u{stored.itemsize}")
    return Symbols(patterns, tensor.shape, _NAMES[values.dtype], _NAMES[stored.dtype])


def _little_endian(name: str, tensor: np.ndarray) -> np.ndarray:
    kind = np.asarray(tensor).dtype.newbyteorder("<")
    if not isinstance(tensor, np.ndarray) or kind not in _NAMES:
        raise InputError(
            f"tensor {name!r} is {type(tensor).__name__} of {kind}, which an artifact cannot hold. "
            f"Give Coded, BFloat16, or an array of {', '.join(str(kind) for kind in _NAMES)}."
        )
    values = np.ascontiguousarray(tensor, kind)
    return values.view(np.uint8) != 0 if kind == np.bool_ else values  # a view may hold other bytes


def _shrink(values: np.ndarray, floats: str) -> np.ndarray:
    if floats == "float16" and values.dtype == np.float32 and fits_float16(values):
        return values.astype(np.float16)
    return values


def _shrink_exactly(book: np.ndarray) -> np.ndarray:
    """A codebook in half of its bytes, if not one bit is lost: whole numbers up to 2,048, say."""
    with np.errstate(over="ignore", invalid="ignore"):
        half = book.astype("<f2")
        same = half.astype("<f4").tobytes() == book.astype("<f4").tobytes()
    return half if same else book


def fits_float16(values: NDArray[np.float32]) -> bool:
    """Whether float16 is near enough: finite, no overflow, each error small.

    Small is at most 2^-10 of the value itself or, for values far below the others, of the tensor's
    root mean square: a bias of 1e-6 beside biases of 0.1 may well be rounded.

    Example:
        >>> fits_float16(np.array([1.0, 0.0, 1e-6], np.float32))
        True
        >>> fits_float16(np.array([1e-9], np.float32))  # would become zero
        False
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).astype(np.float32)
    scale = np.sqrt(np.mean(np.square(values, dtype=np.float64))) if values.size else 0.0
    allowed = np.maximum(np.abs(values), scale) * 2.0**-10
    return bool(np.isfinite(values).all() and (np.abs(rounded - values) <= allowed).all())
