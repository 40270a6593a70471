"""What the verbs print: results on stdout, everything else on stderr.

Tables are aligned plainly, so that they cost no import and reach a pipe or a log as they are. Of
the processes that torchrun starts, only the first prints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def leads() -> bool:
    """Whether this process speaks for its group: alone, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    import json

    if leads():
        print(json.dumps(content, indent=2, ensure_ascii=False, default=str), flush=True)


def print_text(text: str = "") -> None:
    """A result on stdout."""
    if leads():
        print(text, flush=True)


def note(text: str) -> None:
    """A remark on stderr."""
    if leads():
        print(text, file=sys.stderr, flush=True)


def columns(rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """Rows as aligned columns, two spaces apart.

    Args:
        rows: cells, as many in each row.
        right: numbers of the columns that are aligned to the right.

    Example:
        >>> print(columns([("a", 1), ("bcd", 23)], right=[1]))
        a     1
        bcd  23
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
