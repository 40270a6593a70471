"""Raw deflate (RFC 1951), and an inflate that cannot be pushed beyond the given size."""

from __future__ import annotations

import zlib

from lilliput.errors import CorruptArtifact

HUFFMAN_ONLY = zlib.Z_HUFFMAN_ONLY
DEFAULT = zlib.Z_DEFAULT_STRATEGY


def deflate(data: bytes, strategy: int) -> bytes:
    """Compress; zlib and its forks may return different bytes that inflate to the same data."""
    level = 1 if strategy == HUFFMAN_ONLY else 9
    coder = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    return coder.compress(data) + coder.flush()


def inflate(data: bytes | memoryview, size: int) -> bytes:
    """Decompress to exactly `size` bytes, using all of `data`.

    Raises:
        CorruptArtifact: when the stream is broken, or of another length.
    """
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        out = coder.decompress(data, size + 1)  # 0 would mean "no limit"
    except zlib.error as error:
        raise CorruptArtifact(f"a deflate stream is broken ({error}).") from error
    if len(out) != size or not coder.eof or coder.unused_data:
        raise CorruptArtifact(f"a deflate stream does not hold exactly {size} bytes.")
    return out
