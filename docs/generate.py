"""Write docs/methods/*.md, one page a method, from the docstrings and fields of the code."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lilliput.core import registry

FOLDER = Path(__file__).parent / "methods"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    entries = registry.entries("method")
    for path in FOLDER.glob("*.md"):
        path.unlink()
    for entry in entries.values():
        (FOLDER / f"{entry.name}.md").write_text(page(entry), encoding="utf-8")
    (FOLDER / "README.md").write_text(index(entries), encoding="utf-8")
    print(f"{len(entries)} pages in {FOLDER}")


def page(entry: registry.Entry) -> str:
    cls = entry.load()
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    title, _, body = text.partition("\n")
    parts = [f"# `{entry.name}`", title, body.strip(), "## Settings", settings(cls)]
    return "\n\n".join(parts) + "\n"


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
