"""A file's header: which of the two containers it is, and whether all of it holds together.

Both containers hold the same *document* (the entries of the tensors and the caller's sections) and
the same payloads; a reader tells them apart by the first bytes. ``docs/artifact-format.md`` is the
specification. The surprising rule: every size is compared with the file's own before anything is
allocated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import BinaryIO

from lilliput.artifact import container_compact as compact
from lilliput.artifact import container_safetensors as ordinary
from lilliput.artifact.entries import Document, Entry, check
from lilliput.errors import CorruptArtifact, UnsupportedArtifact

#: Features that this reader knows; a file may require none yet.
FEATURES: frozenset[str] = frozenset()
#: Bytes at the beginning of a file that tell what it is.
PEEK = 8 + len(ordinary.SEAL)


def seal(document: Document, profile: str) -> tuple[bytes, list[str]]:
    """The header of a file, CRC included, and the names in the order of their payloads."""
    return compact.seal(document) if profile == "compact" else ordinary.seal(document)


def begins_like_artifact(start: bytes) -> bool:
    """Whether the first `PEEK` bytes of a file are those of either profile."""
    return start.startswith(compact.MAGIC) or start[8:].startswith(ordinary.SEAL)


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
    if start.startswith(compact.MAGIC):
        profile, read = "compact", compact.unseal
    elif start[8:].startswith(b'{"'):
        profile, read = "safetensors", ordinary.unseal
    else:
        raise UnsupportedArtifact(f"this is no Lilliput artifact: {_looks_like(start)}.")
    file.seek(0)
    document, header = read(file, size)
    document = replace(document, entries=_checked(document.entries, header, size))
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


def _checked(entries: dict[str, Entry], header: int, size: int) -> dict[str, Entry]:
    for name, entry in entries.items():
        try:
            check(entry, entries)
        except CorruptArtifact as error:
            raise CorruptArtifact(f"tensor {name!r}: {error}") from None
    end = max((entry.offset + entry.size for entry in entries.values()), default=None)
    for name, entry in entries.items():
        if entry.offset + entry.size > size:
            raise CorruptArtifact(f"truncated: {size} bytes of {end}, which cuts tensor {name!r}.")
    payloads = sorted((entry.offset, entry.size) for entry in entries.values())
    _check_layout([(0, header), *payloads], size)
    return entries


def _check_layout(spans: list[tuple[int, int]], size: int) -> None:
    """Header and payloads follow each other without hole or overlap, up to the end of the file."""
    following = [offset for offset, _ in spans[1:]] + [size]
    for (offset, length), after in zip(spans, following, strict=True):
        if offset + length != after:
            raise CorruptArtifact(
                f"bytes {offset + length} to {after} belong to no tensor, or to two."
            )
