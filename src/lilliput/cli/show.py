"""``lilliput show``: whatever has a name, and compressed files.

Recipes and compressed files are shown without importing torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import registry
from ..core.registry import KINDS, Entry
from ..errors import InputError, UnknownName
from ._print import print_json, print_text

_RECIPE = (".yaml", ".yml")
_ARTIFACT = (".safetensors", ".llp")


def show(name: str, /, *, verify: bool = False, json: bool = False) -> int:
    """Explain a method, architecture, task, recipe or compressed file.

    Args:
        name: a name from lilliput list, or a file.
        verify: check every checksum of a compressed file and decode all of it.
        json: print one JSON object.
    """
    content, text = _file(Path(name), verify) if _is_file(name) else _named(name, verify)
    if json:
        print_json(content)
    else:
        print_text(text)
    return 0


def _is_file(name: str) -> bool:
    path = Path(name)
    return path.suffix in (*_RECIPE, *_ARTIFACT) or path.is_file()


def _file(path: Path, verify: bool) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    if path.suffix in _RECIPE:
        return _recipe(path.stem, path)
    from ._artifact import describe, render

    content = describe(path, verify=verify)
    return content, render(content)


def _named(name: str, verify: bool) -> tuple[dict[str, Any], str]:
    if verify:
        raise InputError(f"--verify checks a compressed file, and there is no file {name}.")
    entry = _entry(name)
    if entry.path is not None and entry.kind == "recipe":
        return _recipe(name, entry.path)
    from ._entry import describe, render

    content = describe(entry)
    return content, render(content)


def _entry(name: str) -> Entry:
    for kind in KINDS:
        try:
            return registry.find(kind, name)
        except UnknownName:
            continue
    known = [known for kind in KINDS for known in registry.entries(kind)]
    raise UnknownName("method, architecture, task, recipe or file", name, known)


def _recipe(name: str, path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file: {error}.") from error
    return {"kind": "recipe", "name": name, "path": str(path), "yaml": text}, text
