"""The compact profile: one blob with a binary header, for networks of a few kilobytes."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any, BinaryIO

from lilliput.artifact.bits import Bytes, varint
from lilliput.artifact.deflate import DEFAULT, HUFFMAN_ONLY, deflate, inflate
from lilliput.artifact.entries import (
    CODEC_NAMES,
    DTYPE_NAMES,
    MOST_AXES,
    VERSION,
    Document,
    Entry,
    chunk_count,
    document_from,
)
from lilliput.artifact.json_text import LARGEST_HEADER, dump, load, mapping, string
from lilliput.errors import CorruptArtifact, UnsupportedArtifact

MAGIC = b"\x8aLLP"
_LONGEST_START = len(MAGIC) + 1 + 9  # magic, version, length of the header
#: The most that a document may inflate to: so much, and so much for each of its deflated bytes.
#: Deflate reaches a ratio of 1032, and parsed JSON takes a multiple of its text again.
_FREE_BYTES, _BEST_RATIO = 1 << 16, 64


def seal(document: Document) -> tuple[bytes, list[str]]:
    """The header, and the names in the order of their payloads."""
    names = list(document.entries)
    numbers = {name: number for number, name in enumerate(names, 1)}
    table = b"".join(_to_bytes(entry, numbers) for entry in document.entries.values())
    inner: dict[str, Any] = {"q": document.required} if document.required else {}
    text = dump(inner | {"t": names, **document.sections}).encode()
    body = varint(len(names)) + table + varint(len(text)) + _deflated(text)
    unsealed = MAGIC + bytes([VERSION]) + varint(len(body)) + body
    return unsealed + zlib.crc32(unsealed).to_bytes(4, "little"), names


def _deflated(text: bytes) -> bytes:
    """The document, in more bytes where a reader would not believe that so few of them hold it."""
    coded = deflate(text, DEFAULT)
    return coded if len(text) <= _most_inflated(len(coded)) else deflate(text, HUFFMAN_ONLY)


def _most_inflated(deflated: int) -> int:
    return min(LARGEST_HEADER, _FREE_BYTES + _BEST_RATIO * deflated)


def _to_bytes(entry: Entry, numbers: dict[str, int]) -> bytes:
    dtypes = DTYPE_NAMES.index(entry.dtype) << 4 | DTYPE_NAMES.index(entry.stored)
    fields = [CODEC_NAMES.index(entry.codec), dtypes, len(entry.shape), *entry.shape]
    fields += [entry.nonzeros, entry.rows, entry.levels]
    if entry.levels:
        fields.append(numbers[entry.book] if entry.book else 0)
    table = (varint(length) + crc.to_bytes(4, "little") for length, crc in entry.parts)
    return b"".join(map(varint, fields)) + b"".join(table)


def unseal(file: BinaryIO, size: int) -> tuple[Document, int]:
    """The document, and the bytes of the header."""
    start = Bytes(file.read(min(size, _LONGEST_START)))
    start.take(len(MAGIC))
    if (version := start.byte()) != VERSION:
        raise UnsupportedArtifact(
            f"its version is {version}, not {VERSION}: install a newer Lilliput."
        )
    body = start.varint()
    begin = min(size, _LONGEST_START) - start.left
    header = begin + body + 4
    if body > LARGEST_HEADER or header > size:
        raise CorruptArtifact(f"truncated: its header needs {header} bytes of {size}.")
    file.seek(0)
    data = file.read(header)
    if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        raise CorruptArtifact("its header does not match its checksum: it was altered.")
    return _parse(Bytes(data[begin:-4]), header), header


def _parse(body: Bytes, header: int) -> Document:
    table = [_from_bytes(body) for _ in range(_bounded(body.varint(), body.left))]
    length = _bounded(body.varint(), _most_inflated(body.left))
    inner = mapping(load(inflate(body.take(body.left), length)), "the document")
    return document_from(inner, _named(inner.pop("t", None), table, header))


def _bounded(count: int, limit: int) -> int:
    if count > limit:
        raise CorruptArtifact(f"its header counts {count} where {limit} are possible.")
    return count


def _from_bytes(data: Bytes) -> Entry:
    codec, dtypes, axes = data.varint(), data.varint(), _bounded(data.varint(), MOST_AXES)
    shape = tuple(data.varint() for _ in range(axes))
    nonzeros, rows, levels = data.varint(), data.varint(), data.varint()
    book = data.varint() if levels else 0
    count = _bounded(chunk_count(shape, rows), data.left)
    parts = tuple((data.varint(), int.from_bytes(data.take(4), "little")) for _ in range(count))
    return Entry(
        codec=_numbered(CODEC_NAMES, codec, "codec"),
        shape=shape,
        dtype=_numbered(DTYPE_NAMES, dtypes >> 4, "dtype"),
        stored=_numbered(DTYPE_NAMES, dtypes & 15, "dtype"),
        nonzeros=nonzeros,
        parts=parts,
        rows=rows,
        levels=levels,
        book=str(book) if book else "",  # a number still: `_named` knows the names
    )


def _numbered(names: list[str], number: int, kind: str) -> str:
    if number >= len(names):
        raise UnsupportedArtifact(f"it uses {kind} {number}: install a newer Lilliput.")
    return names[number]


def _named(names: Any, table: list[Entry], data: int) -> dict[str, Entry]:
    if not isinstance(names, list) or len(names) != len(table):
        raise CorruptArtifact("it does not have one name for each tensor.")
    if len(set(map(string, names))) != len(names):
        raise CorruptArtifact("two of its tensors have one name.")
    entries = {}
    for name, entry in zip(names, table, strict=True):
        book = names[_bounded(int(entry.book), len(names)) - 1] if entry.book else ""
        entries[name] = replace(entry, book=book, offset=data)
        data += entry.size
    return entries
