"""Lilliput makes trained PyTorch models small and fast.

The names below are imported when they are first used, so that the artifact reader works without
torch and the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import artifact, deploy, methods
    from .api import attach, build, compress, run_recipe
    from .core.method import Method
    from .core.recipe import ArtifactSettings, Recipe, Stage, Train
    from .core.registry import architecture, method, task
    from .core.task import Task, accuracy
    from .io import load, save
    from .measure import measure
    from .mechanisms.packing import remove_task, switch, tasks_of
    from .quantizing import quantize
    from .thinning import thin

__version__ = "0.1.0"

_HOMES = {
    "api": ("attach", "build", "compress", "run_recipe"),
    "core.method": ("Method",),
    "core.recipe": ("ArtifactSettings", "Recipe", "Stage", "Train"),
    "core.registry": ("architecture", "method", "task"),
    "core.task": ("Task", "accuracy"),
    "io": ("load", "save"),
    "mechanisms.packing": ("remove_task", "switch", "tasks_of"),
    "quantizing": ("quantize",),
    "thinning": ("thin",),
}
_MODULES = ("artifact", "deploy", "methods", "measure", "errors", "testing")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ArtifactSettings",
    "Method",
    "Recipe",
    "Stage",
    "Task",
    "Train",
    "accuracy",
    "architecture",
    "artifact",
    "attach",
    "build",
    "compress",
    "deploy",
    "load",
    "measure",
    "method",
    "methods",
    "quantize",
    "remove_task",
    "run_recipe",
    "save",
    "switch",
    "task",
    "tasks_of",
    "thin",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
