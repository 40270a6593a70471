"""``lilliput validate``: a recipe's mistakes, found without training and without reading data."""

from __future__ import annotations

import inspect
from typing import Any

from ..core import registry
from ..core.recipe import Recipe
from ..engine.recipes import load_recipe, to_yaml
from ..errors import InputError
from ._print import print_json, print_text


def validate(recipe: str, /, *overrides: str, json: bool = False) -> int:
    """Check a recipe, and print what it resolves to.

    Neither data nor weights are read. The YAML that is printed leaves out what is at its default;
    the JSON holds every setting.

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: dotted key=value pairs, for example stages.0.train.epochs=3.
        json: print the resolved recipe as one JSON object.
    """
    settings = load_recipe(recipe, overrides)
    check_names(settings, recipe)
    if json:
        print_json(settings.model_dump(mode="json"))
    else:
        print_text(to_yaml(settings).rstrip())
    return 0


def check_names(settings: Recipe, where: str) -> None:
    """Check that the task and the network exist and take the arguments.

    Raises:
        UnknownName: nothing has the name.
        InputError: an argument is missing or unknown.
    """
    task, model = settings.task, settings.model
    is_reference = ":" in task.name
    make = registry.import_object(task.name) if is_reference else registry.load("task", task.name)
    _check(make, task.name, task.arguments, where)
    if model.architecture is not None:
        make = registry.load("architecture", model.architecture)
    else:
        make = registry.import_object(model.build or "")
    _check(make, model.architecture or model.build or "", model.arguments, where)


def _check(make: Any, name: str, arguments: dict[str, Any], where: str) -> None:
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(make).parameters) or "none"
        raise InputError(f"{where}: {name}: {error}. Its arguments: {known}.") from error
