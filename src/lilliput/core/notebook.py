"""The papers of the notebook, and what became of each.

The list is ``notebook.yaml``; what implements a paper is read from the code's own citations, so the catalogue
cannot name what is not there.

The surprising rule: neither torch nor a method is imported.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import registry
from .registry import Entry

_FILE = Path(__file__).resolve().parents[1] / "notebook.yaml"


@dataclass(frozen=True)
class Noted:
    """A paper of the notebook, or an idea of its own.

    Attributes:
        part: of the notebook.
        title: as the notebook has it.
        year: None for the notebook's own ideas, and where it could not be confirmed.
        venue: where it appeared.
        code: names of the methods, architectures and recipes that implement it.
        test: name of its paper test, ``tests/papers/test_NAME.py``.
        benchmark: name of the benchmark that has a row of it, ``benchmarks/results/NAME.json``.
    """

    part: str
    title: str
    year: int | None
    venue: str
    code: tuple[str, ...]
    test: str
    benchmark: str


@functools.cache
def notebook() -> tuple[Noted, ...]:
    """All of it, in its order."""
    from ruamel.yaml import YAML

    parts: dict[str, list[dict[str, Any]]] = YAML(typ="safe").load(_FILE.read_text("utf-8"))
    return tuple(_noted(part, row) for part, rows in parts.items() for row in rows)


def _noted(part: str, row: dict[str, Any]) -> Noted:
    citing = _citing(row["title"])
    paper = next((p for _, p in citing), None)
    return Noted(
        part,
        row["title"] if paper is None else paper.title,
        row.get("year") if paper is None else paper.year,
        row.get("venue", "") if paper is None else paper.venue,
        tuple(row["code"]) if "code" in row else tuple(dict.fromkeys(e.name for e, _ in citing)),
        row["test"],
        row["benchmark"],
    )


def _citing(title: str) -> list[tuple[Entry, registry.Paper]]:
    """What cites a paper whose title begins so, in any spelling; methods first."""
    wanted = _plain(title)
    return [
        (entry, paper)
        for kind in ("method", "architecture")
        for entry in registry.entries(kind).values()
        for paper in entry.papers
        if _plain(paper.title).startswith(wanted)
    ]


def _plain(title: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", title.lower()))
