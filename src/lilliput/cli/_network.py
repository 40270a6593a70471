"""The network and the inputs that a verb is given: by name, by function, or as a compressed file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import artifact, io
from ..architectures._zoo import COLLECTIONS
from ..core.recipe import ModelSettings, TaskSettings
from ..core.task import Task
from ..engine.recipes import build_model
from ..errors import InputError


def network_of(
    reference: str, weights: Path | None, verb: str
) -> tuple[nn.Module, TaskSettings | None]:
    """The network, and the task that a compressed file says it was made for.

    Raises:
        InputError: there is no such file, or it has weights of its own.
    """
    path = Path(reference)
    if path.suffix in (".safetensors", ".llp") or path.is_file():
        return _from_file(path, weights, verb)
    collection, colon, _ = reference.partition(":")
    kind = "build" if colon and collection not in COLLECTIONS else "architecture"
    settings = {kind: reference, "weights": None if weights is None else str(weights)}
    return build_model(ModelSettings.model_validate(settings)), None


def _from_file(
    path: Path, weights: Path | None, verb: str
) -> tuple[nn.Module, TaskSettings | None]:
    if not path.is_file():
        raise InputError(f"there is no file {path} to {verb}.")
    if weights is not None:
        raise InputError(f"{path} has weights of its own: give a network's name with --weights.")
    with artifact.open(path) as file:
        task = (file.recipe or {}).get("task")
    # A recipe keeps its task as settings, a run from Python only the task's name.
    return io.load(path), TaskSettings.model_validate(task) if isinstance(task, dict) else None


def inputs_of(task: Task | None, shape: str | None) -> Any:
    """One sample: of the task, or random ones of a shape; None where there is neither.

    Raises:
        InputError: the shape is none.
    """
    if shape is None:
        return None if task is None else task.example_inputs()
    sizes = shape.split(",")
    if not all(size.strip().isdigit() and int(size) for size in sizes):
        raise InputError(f"--input {shape!r} should be sizes and commas, like 1,3,224,224.")
    return torch.randn([int(size) for size in sizes], generator=torch.Generator().manual_seed(0))
