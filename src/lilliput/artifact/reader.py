"""Reading an artifact: one tensor, or some of its rows, without the others.

The file is read part by part, each checked against its CRC-32 before a decoder sees it. It is not
memory-mapped: a file that shrinks under a map kills the process, a short read is an error that can
be told. The surprising rule: memory is bounded by the caller's `max_bytes`, not by the file.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact import format as layout
from lilliput.artifact.bits import BLOCK, Bytes
from lilliput.artifact.codecs import CODECS, Decoded, Sparse
from lilliput.artifact.entries import Entry
from lilliput.artifact.report import SizeReport, report_tensor
from lilliput.artifact.tensors import DTYPES
from lilliput.errors import (
    ArtifactTooLarge,
    CorruptArtifact,
    InputError,
    UnknownName,
    UnsupportedArtifact,
)

MAX_BYTES = 8 << 30
#: Bytes a weight that the decoders may take beside their result, in the worst case.
_WORKING = 32
_Lookup = Callable[[NDArray[np.unsignedinteger]], np.ndarray]


def open(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, threads: int = 1) -> Artifact:
    """Open a file for reading; only its header is read now.

    Args:
        path: the file, of either profile.
        max_bytes: the most that a call may allocate for its result, and beside it for a chunk that
            is decoded, at 32 bytes a weight: each is compared alone, and with threads so many
            chunks are decoded at a time. It does not bound the header, whose JSON may have 16 MB
            if the file is long enough, and takes up to 45 times as much when parsed.
        threads: chunks decoded at the same time.

    Raises:
        InputError: when `path` is a folder or nothing, or another argument is no positive integer.
        OSError: when the file cannot be opened.
        UnsupportedArtifact: for another kind of file, a future version, an unknown codec.
        CorruptArtifact: when the header is truncated, altered or inconsistent.
    """
    return Artifact(path, max_bytes=max_bytes, threads=threads)


def read(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, threads: int = 1
) -> dict[str, np.ndarray]:
    """Read all tensors of a file, decoded; `max_bytes` holds for all together.

    Raises:
        InputError, OSError, UnsupportedArtifact, CorruptArtifact: as `open` and `Artifact.dense`.
        ArtifactTooLarge: before anything is allocated, when the tensors exceed `max_bytes`.
    """
    with open(path, max_bytes=max_bytes, threads=threads) as artifact:
        artifact._allow(sum(artifact.info(name).nbytes for name in artifact.names()), "the file")
        return {name: artifact.dense(name) for name in artifact.names()}


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as an artifact does; it may still be damaged."""
    with Path(path).open("rb") as file:
        return layout.begins_like_artifact(file.read(layout.PEEK))


class Artifact:
    """An open file. Use it as a context manager, or call `close`.

    Attributes:
        path: the file.
        profile: "safetensors" or "compact".
        header_bytes: bytes of the file that are no payload.
        structure: the section of that name, as the writer gave it, or None.
        recipe: likewise.
        figures: likewise.

    Raises:
        CorruptArtifact: from every method that reads a tensor: checksum, or contents, are wrong.
        ArtifactTooLarge: from the same, before allocating more than `max_bytes`.
        UnknownName: from every method that takes the name of a tensor.
        InputError: from every method that reads a tensor, after `close`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, threads: int = 1
    ) -> None:
        _check_arguments(path, max_bytes=max_bytes, threads=threads)
        self.path = os.fspath(path)
        self._max_bytes, self._threads = max_bytes, threads
        self._file: BinaryIO = Path(path).open("rb")  # noqa: SIM115 (`close` closes it)
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            with self._telling_where():
                document, self.profile, self.header_bytes = layout.unseal(self._file, self._size)
        except BaseException:
            self._file.close()
            raise
        self._entries = document.entries
        self.structure: Any = document.sections.get("structure")
        self.recipe: Any = document.sections.get("recipe")
        self.figures: Any = document.sections.get("figures")

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Artifact {self.path!r}, {self.profile}, {len(self._entries)} tensors>"

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def names(self) -> list[str]:
        """The tensors, in the writer's order."""
        return list(self._entries)

    def info(self, name: str) -> Entry:
        """What the header says of a tensor: codec, shape, dtype, counts, sizes."""
        if name not in self._entries:
            raise UnknownName("tensor", name, self._entries, where=self.path)
        return self._entries[name]

    def dense(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, decoded; bfloat16 comes as the uint16 of its bits.

        Args:
            name: the tensor.
            rows: a slice of the first axis, with step 1; only its chunks are read.
        """
        entry = self.info(name)
        start, stop = _row_range(entry, rows)
        first, last = start // entry.chunk_rows, -(-stop // entry.chunk_rows)
        base = first * entry.chunk_rows
        top = min(last * entry.chunk_rows, entry.shape[0] if entry.shape else 1)
        out = self._zeros(name, (top - base, *entry.shape[1:]), DTYPES[entry.dtype])
        self._fill(name, range(first, last), out, self._lookup(name))
        if not entry.shape:
            return out.reshape(())
        return out[start - base : stop - base]

    def codes(self, name: str) -> tuple[NDArray[np.unsignedinteger], NDArray[np.float32]]:
        """The codes, in the tensor's shape, and the codebook of a tensor that has one.

        Raises:
            InputError: when the tensor has no codebook.
        """
        entry = self.info(name)
        if not entry.levels:
            raise InputError(
                f"tensor {name!r} has no codebook: it holds plain values. Use dense()."
            )
        out = self._zeros(name, entry.shape, f"u{entry.itemsize}")
        self._fill(name, range(len(entry.parts)), out, lambda symbols: symbols)
        return out, self._codebook(name)

    def csr(self, name: str) -> tuple[np.ndarray, NDArray[np.int64], NDArray[np.int64]]:
        """A tensor as compressed sparse rows: first axis by all others.

        Returns:
            data, column indices and row pointers, as `scipy.sparse.csr_matrix` takes them.
        """
        entry = self.info(name)
        self._allow(24 * (_rows(entry) + 1) + 40 * entry.nonzeros, f"tensor {name!r}")
        where, values = zip(*self._nonzeros(name), strict=True)
        positions = np.concatenate(where)
        starts = np.searchsorted(positions, np.arange(_rows(entry) + 1) * entry.row_size)
        return np.concatenate(values), positions % max(1, entry.row_size), starts

    def verify(self) -> None:
        """Check every checksum, decode every tensor, and compare with the header's counts.

        Raises:
            CorruptArtifact: naming the tensor.
        """
        for name in self._entries:
            for _ in self._nonzeros(name):
                pass

    def report(self) -> SizeReport:
        """The size of each tensor beside its order-0 entropy; decodes all that have a codebook."""
        tensors = (
            report_tensor(name, entry, self._counts(name)) for name, entry in self._entries.items()
        )
        return SizeReport(
            path=self.path,
            profile=self.profile,
            file_bytes=Path(self.path).stat().st_size,
            header_bytes=self.header_bytes,
            tensors=tuple(tensors),
        )

    def _counts(self, name: str) -> NDArray[np.int64] | None:
        entry = self._entries[name]
        if not entry.levels:
            return None
        counts = np.zeros(entry.levels, np.int64)
        for at in range(len(entry.parts)):
            decoded = self._chunk(name, at)
            symbols = decoded.symbols if isinstance(decoded, Sparse) else decoded
            counts += np.bincount(symbols, minlength=entry.levels)
            counts[0] += _chunk_weights(entry, at) - len(symbols)
        return counts

    def _lookup(self, name: str) -> _Lookup:
        """The function from the symbols of a tensor to its values."""
        entry = self._entries[name]
        if entry.levels:
            book = self._codebook(name)
            return lambda symbols: book.take(symbols, mode="clip")  # they are checked by _chunk
        stored, dtype = DTYPES[entry.stored], DTYPES[entry.dtype]
        return lambda symbols: symbols.view(stored).astype(dtype, copy=False)

    def _fill(self, name: str, chunks: range, out: np.ndarray, lookup: _Lookup) -> None:
        entry = self._entries[name]
        size = entry.chunk_rows * entry.row_size
        flat = out.reshape(-1)

        def fill(at: int) -> None:
            begin = (at - chunks.start) * size
            _place(self._chunk(name, at), flat[begin : begin + size], lookup)

        if self._threads == 1 or len(chunks) == 1:
            for at in chunks:
                fill(at)
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(fill, chunks))

    def _nonzeros(self, name: str) -> Iterator[tuple[NDArray[np.int64], np.ndarray]]:
        """Positions and values of what is not zero, by chunks; as many as the header says."""
        entry, lookup, found = self._entries[name], self._lookup(name), 0
        for at in range(len(entry.parts)):
            positions, values = self._sparse(name, at, lookup)
            found += len(values)
            if found > entry.nonzeros:
                break
            yield positions + at * entry.chunk_rows * entry.row_size, values
        if found != entry.nonzeros:
            with self._telling_where(name):
                raise CorruptArtifact(
                    f"its header says that {entry.nonzeros} values are not zero, which is wrong."
                )

    def _sparse(self, name: str, at: int, lookup: _Lookup) -> tuple[NDArray[np.int64], np.ndarray]:
        """Positions in a chunk of what is not zero, and the values there."""
        entry = self._entries[name]
        decoded = self._chunk(name, at)
        if isinstance(decoded, Sparse) and lookup(np.zeros(1, decoded.symbols.dtype))[0] == 0:
            values = lookup(decoded.symbols)
            keep = values != 0
            return decoded.positions[keep], values[keep]
        dense = self._zeros(name, (_chunk_weights(entry, at),), DTYPES[entry.dtype])
        _place(decoded, dense, lookup)
        positions = np.flatnonzero(dense)
        return positions, dense[positions]

    def _chunk(self, name: str, at: int) -> Decoded:
        """The decoded symbols of a chunk, every code checked against the codebook's length."""
        entry = self._entries[name]
        count = _chunk_weights(entry, at)
        if not entry.is_plain:
            self._allow(count * _WORKING, f"decoding a chunk of tensor {name!r}")
        with self._telling_where(name):
            data = Bytes(self._part(entry, at)[entry.codebook_bytes if at == 0 else 0 :])
            decoded = CODECS[entry.codec].decode(data, count, entry.itemsize)
            data.end()
            symbols = decoded.symbols if isinstance(decoded, Sparse) else decoded
            levels = 2 if entry.stored == "BOOL" else entry.levels
            if levels and symbols.max(initial=0) >= levels:
                raise CorruptArtifact(f"code {symbols.max()} of {levels}.")
        return decoded

    def _codebook(self, name: str) -> NDArray[np.float32]:
        entry = self._entries[name]
        owner = self._entries[entry.book] if entry.book else entry
        with self._telling_where(name):
            stored = self._part(owner, 0)[: owner.codebook_bytes]
        return np.frombuffer(stored, DTYPES[owner.stored]).astype(np.float32)

    def _part(self, entry: Entry, at: int) -> memoryview:
        length, crc = entry.parts[at]
        if self._file.closed:
            raise InputError(f"{self.path} is closed: open it again to read from it.")
        data = _read_at(self._file, entry.offset + entry.starts[at], length)
        if len(data) != length:
            raise CorruptArtifact("the file was truncated while it was open.")
        if zlib.crc32(data) != crc:
            raise CorruptArtifact(f"part {at} does not match its checksum.")
        return memoryview(data)

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        self._allow(math.prod(shape) * np.dtype(dtype).itemsize, f"tensor {name!r}")
        return np.zeros(shape, dtype)

    def _allow(self, size: int, what: str) -> None:
        if size > self._max_bytes:
            raise ArtifactTooLarge(
                f"{self.path}: {what} needs {size:,} bytes, above the cap of {self._max_bytes:,}. "
                "If you trust the file, open it with a larger max_bytes."
            )

    @contextmanager
    def _telling_where(self, name: str = "") -> Iterator[None]:
        """Add the file and the tensor to the errors of the layers below."""
        where = f"{self.path}: tensor {name!r}: " if name else f"{self.path}: "
        try:
            yield
        except CorruptArtifact as error:
            raise CorruptArtifact(f"{where}{error} {_ADVICE}") from error
        except UnsupportedArtifact as error:
            raise UnsupportedArtifact(f"{where}{error}") from error


def _check_arguments(path: str | os.PathLike[str], **numbers: int) -> None:
    if not os.fspath(path) or Path(path).is_dir():
        raise InputError(f"path is {os.fspath(path)!r}, a folder or nothing; give that of a file.")
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise InputError(f"{name} is {number!r}; give a whole number, 1 or more.")


_SEEKING = threading.Lock()
_MOST_READ = 1 << 30  # more at once is refused by some systems


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """The bytes from `offset` on, fewer at the end of the file.

    Processes that were forked share the place in the file that `seek` sets, so that one would read
    from where another one has been: where the system can, nothing is sought.
    """
    if not hasattr(os, "pread"):
        with _SEEKING:
            file.seek(offset)
            return file.read(length)
    pieces = []
    while length and (piece := os.pread(file.fileno(), min(length, _MOST_READ), offset)):
        pieces.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


_ADVICE = "Get the file again from its source, or save the model again."


def _rows(entry: Entry) -> int:
    return entry.shape[0] if entry.shape else 1


def _row_range(entry: Entry, rows: slice | None) -> tuple[int, int]:
    if rows is None:
        return 0, _rows(entry)
    start, stop, step = rows.indices(_rows(entry))
    if step != 1 or not entry.shape:
        raise InputError(f"rows is {rows}; give a slice of the first axis with step 1.")
    return start, max(start, stop)


def _chunk_weights(entry: Entry, at: int) -> int:
    rows = min(entry.chunk_rows, _rows(entry) - at * entry.chunk_rows)
    return max(0, rows) * entry.row_size


def _place(decoded: Decoded, out: np.ndarray, lookup: _Lookup) -> None:
    """Write the values of a chunk into `out`, which holds zeros."""
    if isinstance(decoded, Sparse):
        zero = lookup(np.zeros(1, decoded.symbols.dtype))[0]
        if zero != 0 or np.signbit(zero):
            out.fill(zero)
        for positions, symbols in decoded.blocks():
            out[positions] = lookup(symbols)
        return
    for start in range(0, len(decoded), BLOCK):
        part = slice(start, start + BLOCK)
        out[part] = lookup(decoded[part])
