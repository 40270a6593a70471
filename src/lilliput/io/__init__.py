"""Models to artifacts and back.

The surprising rule: a file names an architecture, never code. ``load`` builds registered architectures by
name; a network of any other class needs ``model=``, an instance that the file's tensors then fill.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import artifact
from ..core import registry
from ..core.recipe import ArtifactSettings
from ..errors import InputError, UnsupportedArtifact
from ..measure import effective_state
from ..mechanisms import packed
from ..mechanisms.activations import check_quantizers
from ..mechanisms.encodings import put_grid
from ..mechanisms.packing import fit, set_pack, settled
from ..mechanisms.structure import apply_structure, structure_of
from ..mechanisms.surgery import transaction
from ._filling import Path_, fill, thin_and_fill
from ._forms import (
    bits_of_grids,
    gridded,
    grids_in,
    parts,
    put_factors,
    stored_tensors,
    structure_in,
    tied_names,
)

__all__ = ["load", "load_weights", "parts", "save", "tied_names"]


def save(
    model: nn.Module,
    path: Path_,
    *,
    settings: ArtifactSettings | None = None,
    recipe: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
) -> None:
    """Write a model, encodings and all, as a compressed file.

    Args:
        model: any module; one that a registered architecture built can be loaded without ``model=``.
        path: of the file; replaced whole or not at all.
        settings: codec, float type and profile.
        recipe: what made the model, for the record.
        figures: what was measured on it, for the record.

    Raises:
        ModelMismatch: a part of the model was cut on its own after the network around it was, so that
            no fresh instance could take the file in; or something has changed that several tasks of
            the network share. Nothing is written.

    Example:
        >>> import tempfile, lilliput
        >>> net = lilliput.build("lenet_300_100")
        >>> file = tempfile.mkdtemp() + "/net.safetensors"
        >>> lilliput.save(net, file)
        >>> lilliput.load(file).fc1.weight.equal(net.fc1.weight)
        True
    """
    settings = settings or ArtifactSettings()
    state, own = effective_state(model), structure_of(model)
    tied, pack = tied_names(state), settled(model, state)
    whole = None if pack is None else pack.weights
    tensors = parts(model, whole)
    known = own | {"tied": tied, "grids": bits_of_grids(model, whole)}
    if pack is not None:
        known["tasks"] = packed.describe(pack)
        tensors |= packed.parts(pack)
    origin = dict(getattr(model, "lilliput_origin", {}))
    artifact.write(
        path,
        {name: part for name, part in tensors.items() if name not in tied},
        structure=origin | {name: said for name, said in known.items() if said},
        recipe=recipe or {},
        figures=figures or {},
        codec=settings.codec,
        floats=settings.floats,
        profile=settings.profile,
    )


def load(
    path: Path_,
    *,
    model: nn.Module | None = None,
    task: str | None = None,
    max_bytes: int | None = None,
) -> nn.Module:
    """Read a compressed file as a runnable model, in eval mode.

    Args:
        path: the file.
        model: an instance to fill, where the file names no registered architecture; of a network that
            lost channels or modules a whole one, as its class builds it.
        task: of a file with several tasks, which; by default the one that the network was when it was
            saved. Its last layer gets the width that it has in the file. :func:`lilliput.switch` changes it
            later.
        max_bytes: refuse a file whose decoded tensors are larger; by default 8 GiB.

    Raises:
        ArtifactError: the file is damaged, foreign, or too large.
        ModelMismatch: its tensors do not fit the model.
        InputError: it names no architecture and no model was given; it has no such task.
    """
    limit = {} if max_bytes is None else {"max_bytes": max_bytes}
    with artifact.open(path, **limit) as file:
        structure = structure_in(file)
        target = model if model is not None else _build(structure, path)
        state, pack = packed.opened(stored_tensors(file), structure.get("tasks"), path, task)
        grids = grids_in(file)
        check_quantizers(structure.get("activations", {}), state)
    with transaction(target):
        apply_structure(target, {**structure, "plan": None})
        set_pack(target, None)
        if pack is not None:  # before the plan, which was made on a network of this task's width
            fit(target, pack.own[pack.current])
        integers = gridded(target, grids)
        thin_and_fill(target, structure.get("plan"), state, path)
        set_pack(target, pack)
        for weight in integers:
            put_grid(weight, *grids[weight.name])
        put_factors(target, state)
    return target.eval()


def _build(structure: dict[str, Any], path: Path_) -> nn.Module:
    if "architecture" not in structure:
        raise InputError(
            f"{path} does not say which network it holds, since that was not built by a registered "
            "architecture: give an instance to fill, load(path, model=YourNetwork())."
        )
    named, arguments = structure["architecture"], structure["arguments"]
    if ":" in named:  # another package's: the weights are in the file, and none are fetched for it
        arguments = arguments | {"pretrained": False}
    model: nn.Module = registry.load("architecture", named)(**arguments)
    return model


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Structure and tensors of an artifact; of any other safetensors file there is no structure."""
    try:
        with artifact.open(path) as file:
            return structure_in(file), stored_tensors(file)
    except UnsupportedArtifact:
        return {}, safetensors.torch.load_file(path)


def load_weights(model: nn.Module, path: Path_) -> nn.Module:
    """Fill a model from a user's checkpoint: an artifact, safetensors, or ``torch.save``'s form.

    The last is read with ``weights_only=True``; a ``state_dict`` inside it is found, and the prefix
    ``module.`` that data-parallel training leaves is taken off.

    Raises:
        InputError: there is no such file, or it cannot be read safely.
        ModelMismatch: its tensors do not fit the model.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path} to take weights from.")
    if path.suffix == ".safetensors":
        structure, state = _read_safetensors(path)
        with transaction(model):
            apply_structure(model, {"factors": structure.get("factors", {})})
            thin_and_fill(model, structure.get("plan"), state, path)
        return model
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read safely ({type(error).__name__}: {error}). Save only the weights, "
            "torch.save(model.state_dict(), path), or a .safetensors file."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state_dict.")
    # Checkpoints older than torch 0.4.1 lack the counters, which nothing but momentum=None reads.
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    fill(model, counters | {k.removeprefix("module."): v for k, v in state.items()}, path)
    return model
