"""`raw` and `f16`: the symbols as they are.

Chunk: ``count`` little-endian symbols. Plain tensors keep their safetensors dtype, so that any
safetensors reader understands them. `f16` is the name for float32 values stored as float16.
"""

from __future__ import annotations

from lilliput.artifact.bits import Bytes
from lilliput.artifact.codecs._codec import Symbols


class Raw:
    """Symbols as they are."""

    def encode(self, symbols: Symbols) -> memoryview:
        """Return the symbols' own memory: nothing is copied."""
        return symbols.astype(f"<u{symbols.itemsize}", copy=False).data.cast("B")

    def decode(self, data: Bytes, count: int, itemsize: int) -> Symbols:
        """Return a view of the chunk."""
        return data.array(count, f"<u{itemsize}")
