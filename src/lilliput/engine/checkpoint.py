"""Checkpoints: any tree of tensors and plain values, in one safetensors file, without pickle.

The tensors lie in the file by number; the tree around them is JSON in its metadata. Dicts whose keys
are not strings, and tuples, survive, so that an optimizer's ``state_dict`` does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..core.files import unfinished
from ..errors import CorruptArtifact, RunError
from ..mechanisms.encodings import bake, describe, rebuild
from ..mechanisms.packing import Pack, fit, pack_of, set_pack
from ..mechanisms.structure import apply_structure, structure_of

_KEY = "lilliput.checkpoint"


def save_tree(path: Path, tree: Any) -> None:
    """Write the tree to a temporary name and rename it."""
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_take_apart(tree, tensors))
    data = safetensors.torch.save(tensors, metadata={_KEY: skeleton})
    write_atomically(path, lambda file: file.write(data))


def load_tree(path: Path) -> Any:
    """Read a tree that :func:`save_tree` wrote.

    Raises:
        CorruptArtifact: the file is not such a tree.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})[_KEY])
            return _put_together(skeleton, file.get_tensor)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CorruptArtifact(
            f"{path} is not a whole checkpoint ({error}). Delete it to go on from an earlier one."
        ) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it; nothing half done stays.

    Raises:
        RunError: the disk is full, or the folder cannot be written; the old file is untouched.
    """
    temporary = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> RunError:
    """The error for a full disk or a folder that cannot be written."""
    return RunError(
        f"cannot write {path}: {error.strerror or error}. What was there before is untouched; make "
        "room or choose another directory, and run the same command again to go on."
    )


def _take_apart(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"$tensor": name}
    if isinstance(node, dict):
        return {
            "$dict": [[_take_apart(k, tensors), _take_apart(v, tensors)] for k, v in node.items()]
        }
    if isinstance(node, tuple):
        return {"$tuple": [_take_apart(v, tensors) for v in node]}
    if isinstance(node, list):
        return [_take_apart(v, tensors) for v in node]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(
        f"a checkpoint holds tensors, numbers, strings, lists and dicts, not {type(node).__name__}."
    )


def _put_together(node: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(node, list):
        return [_put_together(v, tensor) for v in node]
    if not isinstance(node, dict):
        return node
    (kind, content), *_ = node.items()
    if kind == "$tensor":
        return tensor(content)
    if kind == "$tuple":
        return tuple(_put_together(v, tensor) for v in content)
    return {_put_together(k, tensor): _put_together(v, tensor) for k, v in content}


def model_tree(model: nn.Module) -> dict[str, Any]:
    """All of a model that training may change: structure, tensors, encodings, tasks, dropout.

    Raises:
        ModelMismatch: a part of it was cut on its own, so that the tree could not be loaded.
    """
    pack = pack_of(model)
    return {
        **structure_of(model),
        "tensors": model.state_dict(),
        "encodings": describe(model),
        "pack": None if pack is None else pack.as_tree(),
        "dropout": {name: module.p for name, module in _dropouts(model)},
    }


def load_model_tree(
    model: nn.Module, tree: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a model of the same class, with or without encodings, into the state of a tree.

    It may have channels, modules and whole layers that the tree has not; they are cut out, and an
    optimizer forgets the parameters that go.
    """
    apply_structure(model, tree, optimizer)
    encoded = describe(model) == tree["encodings"]
    if not encoded:
        bake(model)
    if tree["pack"] is not None:
        pack = Pack.from_tree(tree["pack"])
        fit(model, _stored(tree["tensors"], pack.own[pack.current]))
        set_pack(model, pack)
    if not encoded:
        rebuild(model, tree["encodings"])
    model.load_state_dict(tree["tensors"])
    for name, module in _dropouts(model):
        module.p = tree["dropout"][name]


def _stored(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by their plain names, also where what is stored is an encoding's original."""
    found = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        original = tensors.get(f"{layer}.parametrizations.{leaf}.original".lstrip("."))
        found[name] = tensors.get(name, original)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _dropouts(model: nn.Module) -> list[tuple[str, Any]]:
    kinds = nn.modules.dropout._DropoutNd
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]


def fits(state: dict[str, Tensor], module: nn.Module) -> bool:
    """Whether a state has the shapes that the module has now; not, once channels have gone since."""
    own = module.state_dict()
    return state.keys() == own.keys() and all(state[k].shape == v.shape for k, v in own.items())


def clone_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state that later training does not move."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}
