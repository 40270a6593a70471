"""Models to artifacts and back.

The surprising rule: a file names an architecture, never code. ``load`` builds registered architectures by
name; a network of any other class needs ``model=``, an instance that the file's tensors then fill.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from . import artifact
from .artifact import BFloat16, Coded
from .core import registry
from .core.recipe import ArtifactSettings
from .core.select import Weight, weights
from .errors import (
    CorruptArtifact,
    InputError,
    LilliputError,
    ModelMismatch,
    UnsupportedArtifact,
)
from .measure import effective_state
from .mechanisms import packed
from .mechanisms.activations import (
    check_quantizers,
    replace_activations,
    replaced_activations,
)
from .mechanisms.encodings import (
    Binary,
    Codebook,
    IntegerGrid,
    LowRank,
    StepGrid,
    encode,
    encoding_of,
    original_of,
    put_grid,
)
from .mechanisms.factors import factorize_as, factors_of
from .mechanisms.packing import fit, set_pack, settled
from .mechanisms.surgery import Plan, apply_plan, checked_plan, transaction

Path_ = str | PathLike[str]
#: Before the name of a tensor: the scales of its filters; the factors of which it is the product.
_SCALES, _LEFT, _RIGHT = "scales/", "left/", "right/"


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
    state = effective_state(model)
    plan, tied, pack = checked_plan(model), tied_names(state), settled(model, state)
    structure = dict(getattr(model, "lilliput_origin", {}))
    if chains := factors_of(model):
        structure["factors"] = chains
    if plan is not None:
        structure["plan"] = plan.as_dict()
    if tied:
        structure["tied"] = tied
    if replaced := replaced_activations(model):
        structure["activations"] = replaced
    if grids := {w.name: g.bits for w in weights(model) if (g := _grid_of(w)) is not None}:
        structure["grids"] = grids
    tensors = parts(model)
    if pack is not None:
        structure["tasks"] = packed.describe(pack)
        tensors |= packed.parts(pack, state)
    artifact.write(
        path,
        {name: part for name, part in tensors.items() if name not in tied},
        structure=structure,
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
        structure = _structure(file)
        target = model if model is not None else _build(structure, path)
        state, pack = packed.opened(_state(file), structure.get("tasks"), path, task)
        steps = _steps(file)
        check_quantizers(structure.get("activations", {}), state)
    with transaction(target):
        factorize_as(target, structure.get("factors", {}))
        replace_activations(target, structure.get("activations", {}))
        set_pack(target, None)
        if pack is not None:
            fit(target, pack.own[pack.current])
        gridded = _gridded(target, steps)
        _thin_and_fill(target, structure.get("plan"), state, path)
        set_pack(target, pack)
        for weight in gridded:
            put_grid(weight, *steps[weight.name])
        _put_factors(target, state)
    return target.eval()


def parts(model: nn.Module) -> dict[str, np.ndarray | Coded | BFloat16]:
    """The effective tensors of a model as the artifact stores them, codes where there are any."""
    coded: dict[str, Coded] = {}
    scales: dict[str, np.ndarray | BFloat16] = {}
    products: set[str] = set()
    for weight in weights(model):
        codebook = encoding_of(weight, Codebook)
        if codebook is not None:
            coded[weight.name] = _coded(codebook, original_of(weight), weight.value)
        elif encoding_of(weight, IntegerGrid) is not None:
            coded[weight.name] = _few_values(weight.value)
        elif (grid := _grid_of(weight)) is not None:
            coded[weight.name] = _few_values(grid.integers(weight.value.detach()))
            scales[f"{_SCALES}{weight.name}"] = _to_numpy(grid.step.flatten())
        elif (binary := encoding_of(weight, Binary)) is not None:
            scale = _scale_of(weight, binary)
            coded[weight.name] = _few_values(weight.value.detach() / scale)
            if binary.by_filter:
                scales[f"{_SCALES}{weight.name}"] = _to_numpy(scale.flatten())
        elif (pair := _factors_in(weight)) is not None:
            products.add(weight.name)
            for side, factor in zip((_LEFT, _RIGHT), pair, strict=True):
                scales[f"{side}{weight.name}"] = _to_numpy(factor)
    state = {n: t for n, t in effective_state(model).items() if n not in products}.items()
    return {name: coded.get(name) or _to_numpy(tensor) for name, tensor in state} | scales


def _factors_in(weight: Weight) -> tuple[Tensor, Tensor] | None:
    """The factors of which a weight is the product; None also where a mask around it zeroes entries."""
    encoding = encoding_of(weight, LowRank)
    if encoding is None:
        return None
    original = original_of(weight).detach()
    same = torch.equal(encoding(original), weight.value.detach())
    return encoding.factors(original) if same else None


def _scale_of(weight: Weight, binary: Binary) -> Tensor:
    """What the file keeps apart: a scale for each filter; 1 where the values themselves are few."""
    if not binary.by_filter:
        return weight.value.new_ones(())
    return weight.value.detach().abs().flatten(1).amax(1).view(-1, *[1] * (weight.value.ndim - 1))


def _grid_of(weight: Weight) -> StepGrid | None:
    """The grid on which a weight lies; None also where something around it holds entries elsewhere."""
    grid, value = encoding_of(weight, StepGrid), weight.value.detach()
    on_it = grid is not None and torch.equal(grid.integers(value) * grid.step, value)
    return grid if on_it else None


def _steps(file: artifact.Artifact) -> dict[str, tuple[int, Tensor]]:
    """Bits and steps of the weights that are integers, so that a loaded network still knows them.

    Raises:
        CorruptArtifact: the file says so of a weight without steps, or of bits that cannot be.
    """
    grids = _structure(file).get("grids", {})
    possible = isinstance(grids, dict) and all(
        type(bits) is int and 2 <= bits <= 8 for bits in grids.values()
    )
    known = set(file.names())
    if not possible or not {n for name in grids for n in (name, f"{_SCALES}{name}")} <= known:
        raise _no_grids(grids)
    found = {name: (bits, _to_torch(file, f"{_SCALES}{name}")) for name, bits in grids.items()}
    for name, (bits, step) in found.items():
        integers = _to_torch(file, name)
        whole = bool((integers == integers.round()).all())
        fits = len(step) == len(integers) and bool(step.isfinite().all() and (step > 0).all())
        if not whole or not fits or integers.abs().amax() > 2 ** (bits - 1) - 1:
            raise _no_grids(name)
    return found


def _no_grids(said: Any) -> CorruptArtifact:
    return CorruptArtifact(
        f"what the file says of integer weights cannot be: {said!r:.80}. Get it again from its source."
    )


def _gridded(model: nn.Module, steps: dict[str, tuple[int, Tensor]]) -> list[Weight]:
    """The weights of a network that are integers in the file.

    Raises:
        CorruptArtifact: the network has no such weight.
    """
    known = {weight.name: weight for weight in weights(model)} if steps else {}
    if not steps.keys() <= known.keys():
        raise _no_grids(sorted(steps.keys() - known.keys()))
    return [known[name] for name in steps]


def tied_names(state: dict[str, Tensor]) -> dict[str, str]:
    """The tensors that are another one under a second name: name -> the first name of that memory.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> net[1].weight = net[0].weight
        >>> tied_names(net.state_dict())
        {'1.weight': '0.weight'}
    """
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


def _state(file: artifact.Artifact) -> dict[str, Tensor]:
    """All tensors of a file, tied ones under each of their names.

    Raises:
        CorruptArtifact: a second name stands for a tensor that the file lacks, or has itself.
    """
    stored = {name: _to_torch(file, name) for name in file.names()}
    state = {n: _scaled(n, t, stored) for n, t in stored.items() if not n.startswith(_SCALES)}
    tied = _structure(file).get("tied", {})
    named = isinstance(tied, dict) and all(isinstance(first, str) for first in tied.values())
    if not named or not set(tied.values()) <= state.keys() or tied.keys() & state.keys():
        raise CorruptArtifact(
            f"what the file says of tied tensors cannot be: {tied!r:.80}. Get it again from its source, or "
            "save the model again."
        )
    return state | {name: state[first] for name, first in tied.items()}


def _scaled(name: str, tensor: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """A tensor times the scale of each filter, where the file has scales for it.

    Raises:
        CorruptArtifact: there are not as many as filters.
    """
    scale = stored.get(f"{_SCALES}{name}")
    if scale is None:
        return tensor
    if not tensor.ndim or scale.shape != tensor.shape[:1]:
        raise CorruptArtifact(
            f"{name} has the shape {tuple(tensor.shape)} and its scales {tuple(scale.shape)}: there "
            "should be one for each filter. Get the file again from its source."
        )
    return tensor * scale.view(-1, *[1] * (tensor.ndim - 1))


def _coded(codebook: Codebook, centroids: Tensor, value: Tensor) -> Coded:
    codes, table = codebook.table(centroids.detach())
    if bool(((value == 0) & (table[codes.long()] != 0)).any()):  # a mask lies around the codebook
        codes, table = (
            torch.where(value == 0, 0, codebook.codes),
            torch.cat([table.new_zeros(1), centroids.detach()]),
        )
    narrow = np.uint8 if len(table) <= 256 else np.uint16
    return Coded(codes.cpu().numpy().astype(narrow), table.float().cpu().numpy())


def _few_values(value: Tensor) -> Coded:
    """A weight that has at most 256 values, a zero first where there is one."""
    table, codes = value.detach().cpu().float().unique(return_inverse=True)
    order = (table != 0).long().argsort(stable=True)
    place = order.argsort()
    return Coded(place[codes].numpy().astype(np.uint8), table[order].numpy())


def _to_numpy(tensor: Tensor) -> np.ndarray | BFloat16:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return BFloat16(tensor.view(torch.int16).numpy().view(np.uint16))
    return tensor.numpy()


def _to_torch(file: artifact.Artifact, name: str) -> Tensor:
    values = file.dense(name)
    if file.info(name).dtype == "BF16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


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


def _structure(file: artifact.Artifact) -> dict[str, Any]:
    return file.structure if isinstance(file.structure, dict) else {}


def _multiplied(state: dict[str, Tensor], own: dict[str, Tensor], path: Path_) -> dict[str, Tensor]:
    """The tensors with products in the place of factors, none larger than the model's own.

    Raises:
        CorruptArtifact: a factor is without the other, or the tensor is there too.
        ModelMismatch: the product has another shape than the model's tensor.
    """
    left, right = (
        {name.removeprefix(side): t for name, t in state.items() if name.startswith(side)}
        for side in (_LEFT, _RIGHT)
    )
    sound = left.keys() == right.keys() and not left.keys() & state.keys()
    if not sound or not all(_fit(factor, right[name]) for name, factor in left.items()):
        raise CorruptArtifact(
            f"{path}: the factors of {', '.join(sorted(left | right))!r:.80} do not fit each other. Get the "
            "file again from its source, or save the model again."
        )
    found = {n: t for n, t in state.items() if not n.startswith((_LEFT, _RIGHT))}
    for name, factor in left.items():
        shape = (len(factor), right[name].shape[1])
        if name not in own or own[name].shape != shape:
            raise ModelMismatch(
                f"{path} does not fit: {name} is {shape[0]} x {shape[1]} in the file, and not in the model."
            )
        found[name] = factor @ right[name]
    return found


def _fit(left: Tensor, right: Tensor) -> bool:
    return left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]


def _put_factors(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Let weights of a filled network be products again, of the factors that the file has."""
    known = {f"{_LEFT}{weight.name}": weight for weight in weights(model)}
    for name in [name for name in state if name in known]:
        weight, left = known[name], state[name]
        right = state[f"{_RIGHT}{weight.name}"]
        encode(weight, LowRank(left.shape[1], len(left), right.shape[1]))
        original_of(weight).data.copy_(torch.cat([left.T, right], dim=1))


def _thin_and_fill(model: nn.Module, plan: Any, state: dict[str, Tensor], path: Path_) -> None:
    """Cut out what the network in the file has lost, and take in its tensors."""
    if plan is None:
        _fill(model, state, path)
        return
    with transaction(model):
        try:
            apply_plan(model, Plan.from_dict(plan))
        except CorruptArtifact as error:
            raise CorruptArtifact(f"{path}: {error}") from error
        except LilliputError as error:
            raise ModelMismatch(f"{path} does not fit {type(model).__name__}: {error}") from error
        _fill(model, state, path)


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path_) -> None:
    """Load a state, after checking all of it, so that a model is filled whole or not at all."""
    own = model.state_dict()
    state = _multiplied(state, own, path)
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or foreign:
        raise ModelMismatch(
            f"{path} does not fit {type(model).__name__}: "
            + "; ".join(
                f"{what} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
                for what, names in (("the file lacks", missing), ("the model lacks", foreign))
                if names
            )
            + "."
        )
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise ModelMismatch(
                f"{path} does not fit {type(model).__name__}: {name} has the shape "
                f"{tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in the model."
            )
    model.load_state_dict(state)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Structure and tensors of an artifact; of any other safetensors file there is no structure."""
    try:
        with artifact.open(path) as file:
            return _structure(file), _state(file)
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
            factorize_as(model, structure.get("factors", {}))
            _thin_and_fill(model, structure.get("plan"), state, path)
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
    _fill(model, counters | {k.removeprefix("module."): v for k, v in state.items()}, path)
    return model
