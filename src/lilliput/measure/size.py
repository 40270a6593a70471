"""How many numbers a model holds, and how many bytes its dense form takes.

The surprising rule: what is counted are the *effective* tensors, the ones the rest of torch sees. A
layer whose weight is parametrized (``torch.nn.utils.parametrize``: a mask, a codebook) counts
``module.weight``, and neither the ``original`` that trains nor the buffers of the parametrization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lilliput.core.task import evaluation
from lilliput.errors import InputError


@dataclass(frozen=True)
class TensorSize:
    """One tensor.

    Attributes:
        shape: its dims.
        elements: how many numbers it holds.
        nonzeros: how many of them are not zero.
        dense_bytes: bytes, at the tensor's own dtype.
        is_parameter: True for a parameter, False for a buffer.
    """

    shape: tuple[int, ...]
    elements: int
    nonzeros: int
    dense_bytes: int
    is_parameter: bool


@dataclass(frozen=True)
class Size:
    """What a model holds. A tensor with several names (tied) is counted once, under the first.

    Attributes:
        parameters: numbers in the effective parameters; buffers are not in this count.
        nonzeros: those of them that are not zero.
        dense_bytes: bytes of the parameters and the persistent buffers, uncompressed, at their own
            dtypes: the payload of an ordinary checkpoint.
        tensors: the same for each tensor, by its effective name, for example ``"fc1.weight"``.
    """

    parameters: int
    nonzeros: int
    dense_bytes: int
    tensors: Mapping[str, TensorSize]


def size(model: nn.Module) -> Size:
    """Count the parameters, the non-zeros and the dense bytes of a model.

    Args:
        model: any module; it is left as it is.

    Returns:
        Totals and a figure for each tensor.

    Raises:
        InputError: a lazy layer has no shape yet.

    Example:
        >>> size(nn.Linear(300, 100)).parameters
        30100
    """
    with evaluation(model), torch.no_grad():
        tensors = {entry.name: _tensor_size(entry) for entry in _distinct(model)}
    parameters = [tensor for tensor in tensors.values() if tensor.is_parameter]
    return Size(
        parameters=sum(tensor.elements for tensor in parameters),
        nonzeros=sum(tensor.nonzeros for tensor in parameters),
        dense_bytes=sum(tensor.dense_bytes for tensor in tensors.values()),
        tensors=tensors,
    )


def effective_state(model: nn.Module) -> dict[str, Tensor]:
    """Give the ``state_dict`` that a copy of the model without parametrizations would have.

    Parametrizations are computed in eval mode, as in deployment. The tensors of plain parameters
    and buffers share their memory with the model. Names are always those of the plain model; the
    order is too for torch's own layers. Torch forgets where in its module a parametrized parameter
    stood, so in a user's module with several weights a parametrized one comes before the others.
    Extra state that is not a tensor is left out.

    Args:
        model: any module, parametrized or not; it is left as it is.

    Returns:
        Effective parameters and persistent buffers by name, detached. Tied tensors appear under
        each of their names, as in ``state_dict``.

    Raises:
        InputError: a lazy layer has no shape yet.

    Example:
        >>> list(effective_state(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))[:3]
        ['0.weight', '0.bias', '1.weight']
    """
    with evaluation(model), torch.no_grad():
        return {entry.name: entry.tensor.detach() for entry in _entries(model)}


@dataclass(frozen=True)
class _Entry:
    """An effective tensor; ``sources`` are the ids of the tensors that it is computed from."""

    name: str
    tensor: Tensor
    sources: tuple[int, ...]
    is_parameter: bool


def _tensor_size(entry: _Entry) -> TensorSize:
    tensor = entry.tensor
    return TensorSize(
        shape=tuple(tensor.shape),
        elements=tensor.numel(),
        nonzeros=int(torch.count_nonzero(tensor)),
        dense_bytes=tensor.numel() * tensor.element_size(),
        is_parameter=entry.is_parameter,
    )


def _distinct(model: nn.Module) -> Iterator[_Entry]:
    """Leave out tied entries: of the same source *and* equal.

    Two layers that share a parameter, but each under its own mask, are two tensors.
    """
    seen: dict[tuple[int, ...], list[Tensor]] = {}
    for entry in _entries(model):
        twins = seen.setdefault(entry.sources, [])
        if not any(torch.equal(entry.tensor, twin) for twin in twins):
            twins.append(entry.tensor)
            yield entry


def _entries(model: nn.Module) -> Iterator[_Entry]:
    for path, module in _plain_modules(model):
        encoded = _encoded(module)
        for leaf in _leaves(module, encoded):
            tensor = getattr(module, leaf)
            name = f"{path}.{leaf}" if path else leaf
            _refuse_lazy(name, tensor)
            sources = encoded.get(leaf, [tensor])
            yield _Entry(name, tensor, tuple(map(id, sources)), _any_parameter(sources))


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module but the parametrizations, in the order of ``state_dict``."""
    hidden: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if f"{path}.".startswith(hidden):
            continue
        yield path, module
        if is_parametrized(module):
            hidden += (f"{path}.parametrizations.".lstrip("."),)


def _encoded(module: nn.Module) -> dict[str, list[Tensor]]:
    """The parametrized names of one module, each with the tensors that it is computed from."""
    if not is_parametrized(module):
        return {}
    assert isinstance(module.parametrizations, nn.ModuleDict)
    return {
        leaf: [*steps.parameters(recurse=False), *steps.buffers(recurse=False)]
        for leaf, steps in module.parametrizations.items()
    }


def _leaves(module: nn.Module, encoded: Mapping[str, list[Tensor]]) -> list[str]:
    """Names of one module's own tensors, ordered as before any was parametrized."""
    parameters = [name for name, _ in module.named_parameters("", False, remove_duplicate=False)]
    buffers = [name for name, _ in module.named_buffers("", False, remove_duplicate=False)]
    buffers = [name for name in buffers if name not in module._non_persistent_buffers_set]
    if not encoded:
        return parameters + buffers
    first = [name for name, sources in encoded.items() if _any_parameter(sources)]
    # Every layer of torch registers its weights before its biases, except the recurrent ones, which
    # alternate and keep the list.
    ordered = sorted(first + parameters, key=lambda name: "bias" in name)
    if isinstance(module, nn.RNNBase):
        ordered.sort(key=module._flat_weights_names.index)
    return ordered + [name for name in encoded if name not in first] + buffers


def _any_parameter(tensors: list[Tensor]) -> bool:
    return any(isinstance(tensor, nn.Parameter) for tensor in tensors)


def _refuse_lazy(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise InputError(
            f"{name} belongs to a lazy layer and has no shape yet, so it cannot be counted: "
            "run the model once on an example batch, then measure it."
        )
