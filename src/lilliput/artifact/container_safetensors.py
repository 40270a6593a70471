"""The ordinary profile: a ``.safetensors`` file that any safetensors reader opens.

Plain tensors stand in it as they are, coded ones as U8. The document is a JSON string in the
metadata; the first metadata key is the CRC-32 of the whole header, its own eight digits taken as
zeros, so that they stand at a fixed place.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from lilliput.artifact.entries import VERSION, Document, Entry, document_from
from lilliput.artifact.json_text import LARGEST_HEADER, dump, integers, load, mapping, string
from lilliput.artifact.tensors import DTYPES
from lilliput.errors import CorruptArtifact, UnsupportedArtifact

#: How such a file goes on after the eight bytes that say how long its header is.
SEAL = b'{"__metadata__":{"lilliput.crc32":"'
_CRC = slice(len(SEAL), len(SEAL) + 8)


def seal(document: Document) -> tuple[bytes, list[str]]:
    """The header, and the names in the order of their payloads: the widest dtype first."""
    entries = document.entries
    order = sorted(entries, key=lambda name: -_alignment(entries[name]))
    outer, end = {}, 0
    for name in order:
        start, end = end, end + entries[name].size
        dtype, shape = _as_seen(entries[name])
        outer[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    inner: dict[str, Any] = {
        "v": VERSION,
        "t": {n: _to_json(entry) for n, entry in entries.items()},
    }
    inner |= {"q": document.required} if document.required else {}
    metadata = {"lilliput.crc32": "00000000", "lilliput": dump(inner | document.sections)}
    header = bytearray(dump({"__metadata__": metadata, **outer}), "ascii")
    header += b" " * (-len(header) % 8)
    header[_CRC] = _crc(header)
    return len(header).to_bytes(8, "little") + header, order


def _crc(header: bytes | bytearray) -> bytes:
    """Eight hexadecimal digits for the header, which has any digits in their place, or none yet."""
    length = len(header).to_bytes(8, "little")
    return b"%08x" % zlib.crc32(length + header[: _CRC.start] + b"00000000" + header[_CRC.stop :])


def _as_seen(entry: Entry) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape as other safetensors readers see them."""
    return (entry.stored, entry.shape) if entry.is_plain else ("U8", (entry.size,))


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


def unseal(file: BinaryIO, size: int) -> tuple[Document, int]:
    """The document, and the bytes of the header."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(len(SEAL))
    if header != SEAL:
        raise UnsupportedArtifact(_without_seal(header + file.read(LARGEST_HEADER)))
    if length > LARGEST_HEADER or 8 + length > size:
        raise CorruptArtifact(f"truncated: its header needs {8 + length} bytes of {size}.")
    header += file.read(length - len(SEAL))
    if header[_CRC] != _crc(header):
        raise CorruptArtifact("its header does not match its checksum: it was altered.")
    return _parse(header), 8 + length


def _without_seal(header: bytes) -> str:
    if b'"lilliput"' in header:
        return "its header was rewritten by another program, so its checksum cannot be checked."
    return "it is a safetensors file that Lilliput did not write; open it with safetensors."


def _parse(header: bytes) -> Document:
    outer = mapping(load(header), "the header")
    metadata = mapping(outer.pop("__metadata__"), "the metadata")
    inner = mapping(load(string(metadata.get("lilliput"))), "the document")
    if inner.pop("v", None) != VERSION:
        raise UnsupportedArtifact(f"its version is not {VERSION}: install a newer Lilliput.")
    table = mapping(inner.pop("t", None), "the table of tensors")
    entries = {name: _from_json(value) for name, value in table.items()}
    return document_from(inner, _placed(entries, outer, 8 + len(header)))


def _from_json(value: Any) -> Entry:
    value = mapping(value, "an entry")
    numbers = integers(value.get("k"))
    dtype = value.get("d")
    return Entry(
        codec=string(value.get("c")),
        shape=integers(value.get("s")),
        dtype=string(dtype),
        stored=string(value.get("e", dtype)),
        nonzeros=integers([value.get("n")])[0],
        parts=tuple(itertools.zip_longest(numbers[::2], numbers[1::2], fillvalue=0)),
        rows=integers([value.get("r", 0)])[0],
        levels=integers([value.get("l", 0)])[0],
        book=string(value.get("b", "")),
    )


def _placed(entries: dict[str, Entry], outer: dict[str, Any], data: int) -> dict[str, Entry]:
    """Set the offsets from the safetensors header, which must tell the same as the entries."""
    if set(entries) != set(outer):
        raise CorruptArtifact("its two tables do not list the same tensors.")
    for name, entry in entries.items():
        span = integers(mapping(outer[name], name).get("data_offsets"))
        dtype, shape = _as_seen(entry)
        said = outer[name].get("dtype"), outer[name].get("shape"), span[1:]
        if len(span) != 2 or said != (dtype, list(shape), (span[0] + entry.size,)):
            raise CorruptArtifact(f"tensor {name!r}: its two entries contradict each other.")
        entries[name] = replace(entry, offset=data + span[0])
    return entries
