"""Every registered method, held to the public contract."""

from __future__ import annotations

from lilliput.core import registry
from lilliput.testing import MethodContract, registered_examples


class TestRegisteredMethods(MethodContract):
    methods = registered_examples()
    recipes = tuple(entry.path for entry in registry.entries("recipe").values() if entry.path)


def test_the_registry_is_not_empty() -> None:
    assert {"codebook", "gradual", "magnitude", "soft_targets"} <= set(registry.entries("method"))
