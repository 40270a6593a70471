"""An instance of each registered method: what the contract runs it with."""

from __future__ import annotations

from ..core import registry
from ..core.method import Method


def registered_examples() -> list[Method]:
    """An example of every registered method, by name."""
    return [entry.load().example() for entry in registry.entries("method").values()]
