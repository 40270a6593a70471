"""How the tensors of a network lie in a file: the integers, codes and factors that its encodings know.

Written by :func:`parts`; read back by :func:`stored_tensors` as plain numbers, after which grids and
factors are put on a filled network, so that it knows again what its weights are made of.
``docs/artifact-format.md`` says the same of the file.

The surprising rule: a form is used only where it gives the weight's value exactly. Where something around an
encoding holds entries elsewhere (a mask around a grid), the plain values are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import artifact
from ..artifact import BFloat16, Coded
from ..core.select import Weight, weights
from ..errors import CorruptArtifact, InputError, ModelMismatch
from ..measure import effective_state
from ..mechanisms.arrays import to_numpy
from ..mechanisms.encodings import (
    Binary,
    Codebook,
    IntegerGrid,
    LowRank,
    StepGrid,
    encode,
    encoding_of,
    original_of,
)

#: Before the name of a tensor: the scales of its filters; the factors of which it is the product.
_SCALES, _LEFT, _RIGHT = "scales/", "left/", "right/"

# -- writing -------------------------------------------------------------------------------------


Part = np.ndarray | Coded | BFloat16


def parts(model: nn.Module, whole: Mapping[str, Tensor] | None = None) -> dict[str, Part]:
    """The effective tensors of a model as the artifact stores them, codes where there are any.

    Args:
        model: with its encodings.
        whole: what to store in the place of some weights: those of which the model, as one of its tasks, sees
            a part.
    """
    whole = whole or {}
    forms: dict[str, Part] = {}
    for weight in weights(model):
        forms |= _form(weight, whole.get(weight.name, weight.value).detach())
    plain = {
        name: forms.get(name) or _plain(name, tensor)
        for name, tensor in ({**effective_state(model), **whole}).items()
        if f"{_LEFT}{name}" not in forms
    }
    return plain | {name: form for name, form in forms.items() if name not in plain}


def _plain(name: str, tensor: Tensor) -> Part:
    if name.startswith((_SCALES, _LEFT, _RIGHT, "tasks/")):
        raise InputError(
            f"the name {name!r} cannot be saved: in a file {name.partition('/')[0]}/ stands before what "
            "belongs to another tensor. Rename the module or the buffer."
        )
    try:
        return to_numpy(tensor)
    except (RuntimeError, TypeError) as error:  # of a meta tensor, a sparse one, 8-bit floats
        raise InputError(
            f"{name} cannot be saved, a {tensor.dtype} ({tensor.layout}, on {tensor.device}): {error}. "
            "Convert it to an ordinary tensor first."
        ) from error


def _form(weight: Weight, value: Tensor) -> dict[str, Part]:
    """What stands for a weight in a file, by its encoding; nothing for plain numbers."""
    name = weight.name
    if encoding_of(weight, IntegerGrid) is not None:
        return {name: _few_values(value)}
    if (grid := _grid_of(weight, value)) is not None:
        integers = _few_values(grid.integers(value))
        return {name: integers, f"{_SCALES}{name}": to_numpy(grid.step.flatten())}
    if (binary := encoding_of(weight, Binary)) is not None:
        return _signs(name, value, binary)
    if (pair := _factors_in(weight, value)) is not None:
        sides = zip((_LEFT, _RIGHT), pair, strict=True)
        return {f"{side}{name}": to_numpy(factor) for side, factor in sides}
    if (codebook := encoding_of(weight, Codebook)) is not None:
        return _coded(name, value, codebook, original_of(weight))
    return {}


def _signs(name: str, value: Tensor, binary: Binary) -> dict[str, Part]:
    """Signs, and apart from them a scale for each filter; or the values themselves where they are few."""
    if not binary.by_filter:
        return {name: _few_values(value)}
    scale = value.abs().flatten(1).amax(1)
    divisor = torch.where(scale == 0, 1.0, scale)  # a mask around it may have taken a whole filter
    signs = value / divisor.view(-1, *[1] * (value.ndim - 1))
    if not torch.equal(signs, signs.sign()):
        return {}
    return {name: _few_values(signs), f"{_SCALES}{name}": to_numpy(scale)}


def _factors_in(weight: Weight, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors of which a weight is the product; None also where a mask around it zeroes entries."""
    encoding = encoding_of(weight, LowRank)
    if encoding is None:
        return None
    original = original_of(weight).detach()
    return encoding.factors(original) if torch.equal(encoding(original), value) else None


def _grid_of(weight: Weight, value: Tensor) -> StepGrid | None:
    """The grid on which a weight lies; None also where something around it holds entries elsewhere."""
    grid = encoding_of(weight, StepGrid)
    if grid is None:
        return None
    return grid if torch.equal(grid.integers(value) * grid.step, value) else None


def bits_of_grids(model: nn.Module, whole: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """The weights that are integers in a file, and of how many bits; the arguments are those of ``parts``."""
    values = {w.name: (whole or {}).get(w.name, w.value).detach() for w in weights(model)}
    found = ((weight.name, _grid_of(weight, values[weight.name])) for weight in weights(model))
    return {name: grid.bits for name, grid in found if grid is not None}


def _coded(name: str, value: Tensor, codebook: Codebook, centroids: Tensor) -> dict[str, Part]:
    codes, table = codebook.table(centroids.detach())
    if bool(((value == 0) & (table[codes.long()] != 0)).any()):  # a mask lies around the codebook
        codes, table = (
            torch.where(value == 0, 0, codebook.codes),
            torch.cat([table.new_zeros(1), centroids.detach()]),
        )
    held = table.float()
    # What several tasks share is of other values; values of 64 bits are none of 32.
    if not torch.equal(held.to(value.dtype)[codes.long()], value):
        return {}
    narrow = np.uint8 if len(table) <= 256 else np.uint16
    return {name: Coded(codes.cpu().numpy().astype(narrow), held.cpu().numpy())}


def _few_values(value: Tensor) -> Coded:
    return Coded.of(value.detach().cpu().float().numpy())


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
        if tensor.layout is not torch.strided:
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


# -- reading -------------------------------------------------------------------------------------


def structure_in(file: artifact.Artifact) -> dict[str, Any]:
    return file.structure if isinstance(file.structure, dict) else {}


def stored_tensors(file: artifact.Artifact) -> dict[str, Tensor]:
    """All tensors of a file, tied ones under each of their names.

    Raises:
        CorruptArtifact: a second name stands for a tensor that the file lacks, or has itself.
    """
    stored = {name: _to_torch(file, name) for name in file.names()}
    state = {n: _scaled(n, t, stored) for n, t in stored.items() if not n.startswith(_SCALES)}
    tied = structure_in(file).get("tied", {})
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


def _to_torch(file: artifact.Artifact, name: str) -> Tensor:
    values = file.dense(name)
    if file.info(name).dtype == "BF16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def grids_in(file: artifact.Artifact) -> dict[str, tuple[int, Tensor]]:
    """Bits and steps of the weights that are integers, so that a loaded network still knows them.

    Raises:
        CorruptArtifact: the file says so of a weight without steps, or of bits that cannot be.
    """
    grids = structure_in(file).get("grids", {})
    possible = isinstance(grids, dict) and all(
        type(bits) is int and 2 <= bits <= 8 for bits in grids.values()
    )
    known = set(file.names())
    if not possible or not {n for name in grids for n in (name, f"{_SCALES}{name}")} <= known:
        raise _no_grids(grids)
    found = {name: (bits, _to_torch(file, f"{_SCALES}{name}")) for name, bits in grids.items()}
    for name, (bits, step) in found.items():
        if not _is_grid(_to_torch(file, name), bits, step):
            raise _no_grids(name)
    return found


def _is_grid(integers: Tensor, bits: int, step: Tensor) -> bool:
    sound = integers.is_floating_point() and step.is_floating_point() and integers.numel() > 0
    if not sound or integers.ndim == 0 or step.shape != integers.shape[:1]:
        return False
    positive = bool(step.isfinite().all() and (step > 0).all())
    whole = bool((integers == integers.round()).all())
    return positive and whole and float(integers.abs().amax()) <= 2 ** (bits - 1) - 1


def _no_grids(said: Any) -> CorruptArtifact:
    return CorruptArtifact(
        f"what the file says of integer weights cannot be: {said!r:.80}. Get it again from its source."
    )


def gridded(model: nn.Module, steps: dict[str, tuple[int, Tensor]]) -> list[Weight]:
    """The weights of a network that are integers in the file.

    Raises:
        CorruptArtifact: the network has no such weight.
    """
    known = {weight.name: weight for weight in weights(model)} if steps else {}
    if not steps.keys() <= known.keys():
        raise _no_grids(sorted(steps.keys() - known.keys()))
    return [known[name] for name in steps]


def multiplied(state: dict[str, Tensor], own: dict[str, Tensor], path: Any) -> dict[str, Tensor]:
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
    same = left.dtype == right.dtype and left.is_floating_point()
    sound = same and left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
    return sound and bool(left.isfinite().all() and right.isfinite().all())


def put_factors(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Let weights of a filled network be products again, of the factors that the file has."""
    known = {f"{_LEFT}{weight.name}": weight for weight in weights(model)}
    for name in [name for name in state if name in known]:
        weight, left = known[name], state[name]
        right = state[f"{_RIGHT}{weight.name}"]
        encode(weight, LowRank.of(left, right))
