"""Importing packages that only some tasks need."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingDependency


def optional(module: str, package: str, purpose: str) -> Any:
    """Import a module of the extra ``data``.

    Raises:
        MissingDependency: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependency(package, "data", purpose) from error
