"""Minimal settings of each registered method: what the contract runs it with."""

from __future__ import annotations

from typing import Any

from ..core import registry
from ..core.method import Method

# Methods that cannot be built without arguments.
_SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.5},
    "gradual": {"sparsity": 0.5},
}


def example(cls: type[Method]) -> Method:
    """A method with few settings, fit for a tiny network."""
    return cls(**_SETTINGS.get(cls.method_name(), {}))


def registered_examples() -> list[Method]:
    """An example of every registered method, by name."""
    return [example(entry.load()) for entry in registry.entries("method").values()]
