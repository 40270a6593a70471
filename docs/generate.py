"""Write docs/methods/*.md, one page a method, and the README's list, from the docstrings of the code."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lilliput.core import registry
from lilliput.core.notebook import Noted, notebook

FOLDER = Path(__file__).parent / "methods"
README = FOLDER.parents[1] / "README.md"
BEGIN, END = "<!-- methods, by docs/generate.py -->\n", "<!-- end of methods -->"
FAMILIES = {
    "distill": "learn from a teacher",
    "prune": "remove weights or channels",
    "factorize": "products of thinner layers",
    "quantize": "fewer values",
    "grow": "start from an earlier network",
    "multitask": "several tasks in one network",
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    entries = registry.entries("method")
    for path in FOLDER.glob("*.md"):
        path.unlink()
    for entry in entries.values():
        (FOLDER / f"{entry.name}.md").write_text(page(entry), encoding="utf-8")
    (FOLDER / "README.md").write_text(index(entries), encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    text = before + BEGIN + overview(entries) + END + rest.partition(END)[2]
    README.write_text(text, encoding="utf-8")
    (FOLDER.parent / "papers.md").write_text(papers(), encoding="utf-8")
    print(f"{len(entries)} pages in {FOLDER}")


def page(entry: registry.Entry) -> str:
    cls = entry.load()
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    title, _, body = text.partition("\n")
    parts = [f"# `{entry.name}`", title, body.strip(), "## Settings", settings(cls)]
    return "\n\n".join(parts) + "\n"


def overview(entries: dict[str, registry.Entry]) -> str:
    """A row a family: its methods, linked, with author and year."""
    rows = ["| family | methods |", "|---|---|"]
    for family, meaning in FAMILIES.items():
        links = [link(entry) for entry in entries.values() if entry.family == family]
        rows.append(f"| {family}: {meaning} | {' · '.join(links)} |")
    return "\n".join(rows) + "\n"


def papers() -> str:
    """The notebook's catalogue, as ``lilliput list --papers`` has it."""
    rows = [
        f"| {p.part} | {p.title} | {p.venue} {p.year or ''} | {', '.join(f'`{c}`' for c in p.code)} | "
        f"{evidence(p)} |"
        for p in notebook()
    ]
    head = ["| part | paper | where | implemented by | evidence |", "|---|---|---|---|---|"]
    text = "The papers of the notebook that Lilliput grew from. Written by docs/generate.py."
    return "\n".join(["# Papers", "", text, "", *head, *rows]) + "\n"


def evidence(paper: Noted) -> str:
    """Its paper test, and its benchmark's results where they have been committed."""
    found = [f"[test](../tests/papers/test_{paper.test}.py)"] if paper.test else []
    results = FOLDER.parents[1] / "benchmarks" / "results" / f"{paper.benchmark}.json"
    if results.exists():
        found.append(f"[rows](../benchmarks/results/{results.name})")
    return ", ".join(found)


def link(entry: registry.Entry) -> str:
    paper = entry.papers[0]
    first = paper.authors.partition(",")[0]
    return f"[`{entry.name}`](docs/methods/{entry.name}.md) ({first} {paper.year})"


def settings(cls: Any) -> str:
    described = attributes(inspect.getdoc(cls) or "")
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else f"`{default!r}`"
        rows.append(f"| `{name}` | {shown.replace('|', '&#124;')} | {described.get(name, '')} |")
    return "\n".join(rows)


def attributes(doc: str) -> dict[str, str]:
    """The entries of a Google-style Attributes section."""
    found: dict[str, str] = {}
    section = doc.partition("Attributes:\n")[2].partition("\n\n")[0]
    name = ""
    for line in inspect.cleandoc(section).splitlines():
        if not line.startswith(" ") and ": " in line:
            name, _, text = line.partition(": ")
            found[name] = text
        elif name:
            found[name] += " " + line.strip()
    return found


def index(entries: dict[str, registry.Entry]) -> str:
    rows = ["# Methods", "", "| method | family | paper |", "|---|---|---|"]
    for entry in entries.values():
        papers = "; ".join(map(str, entry.papers))
        rows.append(
            f"| [`{entry.name}`]({entry.name}.md): {entry.summary} | {entry.family} | {papers} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
