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

from ..artifact import BFloat16, Coded
from ..errors import CorruptArtifact, InputError
from .arrays import to_numpy
from .packing import Pack, Tensors

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


def parts(pack: Pack) -> dict[str, np.ndarray | Coded | BFloat16]:
    """The tensors of a pack beside the weights that its tasks share."""
    found: dict[str, np.ndarray | Coded | BFloat16] = {}
    for name, owner in pack.owners.items():
        found[f"{_PREFIX}owners/{name}"] = _coded(owner)
    for number, task in enumerate(pack.tasks, 1):
        for name, mask in pack.masks.get(task, {}).items():
            found[f"{_PREFIX}{number}/mask/{name}"] = _coded(mask)
        if task != pack.current:
            for name, tensor in pack.own[task].items():
                found[f"{_PREFIX}{number}/own/{name}"] = to_numpy(tensor)
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


def completed(pack: Pack, filled: Tensors) -> Pack:
    """A file's pack with all tensors of the network that it has filled: of some the file has factors."""
    apart = pack.weights.keys() | pack.own[pack.current].keys()
    known = {n: pack.shared.get(n, t) for n, t in filled.items() if n not in apart}
    return replace(pack, shared={n: t.detach().clone() for n, t in known.items()})


def _pack(state: dict[str, Tensor], described: dict[str, Any]) -> tuple[Pack, dict[str, Tensor]]:
    kind, names, current = described["kind"], described["names"], described["current"]
    _sound(kind in ("owners", "masks"), f"kind {kind!r:.40}")
    _sound(isinstance(names, list) and all(isinstance(n, str) for n in names), "names")
    _sound(len(set(names)) == len(names) <= MOST_TASKS and current in names, "names")
    plain = {name: t for name, t in state.items() if not name.startswith(_PREFIX)}
    owners, masks = _marks(state, kind, names, plain)
    backbone = owners if kind == "owners" else masks[current]
    _sound(bool(backbone) and all(plain[n].is_floating_point() for n in backbone), "backbone")
    own = _own(state, names, {name: plain[name] for name in set(described["own"])}, current)
    _sound(not own[current].keys() & backbone.keys(), "own tensors")
    shared = {n: t for n, t in plain.items() if n not in backbone and n not in own[current]}
    weights = {n: plain[n] for n in backbone}
    return Pack(kind, tuple(names), current, weights, owners, masks, own, shared), plain


def _marks(
    state: Tensors, kind: str, names: list[str], plain: Tensors
) -> tuple[Tensors, dict[str, Tensors]]:
    """Who owns what of the backbone, or which weights each task sees: a pack has one of them."""
    if kind == "owners":
        owners = _bytes_of(_under(state, "owners/"), plain, len(names))
        return owners, {}
    masks = {}
    for number, name in enumerate(names, 1):
        found = _bytes_of(_under(state, f"{number}/mask/"), plain, 1)
        masks[name] = {n: mask.bool() for n, mask in found.items()}
    _sound(all(mask.keys() == masks[names[0]].keys() for mask in masks.values()), "masks")
    return {}, masks


def _own(state: Tensors, names: list[str], mine: Tensors, current: str) -> dict[str, Tensors]:
    """What each task has for itself: the same tensors, which differ in the number of outputs only."""
    own = {name: _under(state, f"{number}/own/") for number, name in enumerate(names, 1)}
    own[current] = mine
    for tensors in own.values():
        _sound(tensors.keys() == mine.keys(), "own tensors")
        alike = all(_but_outputs(t) == _but_outputs(mine[name]) for name, t in tensors.items())
        _sound(alike and all(t.numel() for t in tensors.values()), "shapes of own tensors")
    return own


def _but_outputs(tensor: Tensor) -> tuple[int, ...]:
    """How many axes, and how long each but the first is."""
    return tensor.ndim, *tensor.shape[1:]


def _bytes_of(marks: Tensors, plain: Tensors, highest: int) -> Tensors:
    """Marks as bytes, after checking that they are small whole numbers, one for each weight."""
    for name, found in marks.items():
        _sound(name in plain and plain[name].shape == found.shape and found.numel() > 0, name)
        usual = found.is_floating_point() or found.dtype in (torch.uint8, torch.bool)
        _sound(usual and bool(((found >= 0) & (found <= highest)).all()), name)
        _sound(bool((found == found.to(torch.uint8)).all()), name)
    return {name: found.to(torch.uint8) for name, found in marks.items()}


def _under(state: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin so, without that."""
    whole = _PREFIX + prefix
    return {name.removeprefix(whole): t for name, t in state.items() if name.startswith(whole)}


def _sound(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _coded(marks: Tensor) -> Coded:
    """Small integers; the most frequent is code 0, which the sparse codecs leave out."""
    return Coded.of(marks.detach().cpu().numpy(), frequent_first=True)
