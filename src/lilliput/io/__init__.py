"""Models to artifacts and back.

The surprising rule: a file names an architecture, never code. ``load`` builds registered architectures by
name; a network of any other class needs ``model=``, an instance that the file's tensors then fill.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import artifact
from ..artifact.reader import MAX_BYTES
from ..core import registry
from ..core.recipe import ArtifactSettings
from ..errors import ArtifactTooLarge, CorruptArtifact, InputError, LilliputError
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

#: No network that a file names has more parameters and buffers: what builds more would go on for hours.
_MOST_TENSORS = 1 << 14
#: What fills a tensor with random numbers.
_DRAWN = {
    "bernoulli_", "cauchy_", "exponential_", "geometric_", "kaiming_uniform_", "log_normal_", "normal_",
    "random_", "uniform_",
}  # fmt: skip


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
        max_bytes: refuse a file whose decoded tensors are larger together, or the network that it names;
            by default 8 GiB.

    Raises:
        ArtifactError: the file is damaged, foreign, or too large.
        ModelMismatch: its tensors do not fit the model.
        InputError: there is no such file; it names no architecture and no model was given, or one that
            there is not; it has no such task.
    """
    most = MAX_BYTES if max_bytes is None else max_bytes
    with _open(path, most) as file:
        structure = structure_in(file)
        target = model if model is not None else _build(structure, path, most)
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
        set_pack(target, pack and packed.completed(pack, target.state_dict()))
        for weight in integers:
            put_grid(weight, *grids[weight.name])
        put_factors(target, state)
    return target.eval()


def _open(path: Path_, most: int) -> artifact.Artifact:
    """A file whose decoded tensors are not too large together.

    Raises:
        InputError: there is no such file.
        ArtifactTooLarge: they are.
    """
    try:
        file = artifact.open(path, max_bytes=most)
    except OSError as error:
        raise _unreadable(path, error) from error
    size = sum(file.info(name).nbytes for name in file.names())
    if size > most:
        file.close()
        raise _too_large(path, f"its tensors take {size:,} bytes", most)
    return file


def _unreadable(path: Path_, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read: {type(error).__name__}: {error}")


def _too_large(path: Path_, what: str, most: int) -> ArtifactTooLarge:
    return ArtifactTooLarge(
        f"{path}: {what}, above the cap of {most:,}. If you trust the file, load it with a larger max_bytes."
    )


# -- the network that a file names ----------------------------------------------------------------


def _build(structure: dict[str, Any], path: Path_, most: int) -> nn.Module:
    """The network that a file names, of not more than so many bytes."""
    if "architecture" not in structure:
        raise InputError(
            f"{path} does not say which network it holds, since that was not built by a registered "
            "architecture: give an instance to fill, load(path, model=YourNetwork())."
        )
    named, arguments = structure["architecture"], structure.get("arguments")
    if not isinstance(named, str) or not isinstance(arguments, dict):
        raise _cannot_be_built(path, named, arguments, "a name and a dict of arguments are needed")
    if ":" in named:  # another package's: the weights are in the file, and none are fetched for it
        arguments = arguments | {"pretrained": False}
    try:
        make = registry.load("architecture", named)
        return _built(make, arguments, most)
    except ArtifactTooLarge as error:
        raise _too_large(
            path, f"{named!r:.80} with {arguments!r:.200} has {error}", most
        ) from error
    except InputError as error:
        raise InputError(f"{path} names a network that cannot be built: {error}") from error
    except LilliputError:  # a package that is not installed
        raise
    except Exception as error:  # architectures check little, and packages raise whatever they like
        raise _cannot_be_built(path, named, arguments, error) from error


def _cannot_be_built(path: Path_, named: Any, arguments: Any, reason: Any) -> CorruptArtifact:
    return CorruptArtifact(
        f"{path}: the network that it names, {named!r:.80} with {arguments!r:.200}, cannot be built "
        f"({type(reason).__name__}: {reason!s:.200}). Get it again from its source, or give an instance to "
        "fill, load(path, model=YourNetwork())."
    )


def _built(make: Callable[..., nn.Module], arguments: dict[str, Any], most: int) -> nn.Module:
    """A network, built for the first time without memory, to see how large it is.

    Raises:
        ArtifactTooLarge: it has more than so many bytes, or more tensors than any.
    """
    try:
        with torch.device("meta"), _Counting():
            sketch = make(**arguments)
        size = sum(t.numel() * t.element_size() for t in (*sketch.parameters(), *sketch.buffers()))
    except ArtifactTooLarge:
        raise
    except Exception:  # it looks at values, or its arguments are wrong, which is told from here
        with _Counting(most):
            return make(**arguments)
    if size > most:
        raise ArtifactTooLarge(f"{size:,} bytes")
    return make(**arguments)


class _Counting(TorchFunctionMode):
    """Counts what is made of tensors in this thread, and stops before there is more than allowed.

    Args:
        most: bytes of all together; None where they take no memory. Then nothing random is drawn either:
            for that torch would import its compiler, which takes seconds.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self._most, self._bytes, self._tensors = most, 0, 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What the function returns."""
        name, given = getattr(func, "__name__", ""), (*args, *(kwargs or {}).values())
        if self._most is None and name in _DRAWN:
            return next(value for value in given if isinstance(value, Tensor))
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and name != "__get__" and all(found is not g for g in given):
            self._count(found)
        return found

    def _count(self, made: Tensor) -> None:
        self._bytes += 0 if made._is_view() else made.numel() * made.element_size()
        self._tensors += 1
        if self._tensors > _MOST_TENSORS or (self._most is not None and self._bytes > self._most):
            raise ArtifactTooLarge(
                f"{self._tensors:,} tensors of {self._bytes:,} bytes, if not more"
            )


# -- weights alone --------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: Path_) -> nn.Module:
    """Fill a model from a user's checkpoint: an artifact, safetensors, or ``torch.save``'s form.

    An artifact is known by how it begins, safetensors by the file's name. What ``torch.save`` wrote is read
    with ``weights_only=True``; a ``state_dict`` inside it is found, and the prefix ``module.`` that
    data-parallel training leaves is taken off.

    Raises:
        InputError: there is no such file, or it cannot be read safely.
        ArtifactError: it is an artifact, and damaged, of a future version, or too large.
        ModelMismatch: its tensors do not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path} to take weights from.")
    if _is_artifact(path):
        with _open(path, MAX_BYTES) as file:
            structure, state = structure_in(file), stored_tensors(file)
        with transaction(model):
            apply_structure(model, {"factors": structure.get("factors", {})})
            thin_and_fill(model, structure.get("plan"), state, path)
        return model
    fill(model, _state_in(path, model), path)
    return model


def _is_artifact(path: Path) -> bool:
    try:
        return artifact.is_artifact(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _state_in(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint that Lilliput did not write."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
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
    return counters | {k.removeprefix("module."): v for k, v in state.items()}
