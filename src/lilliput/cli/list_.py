"""``lilliput list``: the catalogue, read from the source text without importing torch.

The file is not named ``list``, since a module of that name would hide the builtin in this package.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from ..core import registry
from ..core.notebook import Noted, notebook
from ..core.registry import Entry
from ._print import columns, print_json, print_text

_PLURALS = {
    "methods": "method",
    "architectures": "architecture",
    "tasks": "task",
    "recipes": "recipe",
}


def list_entries(
    kind: Literal["methods", "architectures", "tasks", "recipes"] | None = None,
    /,
    *,
    papers: bool = False,
    json: bool = False,
) -> int:
    """List methods, architectures, tasks and recipes.

    Each with its family, the papers it follows, and a line on what it does.

    Args:
        kind: one of the four; by default all of them.
        papers: list the papers of the notebook instead, each with what implements it and the evidence.
        json: print one JSON object: a list of entries for each kind.
    """
    if papers:
        return _list_papers(json)
    chosen = [kind] if kind else list(_PLURALS)
    found = {plural: list(registry.entries(_PLURALS[plural]).values()) for plural in chosen}
    if json:
        print_json({plural: [as_dict(e) for e in entries] for plural, entries in found.items()})
    else:
        print_text("\n\n".join(_table(plural, entries) for plural, entries in found.items()))
    return 0


def _list_papers(json: bool) -> int:
    found = notebook()
    if json:
        print_json({"papers": [asdict(paper) for paper in found]})
        return 0
    head = ("part", "paper", "where", "implemented by", "paper test", "benchmark")
    rows = [(p.part, p.title, _where(p), ", ".join(p.code), p.test, p.benchmark) for p in found]
    print_text(columns([head, *rows]))
    return 0


def _where(paper: Noted) -> str:
    return f"{paper.venue} {paper.year or ''}".strip()


def as_dict(entry: Entry) -> dict[str, Any]:
    """An entry of the catalogue, JSON-ready."""
    return {
        "kind": entry.kind,
        "name": entry.name,
        "family": entry.family,
        "papers": [asdict(paper) for paper in entry.papers],
        "summary": entry.summary,
    }


def _table(plural: str, entries: list[Entry]) -> str:
    rows = [("  " + e.name, _family(e), _cited(e), e.summary) for e in entries]
    return f"{plural}\n{columns(rows)}" if rows else f"{plural}\n  none"


def _family(entry: Entry) -> str:
    return "" if entry.family == entry.kind else entry.family


def _cited(entry: Entry) -> str:
    """The papers as short references, for example ``Han 2015``."""
    return ", ".join(f"{_first_author(p.authors)} {p.year}" for p in entry.papers)


def _first_author(authors: str) -> str:
    return authors.removesuffix(" et al.").partition(",")[0].strip()
