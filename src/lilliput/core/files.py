"""Files that appear whole or not at all: they are written under another name, and renamed."""

from __future__ import annotations

import os
from pathlib import Path


def unfinished(path: Path) -> Path:
    """Where to write a file before it is renamed; each process has a name of its own.

    Example:
        >>> unfinished(Path("runs/page.html")).parent.name
        'runs'
    """
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
