"""Importing packages that only some features need."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingDependency


def optional(module: str, package: str, extra: str, purpose: str) -> Any:
    """Import a module of one of Lilliput's extras.

    Args:
        module: dotted name.
        package: what to install for it.
        extra: of Lilliput, which brings it.
        purpose: what needs it, for the error.

    Raises:
        MissingDependency: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependency(package, extra, purpose) from error
