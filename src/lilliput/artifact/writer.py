"""Writing an artifact: one atomic file, the codec of each tensor chosen by its cost.

The file appears complete or not at all: it is written beside its place, flushed to the disk, and
renamed. The same tensors and sections give the same bytes (with the same zlib).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from lilliput.artifact import format as layout
from lilliput.artifact.choice import choose, has_many_zeros
from lilliput.artifact.codecs import CODECS, SPARSE, Codec
from lilliput.artifact.codecs.deep_compression import WIDEST, DeepCompression
from lilliput.artifact.entries import Document, Entry, check
from lilliput.artifact.report import SizeReport, report_tensor
from lilliput.artifact.tensors import DTYPES, Symbols, Tensor, to_symbols
from lilliput.errors import ArtifactError, CorruptArtifact, InputError, UnknownName

#: Weights of a chunk. Where few are not zero it may be four times as many: with fewer symbols than
#: these, the tables of the Huffman codes would take more than half a percent of a chunk.
CHUNK_WEIGHTS, _CHUNK_SYMBOLS = 1 << 20, 1 << 16
#: Below this many bytes of payload the compact header is worth its being readable by Lilliput only.
_COMPACT_BYTES = 1 << 20

Profile = Literal["auto", "safetensors", "compact"]


@dataclass(frozen=True)
class _Options:
    codec: str | Mapping[str, str]
    index_bits: int | Literal["paper"] | Mapping[str, int] | None
    floats: str
    chunk_weights: int | None


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    structure: Any = None,
    recipe: Any = None,
    figures: Any = None,
    codec: str | Mapping[str, str] = "auto",
    index_bits: int | Literal["paper"] | Mapping[str, int] | None = None,
    floats: Literal["float32", "float16"] = "float32",
    profile: Profile = "auto",
    chunk_weights: int | None = None,
) -> SizeReport:
    """Write tensors to one compressed file.

    Args:
        path: where to write. A file that is there is replaced only when the new one is complete,
            which takes its permissions; a link stays one, and the file that it points to is replaced.
        tensors: arrays, `Coded` or `BFloat16`, by name. Arrays are stored without loss.
        structure: how to build the model again; this and the next two are JSON, kept as given.
        recipe: the recipe that made the model.
        figures: what was measured.
        codec: "auto" chooses by size; a name holds for every `Coded` tensor and every array with
            many zeros; a mapping gives tensors (missing: "auto") their own.
        index_bits: width of the relative index where `deep_compression` is named: None takes the
            best of each chunk, "paper" 8 for convolutions and 5 for matrices.
        floats: "float16" stores float32 arrays and codebooks as float16, each only if it is
            finite there and no value moves by more than 2^-10 of itself or of the root mean square.
            Codebooks that lose nothing so are always stored in float16.
        profile: "compact" for tiny networks; "auto" takes it for payloads under 1 MiB, but never
            for a path that ends in ``.safetensors``.
        chunk_weights: weights of a chunk, rounded to whole rows; None takes 2^20, and up to 2^22
            where few weights are not zero. Decoding is parallel, and partial, by chunks.

    Returns:
        The sizes, as `Artifact.report` would measure them.

    Raises:
        InputError: for an unknown codec, a dtype, shape or name that cannot be stored, sections
            that are no JSON, a path that is a folder.
        ArtifactError: when the disk refuses; an older file at `path` is then untouched.

    Example:
        >>> import tempfile, pathlib
        >>> from lilliput.artifact import Coded, open, write
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.safetensors"
        >>> codes = np.zeros((300, 784), np.uint8)
        >>> codes[::7, ::5] = 1
        >>> report = write(path, {"w": Coded(codes, np.array([0, 0.5], np.float32))})
        >>> report.dense_bytes, report.file_bytes < 3000
        (940800, True)
        >>> with open(path) as artifact:
        ...     float(artifact.dense("w").sum())
        3375.5
    """
    options = _Options(codec, index_bits, floats, chunk_weights)
    target = _file_path(path)
    _check_tensors(tensors)
    _check_options(options, profile, tensors)
    sections = {"structure": structure, "recipe": recipe, "figures": figures}
    encoded = _encode_all(tensors, options)
    document = Document(
        {name: item.entry for name, item in encoded.items()},
        {key: value for key, value in sections.items() if value is not None},
    )
    _check_readable(document)
    chosen = _resolve(profile, path, document)
    header, order = layout.seal(document, chosen)
    _write_atomically(target, _stream(header, order, encoded))
    return SizeReport(
        path=os.fspath(path),
        profile=chosen,
        file_bytes=target.stat().st_size,
        header_bytes=len(header),
        tensors=tuple(report_tensor(n, item.entry, item.counts) for n, item in encoded.items()),
    )


def annotate(source: str | os.PathLike[str], path: str | os.PathLike[str], *, figures: Any) -> None:
    """Write a file again with other figures; its tensors are copied as they lie there, not decoded.

    Args:
        source: an artifact of either profile.
        path: where to write; may be `source` itself.
        figures: what was measured, in the place of the figures that the file holds.

    Raises:
        OSError, UnsupportedArtifact, CorruptArtifact: as `open`; payloads are not looked at.
        ArtifactError: when the disk refuses; an older file at `path` is then untouched.

    Example:
        >>> import tempfile, pathlib
        >>> from lilliput.artifact import annotate, open, write
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.safetensors"
        >>> _ = write(path, {"w": np.zeros(3, np.float32)}, figures={})
        >>> annotate(path, path, figures={"score": 98.0})
        >>> with open(path) as artifact:
        ...     artifact.figures
        {'score': 98.0}
    """
    target = _file_path(path)
    with Path(source).open("rb") as file:
        document, profile, _ = layout.unseal(file, os.fstat(file.fileno()).st_size)
        sections = {**document.sections, "figures": figures}
        header, order = layout.seal(replace(document, sections=sections), profile)
        _write_atomically(target, _copied(header, order, document, file))


def _file_path(path: str | os.PathLike[str]) -> Path:
    """The file to write: where `path` is a link, what it points to."""
    if not os.fspath(path) or Path(path).is_dir():
        raise InputError(f"path is {os.fspath(path)!r}, a folder or nothing; give that of a file.")
    return Path(os.path.realpath(path))


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    if not isinstance(tensors, Mapping):
        raise InputError(f"tensors is {type(tensors).__name__}; give a mapping of names to arrays.")
    for name in tensors:
        if not isinstance(name, str) or not name:
            raise InputError(f"a tensor is named {name!r}; a name is a string that is not empty.")
    if "__metadata__" in tensors:
        raise InputError("no tensor can be named '__metadata__': safetensors reserves the name.")


def _check_readable(document: Document) -> None:
    """Hold the entries to the reader's rules: a file that it refuses must not replace a good one."""
    for name, entry in document.entries.items():
        try:
            check(entry, document.entries)
        except CorruptArtifact as error:
            raise InputError(f"tensor {name!r} cannot be stored: {error}") from None


def _check_options(options: _Options, profile: str, tensors: Mapping[str, Tensor]) -> None:
    codec = options.codec
    named = list(codec.values()) if isinstance(codec, Mapping) else [codec]
    if not all(isinstance(name, str) for name in named):
        raise InputError(f"codec is {codec!r:.80}; give a name, or a mapping of tensors to names.")
    for kind, name, known in (
        *(("codec", name, ["auto", *CODECS]) for name in named),
        ("profile", profile, ["auto", "safetensors", "compact"]),
        ("storage of floats", options.floats, ["float32", "float16"]),
    ):
        if name not in known:
            raise UnknownName(kind, name, known)
    for mapping in (options.codec, options.index_bits):
        for name in mapping if isinstance(mapping, Mapping) else ():
            if name not in tensors:
                raise UnknownName("tensor", name, tensors)
    weights = options.chunk_weights
    if weights is not None and not (isinstance(weights, int) and weights >= 1):
        raise InputError(f"chunk_weights is {weights!r}; give a whole number, 1 or more.")


def _resolve(profile: str, path: str | os.PathLike[str], document: Document) -> str:
    if profile != "auto":
        return profile
    small = sum(entry.size for entry in document.entries.values()) < _COMPACT_BYTES
    return "compact" if small and not os.fspath(path).endswith(".safetensors") else "safetensors"


@dataclass(frozen=True)
class _Encoded:
    entry: Entry
    parts: list[list[bytes | memoryview]]
    counts: NDArray[np.int64] | None


def _encode_all(tensors: Mapping[str, Tensor], options: _Options) -> dict[str, _Encoded]:
    """Encode each tensor; one whose codebook was met before refers to it."""
    owners: dict[bytes, str] = {}
    out = {}
    for name, tensor in tensors.items():
        symbols = to_symbols(name, tensor, options.floats)
        book = b"" if symbols.codebook is None else symbols.codebook.tobytes()
        owner = owners.setdefault(symbols.stored.encode() + book, name) if book else name
        out[name] = _encode(name, symbols, b"" if owner != name else book, owner, options)
    return out


def _encode(name: str, symbols: Symbols, book: bytes, owner: str, options: _Options) -> _Encoded:
    counts = _count(symbols)
    rows, chunks = _cut(symbols, options.chunk_weights or _chunk_weights(counts))
    relative_index = DeepCompression(_index_bits(name, symbols.shape, options))
    codecs: dict[str, Codec] = CODECS | {"deep_compression": relative_index}

    @functools.cache  # what was encoded to compare codecs is not encoded again
    def encode(codec: str, at: int) -> bytes | memoryview:
        return codecs[codec].encode(chunks[at])

    plain = symbols.stored if symbols.codebook is None else ""
    named = has_many_zeros(counts) or not plain
    chosen = _codec(name, symbols, options, named, lambda: choose(chunks, counts, plain, encode))
    parts = [[encode(chosen, at)] for at in range(len(chunks))]
    parts[0].insert(0, book)
    entry = Entry(
        codec=chosen,
        shape=symbols.shape,
        dtype=symbols.dtype,
        stored=symbols.stored,
        nonzeros=_nonzeros(symbols, counts),
        parts=tuple((sum(map(len, part)), _crc(part)) for part in parts),
        rows=rows,
        levels=0 if symbols.codebook is None else len(symbols.codebook),
        book="" if owner == name else owner,
    )
    return _Encoded(entry, parts, None if symbols.codebook is None else counts)


def _count(symbols: Symbols) -> NDArray[np.int64]:
    """Occurrences of each code, or of (zero, not zero) among plain values."""
    if symbols.codebook is None:
        nonzeros = int(np.count_nonzero(symbols.flat))
        return np.array([symbols.flat.size - nonzeros, nonzeros])
    counts = np.zeros(len(symbols.codebook), np.int64)
    for part in _slices(symbols.flat, CHUNK_WEIGHTS):  # for bincount makes a copy in int64
        counts += np.bincount(part, minlength=len(counts))
    return counts


def _chunk_weights(counts: NDArray[np.int64]) -> int:
    """The weights that hold enough symbols, where these are independent of the place."""
    total, rest = int(counts.sum()), int(counts[1:].sum())
    wanted = _CHUNK_SYMBOLS * total // max(1, rest)
    return min(max(wanted, CHUNK_WEIGHTS), 4 * CHUNK_WEIGHTS)


def _cut(symbols: Symbols, chunk_weights: int) -> tuple[int, list[NDArray[np.unsignedinteger]]]:
    """Rows of a chunk, or 0 where one chunk holds the tensor, and the symbols of each chunk."""
    shape, row = symbols.shape, int(np.prod(symbols.shape[1:], dtype=np.int64))
    rows = max(1, chunk_weights // max(1, row))
    if not shape or rows >= shape[0] or not row:
        return 0, [symbols.flat]
    return rows, _slices(symbols.flat, rows * row)


def _slices(flat: NDArray[np.unsignedinteger], size: int) -> list[NDArray[np.unsignedinteger]]:
    return [flat[at : at + size] for at in range(0, len(flat), size)]


def _nonzeros(symbols: Symbols, counts: NDArray[np.int64]) -> int:
    if symbols.codebook is None:
        values = symbols.flat.view(DTYPES[symbols.stored])
        return int(counts[1]) - int(np.count_nonzero(symbols.flat) - np.count_nonzero(values))
    return int(counts[symbols.codebook != 0].sum())


def _codec(
    name: str, symbols: Symbols, options: _Options, named: bool, choose_codec: Callable[[], str]
) -> str:
    """The codec that was asked for; the best where none was, or one that is not for this tensor."""
    asked = options.codec if isinstance(options.codec, str) else options.codec.get(name, "auto")
    if asked == "auto" or (symbols.codebook is None and isinstance(options.codec, str)):
        chosen = choose_codec()
        asked = asked if named and chosen != "raw" and asked in SPARSE else chosen
    if asked in ("raw", "f16"):
        rounded = symbols.codebook is None and symbols.stored != symbols.dtype
        asked = "f16" if rounded else "raw"
    if asked == "packed" and symbols.flat.itemsize > 2:
        raise InputError(
            f"tensor {name!r} is plain {symbols.stored}, and 'packed' holds codes only. "
            "Give it 'raw', 'gap' or 'auto'."
        )
    return asked


def _index_bits(name: str, shape: tuple[int, ...], options: _Options) -> int | None:
    bits = options.index_bits
    if bits == "paper":
        return 8 if len(shape) > 2 else 5
    bits = bits.get(name) if isinstance(bits, Mapping) else bits
    if bits is not None and not (isinstance(bits, int) and 0 <= bits <= WIDEST):
        raise InputError(f"index_bits is {bits!r}; a relative index has 0 to {WIDEST} bits.")
    return bits


def _crc(part: Iterable[bytes | memoryview]) -> int:
    crc = 0
    for piece in part:
        crc = zlib.crc32(piece, crc)
    return crc


def _stream(
    header: bytes, order: list[str], encoded: dict[str, _Encoded]
) -> Iterator[bytes | memoryview]:
    yield header
    for name in order:
        for part in encoded[name].parts:
            yield from part


def _copied(
    header: bytes, order: list[str], document: Document, file: BinaryIO
) -> Iterator[bytes | memoryview]:
    yield header
    for name in order:
        entry = document.entries[name]
        file.seek(entry.offset)
        for length, _ in entry.parts:
            yield file.read(length)


def _write_atomically(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            _take_mode(temporary, path)
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C too must not leave half a file behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise ArtifactError(_refused(path, error)) from error
        raise
    _sync_folder(path.parent)


def _take_mode(temporary: Path, path: Path) -> None:
    """Give a new file the permissions of the one that it replaces, before anything is in it."""
    with contextlib.suppress(OSError):  # there is none, or the file system knows no permissions
        temporary.chmod(path.stat().st_mode & 0o777)


def _refused(path: Path, error: OSError) -> str:
    advice = {
        errno.ENOSPC: "Free some space, or write to another disk.",
        errno.ENOENT: f"Make the folder {str(path.parent)!r} first.",
        errno.EACCES: "Check the permissions of the folder.",
        errno.EISDIR: "There is a folder of this name: give the path of a file.",
    }.get(error.errno or 0, "Check the disk and the folder.")
    kept = "The file that was there is untouched. " if path.is_file() else ""
    return f"cannot write {str(path)!r}: {error.strerror or error}. {kept}{advice}"


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where the system can (Windows cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
