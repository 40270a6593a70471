"""Recipe files: YAML with line numbers in every error, overrides from the command line, and the job.

The surprising rule: YAML is read by version 1.2, so ``lr: 1e-3`` is a number and ``no`` is a word.
"""

from __future__ import annotations

import io as text_io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from torch import nn

from .. import io
from ..core import registry
from ..core.recipe import ModelSettings, Recipe, Stage, TaskSettings, Train, widened
from ..core.task import Task
from ..errors import InputError, LilliputError, RecipeError, did_you_mean
from . import distributed
from .execute import Job
from .optim import optimizer_class
from .outcome import check_codec, check_condition
from .seeds import seed_all

_Place = tuple[int | str, ...]

Place: TypeAlias = tuple[int | str, ...]


def find_recipe(reference: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a shipped one.

    Raises:
        UnknownName: it is neither.
    """
    path = Path(reference)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {path}.")
        return path
    found = registry.find("recipe", str(reference)).path
    assert found is not None
    return found


def load_recipe(reference: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        reference: a file, or the name of a shipped recipe.
        overrides: dotted ``key=value`` pairs, for example ``stages.0.train.epochs=3``.

    Raises:
        RecipeError: the file cannot be read, or a value is wrong: with file, line and place.
    """
    path = find_recipe(reference)
    content = _read_yaml(path)
    for override in overrides:
        _override(content, override)
    content.setdefault("name", path.stem)
    return validate(content, path.name)


def validate(content: Any, where: str = "recipe") -> Recipe:
    """Check a recipe's content: its form, and that every name in it is known.

    Raises:
        RecipeError: the first thing that is wrong, with its place.
    """
    try:
        recipe = Recipe.model_validate(content)
    except pydantic.ValidationError as error:
        raise RecipeError(_explain(error, content, where)) from error
    for place, check in _checks(recipe):
        try:
            check()
        except InputError as error:
            raise RecipeError(
                f"{_line(content, place, where)} {_dotted(place)}: {error}"
            ) from error
    return recipe


def _checks(recipe: Recipe) -> Iterator[tuple[Place, Callable[[], Any]]]:
    """What can be checked without building anything, and where it stands."""
    yield ("task",), partial(_check_reference, "task", recipe.task.name)
    yield ("model",), partial(_check_network, recipe.model)
    for number, stage in enumerate(recipe.stages):
        place = ("stages", number, "train", "optimizer")
        yield place, partial(optimizer_class, stage.train.optimizer)
        if isinstance(stage.model, ModelSettings):
            yield ("stages", number, "model"), partial(_check_network, stage.model)
    yield ("artifact", "codec"), partial(check_codec, recipe.artifact.codec)
    yield ("device",), partial(distributed.device_of, recipe.device)
    for name, condition in recipe.expect.items():
        yield ("expect", name), partial(check_condition, name, condition)


def _check_reference(kind: str, name: str) -> None:
    """A registered name must exist; ``package.module:function`` is imported only when it is built."""
    if ":" not in name:
        registry.find(kind, name)


def _check_network(settings: ModelSettings) -> None:
    """An architecture must exist, here or in the package that it names; nothing else is imported."""
    if settings.architecture is not None and ":" in settings.architecture:
        registry.load("architecture", settings.architecture)
    elif settings.architecture is not None:
        registry.find("architecture", settings.architecture)


def build_job(recipe: Recipe) -> Job:
    """Build a recipe's model and tasks.

    The network is initialized from the recipe's seed, so the same recipe starts from the same weights.
    """
    seed_all(recipe.seed, "model", deterministic=recipe.deterministic)
    tasks = {n: _build_stage_task(s) for n, s in enumerate(recipe.stages) if s.task is not None}
    model = build_model(recipe.model)
    return Job(
        model=model,
        task=build_task(recipe.task),
        stages=recipe.stages,
        description=recipe.model_dump(mode="json", exclude_none=True),
        seed=recipe.seed,
        device=distributed.device_of(recipe.device),
        deterministic=recipe.deterministic,
        threads=recipe.threads,
        artifact=recipe.artifact,
        expect=recipe.expect,
        stage_tasks=tasks,
        stage_models=build_stage_models(recipe.stages),
        build=build_network,
    )


def build_stage_models(stages: Sequence[Stage]) -> dict[int, nn.Module]:
    """The networks of the stages that bring their own, by the stages' numbers."""
    return {
        number: build_model(s.model) if isinstance(s.model, ModelSettings) else s.model
        for number, s in enumerate(stages)
        if s.model is not None
    }


def build_model(settings: ModelSettings) -> nn.Module:
    """Build the network that a recipe names, and fill it with weights where it says so."""
    if settings.architecture is not None:
        make = registry.load("architecture", settings.architecture)
    else:
        make = registry.import_object(settings.build or "")
    try:
        model = make(**settings.arguments)
    except TypeError as error:
        named = settings.architecture or settings.build
        raise InputError(f"{named} cannot be built with {settings.arguments}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{settings.build} returned {type(model).__name__}, not a torch module.")
    if settings.weights:
        return io.load_weights(model, os.path.expandvars(settings.weights))
    return model


def build_network(reference: Any) -> nn.Module:
    """A network from a reference in a method's settings: an artifact's path, or a model's settings."""
    if isinstance(reference, str) and Path(reference).exists():
        return io.load(reference)
    if isinstance(reference, str):
        raise InputError(f"there is no file {reference!r} to load a network from.")
    try:
        settings = ModelSettings.model_validate(widened(ModelSettings, "architecture", reference))
    except pydantic.ValidationError as error:
        raise InputError(
            f"{reference!r} does not say which network: give 'original', a file, a module, or "
            "{architecture: NAME}."
        ) from error
    return build_model(settings)


def build_task(settings: TaskSettings) -> Task:
    """Build the task that a recipe names."""
    if ":" in settings.name:
        make = registry.import_object(settings.name)
    else:
        make = registry.load("task", settings.name)
    try:
        task = make(**settings.arguments)
    except TypeError as error:
        raise InputError(f"the task {settings.name} cannot be built: {error}") from error
    if not isinstance(task, Task):
        raise InputError(f"{settings.name} returned {type(task).__name__}, not a lilliput.Task.")
    return task


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, without what is left at its default."""
    out = text_io.StringIO()
    yaml = YAML()
    yaml.width = 100
    yaml.dump(recipe.model_dump(mode="json", exclude_defaults=True) | {"version": 1}, out)
    return out.getvalue()


def _build_stage_task(stage: Stage) -> Task:
    if isinstance(stage.task, Task):
        return stage.task
    return build_task(TaskSettings.model_validate(widened(TaskSettings, "name", stage.task)))


def _read_yaml(path: Path) -> CommentedMap:
    try:
        content = YAML().load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, CommentedMap):
        raise RecipeError(f"{path} should hold a mapping with the keys task, model and stages.")
    return content


def _override(content: Any, override: str) -> None:
    """Set one dotted key; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"the override {override!r} should have the form key=value.")
    value = _yaml_or_text(text)
    *path, last = key.split(".")
    node: Any = content
    for part in path:
        node = _descend(node, part, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"the override {override!r} leads into {node!r}, which has no keys.")


def _yaml_or_text(text: str) -> Any:
    """A value from the command line; ``>= 40`` is no YAML without quotes, and meant as text."""
    try:
        return YAML(typ="safe").load(text)
    except YAMLError:
        return text


def _descend(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if not isinstance(node, dict):
        raise RecipeError(f"the override {override!r} leads into {node!r}, which has no keys.")
    if isinstance(node.get(part), str):  # task: digits, and then task.batch_size=64
        key = {"task": "name", "model": "architecture"}.get(part)
        node[part] = CommentedMap({key: node[part]}) if key else node[part]
    return node.setdefault(part, CommentedMap())


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(
            f"the override {override!r}: {part!r} is not one of 0 to {len(node) - 1}."
        )
    return int(part)


def _explain(error: pydantic.ValidationError, content: Any, where: str) -> str:
    details = [(_written(detail, content), detail) for detail in error.errors()]
    lines: dict[_Place, str] = {}
    for place, detail in details:
        if not _outdone(place, detail, details):
            inner = (detail.get("ctx") or {}).get("error")
            known = isinstance(inner, LilliputError)
            message = str(inner) if known else _message(detail, place, content)
            lines.setdefault(place, f"{_line(content, place, where)} {_dotted(place)}: {message}")
    return "\n".join(lines.values())


def _written(detail: Any, content: Any) -> _Place:
    """The place as the recipe writes it, without the names that pydantic gives a union's options."""
    place: list[int | str] = []
    node = content
    for part in detail["loc"]:
        inside = part in node if isinstance(node, dict) else isinstance(node, list)
        if inside:
            node = node[part]
        if inside or detail["type"] in ("missing", "extra_forbidden"):
            place.append(part)
    return tuple(place)


def _outdone(place: _Place, detail: Any, details: list[tuple[_Place, Any]]) -> bool:
    """Whether another option of the union fits the value's type, and says what is wrong with it."""
    if not detail["type"].endswith("_type"):
        return False
    others = (p for p, d in details if not d["type"].endswith("_type"))
    return any(other[: len(place)] == place for other in others)


def _message(detail: Any, place: _Place, content: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown.{did_you_mean(str(place[-1]), _siblings(place, content))}"
    if detail["type"] == "missing":
        return "missing."
    text = detail["msg"].removeprefix("Value error, ")
    given = detail.get("input")
    shown = f" It is {given!r}." if isinstance(given, int | float | str | bool) else ""
    return f"{text[0].lower()}{text[1:]}.{shown}"


def _siblings(place: _Place, content: Any) -> list[str]:
    """The keys that are known beside an unknown one."""
    inside = [p for p in place[:-1] if isinstance(p, str)]
    if "train" in inside:
        return list(Train.model_fields)
    if "methods" in inside:
        return _settings_of_method(place, content)
    if inside[:1] == ["stages"]:
        return list(Stage.model_fields)
    named = {"task": TaskSettings, "model": ModelSettings}
    if inside and inside[0] in Recipe.model_fields:
        annotation = named.get(inside[0]) or Recipe.model_fields[inside[0]].annotation
        return list(getattr(annotation, "model_fields", {}))
    return list(Recipe.model_fields)


def _settings_of_method(place: _Place, content: Any) -> list[str]:
    stage, _, number = place[1:4]
    method = content["stages"][stage]["methods"][number]["method"]
    fields = registry.load("method", method).model_fields
    if len(place) == 5:
        return list(fields)
    annotation = fields[str(place[4])].annotation  # settings of their own, such as a schedule
    return list(getattr(annotation, "model_fields", {}))


def _line(content: Any, place: tuple[int | str, ...], where: str) -> str:
    """``file:line`` of the deepest part of the place that the file has."""
    line, node = None, content
    for part in place:
        if isinstance(node, CommentedMap) and part in node:
            # What an override has added has no line of its own.
            line = node.lc.key(part)[0] if part in (node.lc.data or ()) else line
            node = node[part]
        elif isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
            line = node.lc.item(part)[0]
            node = node[part]
    return where if line is None else f"{where}:{line + 1}"


def _dotted(place: tuple[int | str, ...]) -> str:
    return ".".join(map(str, place)) or "recipe"
