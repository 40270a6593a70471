"""The two containers of an artifact: what stands where, sealed by CRC-32.

Both hold the same *document* (the entries of the tensors and the caller's sections) and the same
payloads; a reader tells them apart by the first bytes. ``docs/artifact-format.md`` is the
specification. A payload is a sequence of *parts*, one a chunk of whole rows, each with its length
and CRC-32; the first part begins with the codebook. The surprising rule: nothing here trusts a
number from the file. Every size is compared with the file's own before anything is allocated.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np

from lilliput.artifact.bits import Bytes, varint
from lilliput.artifact.codecs import CODECS
from lilliput.artifact.deflate import DEFAULT, deflate, inflate
from lilliput.artifact.tensors import DTYPES
from lilliput.errors import CorruptArtifact, InputError, UnsupportedArtifact

VERSION = 1
#: Features that this reader knows; a file may require none yet.
FEATURES: frozenset[str] = frozenset()
SECTIONS = ("structure", "recipe", "figures")
COMPACT_MAGIC = b"\x8aLLP"
#: Of the header, and of the JSON inside it: parsed JSON takes up to 20 times its text.
LARGEST_HEADER = 16_000_000
_MOST_WEIGHTS = 1 << 48
_MOST_AXES = 32
_SEAL = b'{"__metadata__":{"lilliput.crc32":"'
#: Bytes at the beginning of a file that tell what it is.
PEEK = 8 + len(_SEAL)
_DOCUMENT = '","lilliput":'
_CODEC_NAMES, _DTYPE_NAMES = list(CODECS), list(DTYPES)


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

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return sum(length for length, _ in self.parts)

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


# Writing ------------------------------------------------------------------------------------------


def seal(document: Document, profile: str) -> tuple[bytes, list[str]]:
    """The header of a file, CRC included, and the names in the order of their payloads."""
    if profile == "compact":
        header, order = _seal_compact(document), list(document.entries)
    else:
        header, order = _seal_safetensors(document)
    return header, order


def _seal_safetensors(document: Document) -> tuple[bytes, list[str]]:
    entries = document.entries
    order = sorted(entries, key=lambda name: -_alignment(entries[name]))
    outer, end = {}, 0
    for name in order:
        entry, start, end = entries[name], end, end + entries[name].size
        dtype, shape = (entry.stored, entry.shape) if entry.is_plain else ("U8", (entry.size,))
        outer[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    inner: dict[str, Any] = {"v": VERSION}
    if document.required:
        inner["q"] = document.required
    inner |= {"t": {name: _to_json(entry) for name, entry in entries.items()}, **document.sections}
    tail = (_DOCUMENT + dump(dump(inner)) + "}," + dump(outer)[1:]).encode()
    if not outer:
        tail = (_DOCUMENT + dump(dump(inner)) + "}}").encode()
    tail += b" " * (-(len(_SEAL) + 8 + len(tail)) % 8)
    length = (len(_SEAL) + 8 + len(tail)).to_bytes(8, "little")
    unsealed = length + _SEAL + b"00000000" + tail
    return length + _SEAL + b"%08x" % zlib.crc32(unsealed) + tail, order


def _alignment(entry: Entry) -> int:
    return np.dtype(DTYPES[entry.stored]).itemsize if entry.is_plain else 1


def _to_json(entry: Entry) -> dict[str, Any]:
    """Short keys, and defaults left out: on a LeNet the JSON is 5 % of the file."""
    out: dict[str, Any] = {"c": entry.codec, "s": entry.shape, "d": entry.dtype, "e": entry.stored}
    out |= {"n": entry.nonzeros, "k": [number for part in entry.parts for number in part]}
    if entry.stored == entry.dtype:
        del out["e"]
    optional = {"r": entry.rows, "l": entry.levels, "b": entry.book}
    return out | {key: value for key, value in optional.items() if value}


def dump(value: Any) -> str:
    """Compact JSON; refuses what is not JSON, NaN included, and what no reader would accept."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"a section of the artifact is not plain JSON: {error}. Structure, recipe and figures "
            "hold dicts, lists, strings, finite numbers, booleans and None."
        ) from error
    if len(text) > LARGEST_HEADER // 2:  # half of it, for quotes are escaped once more
        raise InputError(
            f"the header has {len(text)} bytes of JSON; 8 MB is the limit. "
            "Keep long records (structure, recipe, figures) in a file of their own."
        )
    return text


def _seal_compact(document: Document) -> bytes:
    names = list(document.entries)
    table = b"".join(_to_bytes(entry, names) for entry in document.entries.values())
    inner: dict[str, Any] = {"q": document.required} if document.required else {}
    text = dump(inner | {"t": names, **document.sections}).encode()
    body = varint(len(names)) + table + varint(len(text)) + deflate(text, DEFAULT)
    unsealed = COMPACT_MAGIC + bytes([VERSION]) + varint(len(body)) + body
    return unsealed + zlib.crc32(unsealed).to_bytes(4, "little")


def _to_bytes(entry: Entry, names: list[str]) -> bytes:
    dtypes = _DTYPE_NAMES.index(entry.dtype) << 4 | _DTYPE_NAMES.index(entry.stored)
    numbers = [_CODEC_NAMES.index(entry.codec), dtypes, len(entry.shape), *entry.shape]
    numbers += [entry.nonzeros, entry.rows, entry.levels]
    if entry.levels:
        numbers.append(names.index(entry.book) + 1 if entry.book else 0)
    table = (varint(length) + crc.to_bytes(4, "little") for length, crc in entry.parts)
    return b"".join(map(varint, numbers)) + b"".join(table)


def begins_like_artifact(start: bytes) -> bool:
    """Whether the first `PEEK` bytes of a file are those of either profile."""
    return start.startswith(COMPACT_MAGIC) or start[8:].startswith(_SEAL)


# Reading ------------------------------------------------------------------------------------------


def unseal(file: BinaryIO, size: int) -> tuple[Document, str, int]:
    """Read and check the header of a file.

    Args:
        file: the file, at its beginning.
        size: its size in bytes.

    Returns:
        The document, with the offset of every payload; the profile; and the bytes of the header.

    Raises:
        UnsupportedArtifact: for another kind of file, a future version, an unknown codec.
        CorruptArtifact: for a file that is truncated, altered or inconsistent.
    """
    start = file.read(PEEK)
    if start.startswith(COMPACT_MAGIC):
        profile, read = "compact", _unseal_compact
    elif len(start) >= 16 and start[8:].startswith(b'{"'):
        profile, read = "safetensors", _unseal_safetensors
    else:
        raise UnsupportedArtifact(f"this is no Lilliput artifact: {_looks_like(start)}.")
    file.seek(0)
    document, header = read(file, size)
    document = replace(document, entries=_checked(document.entries, size))
    if unknown := [name for name in document.required if name not in FEATURES]:
        raise UnsupportedArtifact(f"it requires {', '.join(unknown)}: install a newer Lilliput.")
    return document, profile, header


def _looks_like(start: bytes) -> str:
    kinds = {
        b"PK\x03\x04": "it looks like a zip archive, perhaps a PyTorch checkpoint (.pt)",
        b"\x80": "it looks like a Python pickle, perhaps an old PyTorch checkpoint",
        b"\x89HDF": "it looks like an HDF5 file",
        b"\x1f\x8b": "it looks like a gzip file",
        b"GGUF": "it looks like a GGUF file",
        b"\x93NUMPY": "it looks like a NumPy file (.npy)",
        b"version https://git-lfs": "it is a Git LFS pointer; run git lfs pull",
        b"<": "it looks like an HTML or XML page, perhaps a failed download",
        b"\x08": "it may be an ONNX file",
    }
    if not start:
        return "the file is empty"
    found = (text for magic, text in kinds.items() if start.startswith(magic))
    return next(found, f"it begins with the bytes {start[:8].hex(' ')}")


def _unseal_safetensors(file: BinaryIO, size: int) -> tuple[Document, int]:
    length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise CorruptArtifact(f"its header claims {length} bytes; 16 MB is the limit.")
    if 8 + length > size:
        raise CorruptArtifact(f"truncated: its header needs {8 + length} bytes of {size}.")
    text = file.read(length)
    if not text.startswith(_SEAL):
        raise UnsupportedArtifact(_without_seal(text))
    at = len(_SEAL)
    unsealed = length.to_bytes(8, "little") + text[:at] + b"00000000" + text[at + 8 :]
    if text[at : at + 8] != b"%08x" % zlib.crc32(unsealed):
        raise CorruptArtifact("its header does not match its checksum: it was altered.")
    outer = _mapping(load(text), "the header")
    inner = _mapping(
        load(_mapping(outer.pop("__metadata__"), "metadata").get("lilliput", "")), "the document"
    )
    if inner.pop("v", None) != VERSION:
        raise UnsupportedArtifact(f"its version is not {VERSION}: install a newer Lilliput.")
    entries = {
        name: _from_json(value) for name, value in _mapping(inner.pop("t", None), "t").items()
    }
    return _document(inner, _placed(entries, outer, 8 + length)), 8 + length


def _without_seal(text: bytes) -> str:
    if b'"lilliput"' in text:
        return "its header was rewritten by another program, so its checksum cannot be checked."
    return "it is a safetensors file that Lilliput did not write; open it with safetensors."


def _from_json(value: Any) -> Entry:
    value = _mapping(value, "an entry")
    numbers = _integers(value.get("k", ()))
    dtype = value.get("d")
    return Entry(
        codec=_text(value.get("c")),
        shape=_integers(value.get("s")),
        dtype=_text(dtype),
        stored=_text(value.get("e", dtype)),
        nonzeros=_integers([value.get("n")])[0],
        parts=tuple(zip(numbers[::2], numbers[1::2], strict=False))
        if len(numbers) % 2 == 0
        else (),
        rows=_integers([value.get("r", 0)])[0],
        levels=_integers([value.get("l", 0)])[0],
        book=_text(value.get("b", "")),
    )


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{what} is not a JSON object.")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise CorruptArtifact(f"an entry says {value!r:.40} where a string should stand.")
    return value


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise CorruptArtifact(f"an entry says {value!r:.40} where a list of integers should stand.")
    for number in value:
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise CorruptArtifact(
                f"an entry says {number!r:.40} where an integer >= 0 should stand."
            )
    return tuple(value)


def _placed(entries: dict[str, Entry], outer: dict[str, Any], data: int) -> dict[str, Entry]:
    """Set the offsets from the safetensors header, which must tell the same as the entries."""
    if set(entries) != set(outer):
        raise CorruptArtifact("its two tables do not list the same tensors.")
    for name, entry in entries.items():
        span = _integers(_mapping(outer[name], name).get("data_offsets"))
        dtype, shape = (entry.stored, entry.shape) if entry.is_plain else ("U8", (entry.size,))
        said = outer[name].get("dtype"), outer[name].get("shape"), span[1:]
        if len(span) != 2 or said != (dtype, list(shape), (span[0] + entry.size,)):
            raise CorruptArtifact(f"tensor {name!r}: its two entries contradict each other.")
        entries[name] = replace(entry, offset=data + span[0])
    return entries


def load(text: str | bytes) -> Any:
    """Read JSON from an untrusted text: duplicate keys and broken text are refused."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptArtifact(f"its JSON is broken: {error!s:.100}.") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise CorruptArtifact("a key stands twice in one JSON object.")
    return out


def _document(inner: dict[str, Any], entries: dict[str, Entry]) -> Document:
    required = inner.pop("q", [])
    if not isinstance(required, list):
        raise CorruptArtifact("the list of required features is no list.")
    sections = {key: inner[key] for key in SECTIONS if key in inner}
    return Document(entries, sections, tuple(map(_text, required)))


def _unseal_compact(file: BinaryIO, size: int) -> tuple[Document, int]:
    start = Bytes(file.read(min(size, 14)))
    start.take(len(COMPACT_MAGIC))
    if (version := start.byte()) != VERSION:
        raise UnsupportedArtifact(
            f"its version is {version}, not {VERSION}: install a newer Lilliput."
        )
    body = start.varint()
    begin = min(size, 14) - start.left
    header = begin + body + 4
    if body > LARGEST_HEADER or header > size:
        raise CorruptArtifact(f"truncated: its header needs {header} bytes of {size}.")
    file.seek(0)
    text = file.read(header)
    if zlib.crc32(text[:-4]).to_bytes(4, "little") != text[-4:]:
        raise CorruptArtifact("its header does not match its checksum: it was altered.")
    data = Bytes(text[begin:-4])
    table = [_from_bytes(data) for _ in range(_bounded(data.varint(), data.left))]
    length = _bounded(data.varint(), min(LARGEST_HEADER, 1032 * data.left))  # deflate's best ratio
    inner = _mapping(load(inflate(data.take(data.left), length)), "the document")
    return _document(inner, _named(inner.pop("t", None), table, header)), header


def _bounded(count: int, limit: int) -> int:
    if count > limit:
        raise CorruptArtifact(f"its header counts {count} where {limit} are possible.")
    return count


def _from_bytes(data: Bytes) -> Entry:
    codec, dtypes, axes = data.varint(), data.varint(), _bounded(data.varint(), _MOST_AXES)
    shape = tuple(data.varint() for _ in range(axes))
    nonzeros, rows, levels = data.varint(), data.varint(), data.varint()
    book = data.varint() if levels else 0
    count = _bounded(chunk_count(shape, rows), data.left)
    parts = tuple((data.varint(), int.from_bytes(data.take(4), "little")) for _ in range(count))
    names = (_numbered(_DTYPE_NAMES, number, "dtype") for number in (dtypes >> 4, dtypes & 15))
    dtype, stored = names
    return Entry(
        _numbered(_CODEC_NAMES, codec, "codec"),
        shape,
        dtype,
        stored,
        nonzeros,
        parts,
        rows,
        levels,
        book=str(book) if book else "",
    )


def _numbered(names: list[str], number: int, kind: str) -> str:
    if number >= len(names):
        raise UnsupportedArtifact(f"it uses {kind} {number}: install a newer Lilliput.")
    return names[number]


def _named(names: Any, table: list[Entry], data: int) -> dict[str, Entry]:
    if not isinstance(names, list) or len(names) != len(table):
        raise CorruptArtifact("it does not have one name for each tensor.")
    if len(set(map(_text, names))) != len(names):
        raise CorruptArtifact("two of its tensors have one name.")
    entries = {}
    for name, entry in zip(names, table, strict=True):
        book = names[_bounded(int(entry.book), len(names)) - 1] if entry.book else ""
        entries[name] = replace(entry, book=book, offset=data)
        data += entry.size
    return entries


def _checked(entries: dict[str, Entry], size: int) -> dict[str, Entry]:
    for name, entry in entries.items():
        try:
            _check(entry, entries)
        except CorruptArtifact as error:
            raise CorruptArtifact(f"tensor {name!r}: {error}") from None
    end = max((entry.offset + entry.size for entry in entries.values()), default=None)
    for name, entry in entries.items():
        if entry.offset + entry.size > size:
            raise CorruptArtifact(f"truncated: {size} bytes of {end}, which cuts tensor {name!r}.")
    _check_layout(sorted((entry.offset, entry.size) for entry in entries.values()), size)
    return entries


def _check_layout(spans: list[tuple[int, int]], size: int) -> None:
    """Payloads follow each other without hole or overlap, up to the end of the file."""
    following = [offset for offset, _ in spans[1:]] + [size]
    for (offset, length), after in zip(spans, following, strict=True):
        if offset + length != after:
            raise CorruptArtifact(
                f"bytes {offset + length} to {after} belong to no tensor, or to two."
            )


def _check(entry: Entry, entries: dict[str, Entry]) -> None:
    for name, known in ((entry.codec, CODECS), (entry.dtype, DTYPES), (entry.stored, DTYPES)):
        if name not in known:
            raise UnsupportedArtifact(f"it uses {name!r:.40}: install a newer Lilliput.")
    axes = [max(1, axis) for axis in entry.shape]
    if len(axes) > _MOST_AXES or math.prod(axes) > _MOST_WEIGHTS:
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
