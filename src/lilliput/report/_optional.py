"""Importing the packages of the extra ``report``."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingDependency


def optional(module: str) -> Any:
    """Import a module that the HTML page needs.

    Raises:
        MissingDependency: the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependency(package, "report", "the HTML report") from error
