"""Names: which methods, architectures, tasks and recipes exist, and how to get one.

The catalogue is read from the source text, so that listing it imports neither torch nor any method:
a class or function decorated with ``@method``, ``@architecture`` or ``@task`` is an entry, its name is
the function's, or the class's in snake_case, its family is its folder, its summary the first line of
its docstring, and each ``Paper:`` paragraph of its module's docstring cites a source::

    Paper: Title (Authors; Venue 2015; arXiv 1506.02626)

The same decorators register what other packages or a notebook define; installed packages announce
their modules through the entry-point group ``lilliput``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError, UnknownName

KINDS = ("method", "architecture", "task", "recipe")
_HOME = Path(__file__).resolve().parent.parent
_FOLDERS = {"method": "methods", "architecture": "architectures", "task": "tasks"}
_ENTRY = re.compile(r"^@(method|architecture|task)\n(?:class|def) (\w+)", re.MULTILINE)
_PAPER = re.compile(
    r"Paper:\s+(?P<title>.+?)\s+\((?P<authors>[^;()]+);\s+(?P<venue>[^;]+?)\s+(?P<year>\d{4})"
    r"(?:;\s+(?P<link>[^)]+))?\)",
    re.DOTALL,
)
F = TypeVar("F", bound=Callable[..., Any])
_announced: dict[tuple[str, str], Entry] = {}


@dataclass(frozen=True)
class Paper:
    """A citation as the catalogue shows it."""

    title: str
    authors: str
    venue: str
    year: int
    link: str = ""

    def __str__(self) -> str:
        tail = f", {self.link}" if self.link else ""
        return f"{self.authors}: {self.title}. {self.venue} {self.year}{tail}"


@dataclass(frozen=True)
class Entry:
    """One thing that can be asked for by name."""

    kind: str
    name: str
    module: str
    attribute: str
    family: str
    summary: str
    papers: tuple[Paper, ...]
    path: Path | None = None

    def load(self) -> Any:
        """Import and return the class or function."""
        return getattr(importlib.import_module(self.module), self.attribute)


def method(cls: F) -> F:
    """Register a :class:`~lilliput.core.method.Method` class under its name in snake_case."""
    return _announce("method", cls)


def task(function: F) -> F:
    """Register a function that makes a :class:`~lilliput.core.task.Task`."""
    return _announce("task", function)


def architecture(function: F) -> F:
    """Register a function that builds a network, and let the network remember how it was built.

    The name and arguments are what the artifact stores, so that ``lilliput.load`` can rebuild it;
    they must therefore be plain JSON values.
    """

    @functools.wraps(function)
    def build(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()  # a later change of a default must not change old artifacts
        model = function(*args, **kwargs)
        model.lilliput_origin = {"architecture": name, "arguments": dict(bound.arguments)}
        return model

    name = function.__name__
    _announce("architecture", function)
    return build  # type: ignore[return-value]


def entries(kind: str) -> dict[str, Entry]:
    """All entries of one kind, by name, shipped ones and announced ones."""
    if kind not in KINDS:
        raise UnknownName("kind of entry", kind, KINDS)
    shipped = _shipped_recipes() if kind == "recipe" else _scan(kind)
    return dict(
        sorted({**shipped, **{n: e for (k, n), e in _announced.items() if k == kind}}.items())
    )


def find(kind: str, name: str) -> Entry:
    """The entry of that name.

    Raises:
        UnknownName: no entry has it; the message names the nearest.
    """
    known = entries(kind)
    if name not in known:
        _load_plugins()
        known = entries(kind)
    if name not in known:
        raise UnknownName(kind, name, known)
    return known[name]


def load(kind: str, name: str) -> Any:
    """Import what is registered under that name.

    An architecture may also be one of another package, ``timm:resnet18``; see
    :mod:`lilliput.architectures._zoo`.

    Raises:
        UnknownName: no entry has it; the message names the nearest.
        MissingDependency: the other package is not installed.
    """
    if kind == "architecture" and ":" in name:
        return importlib.import_module("lilliput.architectures._zoo").builder(name)
    return find(kind, name).load()


def import_object(reference: str) -> Any:
    """Import ``package.module:attribute``, the user's own model or task.

    Raises:
        InputError: no such module or attribute, or the reference has another form.
    """
    module, separator, attribute = reference.partition(":")
    if not separator:
        raise InputError(f"{reference!r} should have the form package.module:function.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise InputError(
            f"cannot import {module!r} for {reference!r}: {error}. Is its folder on PYTHONPATH, "
            "or the command started beside it?"
        ) from error
    except AttributeError as error:
        raise InputError(f"the module {module!r} has no {attribute!r}.") from error


def _announce(kind: str, thing: F) -> F:
    name = _snake(thing.__name__)
    if thing.__module__.startswith("lilliput.") and not thing.__module__.startswith(
        "lilliput.testing"
    ):
        return thing  # shipped entries are found in the source text
    module_doc = getattr(inspect.getmodule(thing), "__doc__", None) or ""
    _announced[kind, name] = Entry(
        kind=kind,
        name=name,
        module=thing.__module__,
        attribute=thing.__name__,
        family=getattr(thing, "family", "") or kind,
        summary=(thing.__doc__ or "").strip().partition("\n")[0],
        papers=_papers(module_doc),
    )
    return thing


@functools.cache
def _load_plugins() -> None:
    import importlib.metadata  # costs 17 ms, a fifth of what `lilliput list` takes

    for point in importlib.metadata.entry_points(group="lilliput"):
        point.load()


@functools.cache
def _scan(kind: str) -> dict[str, Entry]:
    folder = _HOME / _FOLDERS[kind]
    found: dict[str, Entry] = {}
    for path in sorted(folder.rglob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        for match in _ENTRY.finditer(text):
            if match[1] == kind:
                entry = _entry(kind, match[2], path, text, match.end())
                found[entry.name] = entry
    return found


def _entry(kind: str, attribute: str, path: Path, text: str, after: int) -> Entry:
    parts = path.relative_to(_HOME).with_suffix("").parts
    docstring = text.find('"""', after)
    end = re.compile(r'\n|"""').search(text, docstring + 3) if docstring >= 0 else None
    return Entry(
        kind=kind,
        name=_snake(attribute),
        module=".".join(("lilliput", *parts)),
        attribute=attribute,
        family=parts[1] if len(parts) > 2 else kind,
        summary=text[docstring + 3 : end.start()].strip() if end else "",
        papers=_papers(text[: text.find('"""', 3)]),
        path=path,
    )


def _papers(doc: str) -> tuple[Paper, ...]:
    def tidy(value: str | None) -> str:
        return " ".join((value or "").split())

    return tuple(
        Paper(
            tidy(m["title"]), tidy(m["authors"]), tidy(m["venue"]), int(m["year"]), tidy(m["link"])
        )
        for m in _PAPER.finditer(doc)
    )


@functools.cache
def _shipped_recipes() -> dict[str, Entry]:
    found = {}
    for path in sorted((_HOME / "recipes").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        summary = first.lstrip("# ").strip() if first.startswith("#") else ""
        found[path.stem] = Entry("recipe", path.stem, "", "", "recipe", summary, (), path)
    return found


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
