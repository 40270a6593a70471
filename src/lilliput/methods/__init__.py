"""One paper, one file. A listing of each family's folder is a list of papers.

``from lilliput.methods import Magnitude`` finds a method's class by its name, wherever its file is.
"""

from typing import Any

from ..core import registry

__all__ = sorted(entry.attribute for entry in registry.entries("method").values())


def __getattr__(name: str) -> Any:
    for entry in registry.entries("method").values():
        if entry.attribute == name:
            return entry.load()
    raise AttributeError(f"no method's class is named {name!r}")
