"""Packs in compressed files: the tasks of a network beside the weights that they share.

The backbone's weights lie under their ordinary names, whole, and so do the tensors that are no task's own.
Beside them are, each entropy-coded like any other tensor::

    tasks/owners/NAME      which task a weight belongs to, 0 for nobody
    tasks/2/mask/NAME      which weights the second task sees
    tasks/2/own/NAME       a tensor of the second task's own

and ``structure.tasks`` has the kind, the names in their order, which one the network was, and the names of
the tensors that a task has for itself. What is said here of the file is in ``docs/artifact-format.md`` too.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact import Coded
from ..errors import CorruptArtifact, InputError
from .packing import Pack

_PREFIX = "tasks/"
#: Codes are bytes.
MOST_TASKS = 255


def describe(pack: Pack) -> dict[str, Any]:
    """What the file's structure says of the tasks."""
    return {
        "kind": pack.kind,
        "names": list(pack.tasks),
        "current": pack.current,
        "own": sorted(pack.own[pack.current]),
    }


def parts(pack: Pack) -> dict[str, np.ndarray | Coded]:
    """The tensors of a pack beside the weights that its tasks share."""
    found: dict[str, np.ndarray | Coded] = {}
    for name, owner in pack.owners.items():
        found[f"{_PREFIX}owners/{name}"] = _coded(owner)
    for number, task in enumerate(pack.tasks, 1):
        for name, mask in pack.masks.get(task, {}).items():
            found[f"{_PREFIX}{number}/mask/{name}"] = _coded(mask)
        if task != pack.current:
            for name, tensor in pack.own[task].items():
                found[f"{_PREFIX}{number}/own/{name}"] = _array(tensor)
    return found


def opened(
    state: dict[str, Tensor], described: Any, path: str | PathLike[str], task: str | None
) -> tuple[dict[str, Tensor], Pack | None]:
    """The tensors of a file as one of its tasks sees them, and its pack.

    Args:
        state: all tensors of the file.
        described: its ``structure.tasks``, or None.
        path: for errors.
        task: which task; None for the one that the network was.

    Raises:
        CorruptArtifact: what the file says of its tasks does not hold together.
        UnknownName: it has no such task.
        InputError: it has no tasks, and one was asked for.
    """
    if described is None:
        if task is not None:
            raise InputError(
                f"{path} has no tasks, so it cannot be loaded as {task!r}: leave task out."
            )
        return state, None
    try:
        pack, plain = _pack(state, described)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptArtifact(
            f"{path}: what the file says of its tasks cannot be ({type(error).__name__}: {error}). Get it "
            "again from its source, or save the model again."
        ) from error
    chosen = pack.current if task is None else task
    seen = pack.state(chosen)
    return {**plain, **seen}, replace(pack, current=chosen)


def _pack(state: dict[str, Tensor], described: dict[str, Any]) -> tuple[Pack, dict[str, Tensor]]:
    kind, names, current = described["kind"], described["names"], described["current"]
    _sound(kind in ("owners", "masks"), f"kind {kind!r:.40}")
    _sound(isinstance(names, list) and all(isinstance(n, str) for n in names), "names")
    _sound(len(set(names)) == len(names) <= MOST_TASKS and current in names, "names")
    plain = {name: t for name, t in state.items() if not name.startswith(_PREFIX)}
    owners = _under(state, "owners/", plain)
    masks, own = {}, {}
    for number, name in enumerate(names, 1):
        masks[name] = {n: t > 0 for n, t in _under(state, f"{number}/mask/", plain).items()}
        own[name] = _under(state, f"{number}/own/", None)
    backbone = owners or masks[current]
    _sound(all(masks[n].keys() == backbone.keys() for n in names if kind == "masks"), "masks")
    _sound(bool(backbone) and all(float(o.max()) <= len(names) for o in owners.values()), "owners")
    theirs = set(described["own"])
    own[current] = {name: plain[name] for name in theirs}
    _sound(all(set(tensors) == theirs for tensors in own.values()), "own tensors")
    return Pack(
        kind, tuple(names), current, {n: plain[n] for n in backbone},
        {n: o.to(torch.uint8) for n, o in owners.items()}, masks if kind == "masks" else {}, own,
        {n: t for n, t in plain.items() if n not in backbone and n not in theirs},
    ), plain  # fmt: skip


def _under(
    state: dict[str, Tensor], prefix: str, like: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that; of the shapes of others of the same names."""
    whole = _PREFIX + prefix
    found = {name.removeprefix(whole): t for name, t in state.items() if name.startswith(whole)}
    _sound(
        like is None
        or all(name in like and like[name].shape == t.shape for name, t in found.items()),
        prefix,
    )
    return found


def _sound(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _coded(marks: Tensor) -> Coded:
    """Small integers; the most frequent is code 0, which the sparse codecs leave out."""
    return Coded.of(_array(marks), frequent_first=True)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().contiguous().numpy()
    return array
