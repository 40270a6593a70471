"""Solving instead of training: what a layer multiplies on calibration data, and least squares on it.

A layer is fitted on *rows*: for one position of its output, the inputs that its kernel meets there. They
are drawn at random positions, because the rows of all positions would not fit into memory, and
neighboring ones say nearly the same. Products of rows are summed up batch by batch in double precision
(``gram = X.T @ X``, ``cross = X.T @ Y``), so memory does not grow with the number of samples.

The surprising rule: a singular system is not an error. Two equal channels make one, and so does a dead
one; the ridge that is then added pulls towards a solution that the caller names, so that the error
never rises above the error of that solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.task import call, evaluation
from ..core.types import Batch

#: Below this share of its own variance a column counts as a combination of the others.
_SINGULAR = 1e-10
#: Added then to the diagonal of the normalized gram matrix, whose entries are 1.
_RIDGE = 1e-6

_Conv = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd


def solvable(layer: nn.Module) -> bool:
    """Whether rows of the layer can be drawn: linear or convolution, if transposed then ungrouped."""
    if isinstance(layer, _Transposed):
        return layer.groups == 1
    return is_linear(layer) or isinstance(layer, _Conv)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies its input by its weight; one with its own ``forward`` may do anything."""
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def matrix(layer: Any) -> Tensor:
    """The weight of a layer as ``(filters, input channels of a filter's group, kernel positions)``."""
    weight: Tensor = layer.weight.detach()
    if isinstance(layer, _Transposed):
        weight = weight.transpose(0, 1)
    return weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]


def output_sizes(layer: Any, inputs: Tensor) -> list[int]:
    """Over how many positions the output extends, a number a dim; one number for a linear layer."""
    if isinstance(layer, nn.Linear):
        return [inputs[0].numel() // inputs.shape[-1]]
    spread, stride = _spread(layer, inputs), _stride(layer)
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [(n - r - 1) // s + 1 for n, r, s in zip(spread.shape[2:], reach, stride, strict=True)]


def rows(layer: Any, inputs: Tensor, sample: Tensor, place: Tensor) -> Tensor:
    """What the layer's weight meets at given positions of the output.

    ``sum over c, k of matrix(layer)[n, c, k] * rows[s, c, k]``, plus the bias, is the layer's output for
    filter n of an ungrouped layer, exactly. In a grouped one the channels of filter n's group are meant.

    Args:
        layer: one that is :func:`solvable`.
        inputs: of the layer, ``(batch, channels, ...)``, or ``(batch, ..., features)`` of a linear one.
        sample: int64 ``(rows,)``, which entry of the batch.
        place: int64 ``(rows, dims)``, which position; see :func:`output_sizes`.

    Returns:
        Shape ``(rows, input channels, kernel positions)``.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])[sample, place[:, 0]][:, :, None]
    spread = _spread(layer, inputs).movedim(1, -1)
    dims = len(layer.kernel_size)
    index = [sample.view(-1, *[1] * dims)]
    for dim, (offset, stride) in enumerate(zip(_offsets(layer), _stride(layer), strict=True)):
        at = place[:, dim, None] * stride + offset.to(place.device)
        index.append(at.view(len(at), *[1] * dim, -1, *[1] * (dims - dim - 1)))
    return spread[tuple(index)].flatten(1, dims).transpose(1, 2)


def draw(
    sizes: list[int], batch: int, per_sample: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random positions, ``per_sample`` for each entry of the batch, with replacement.

    Returns:
        Sample ``(rows,)`` and place ``(rows, dims)`` for :func:`rows`.
    """
    sample = torch.arange(batch).repeat_interleave(per_sample)
    places = [torch.randint(size, (len(sample),), generator=generator) for size in sizes]
    return sample, torch.stack(places, dim=1)


def everywhere(sizes: list[int], batch: int) -> tuple[Tensor, Tensor]:
    """Every position of every entry of the batch, in the form of :func:`draw`."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))
    return torch.arange(batch).repeat_interleave(len(places)), places.repeat(batch, 1)


def visit_rows(
    model: nn.Module,
    layers: Iterable[str],
    batches: Iterable[Batch],
    per_sample: int,
    generator: torch.Generator,
    use: Callable[[str, Tensor], None],
    once: bool = False,
) -> None:
    """Run the model over calibration batches, in eval mode, and hand on rows of some layers' inputs.

    A layer that is called several times in a forward pass is visited each time; one whose ``forward``
    is bypassed (the output projection of ``nn.MultiheadAttention``) is never visited.

    Args:
        model: left as it is: hooks are removed and training flags put back, whatever happens.
        layers: names of :func:`solvable` layers.
        batches: on the model's device.
        per_sample: positions for each sample of a batch.
        generator: draws the positions: the same for the same seed.
        use: called with the layer's name and its :func:`rows`.
        once: take each position once where there are no more than ``per_sample``.
    """

    def look(name: str, layer: nn.Module, inputs: Tensor) -> None:
        sizes = output_sizes(layer, inputs)
        if once and math.prod(sizes) <= per_sample:
            sample, place = everywhere(sizes, len(inputs))
        else:
            sample, place = draw(sizes, len(inputs), per_sample, generator)
        use(name, rows(layer, inputs, sample.to(inputs.device), place.to(inputs.device)))

    visit_inputs(model, layers, batches, look)


@torch.no_grad()
def visit_inputs(
    model: nn.Module,
    layers: Iterable[str],
    batches: Iterable[Batch],
    use: Callable[[str, nn.Module, Tensor], None],
) -> None:
    """Run the model over calibration batches, in eval mode, and hand on what some layers get.

    Args:
        model: left as it is, as by :func:`visit_rows`.
        layers: names of :func:`solvable` layers.
        batches: on the model's device.
        use: called with the layer's name, the layer, and its input, which has a batch dim.
    """

    def hook(name: str) -> Callable[..., None]:
        def look(layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            use(name, layer, _batched(layer, args[0] if args else keywords["input"]))

        return look

    with evaluation(model):
        handles = [
            model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            for name in layers
        ]
        try:
            for batch in batches:
                call(model, batch.inputs)
        finally:
            for handle in handles:
                handle.remove()


def least_squares(gram: Tensor, cross: Tensor, toward: Tensor | None = None) -> Tensor:
    """Minimize ``|X @ w - Y|**2`` given ``gram = X.T @ X`` and ``cross = X.T @ Y``.

    Where X has (nearly) dependent or zero columns a small ridge ``|w - toward|**2`` decides, each
    column measured by its own size; the error then still is at most the error of ``toward``.

    Args:
        gram: ``(columns, columns)``, double precision.
        cross: ``(columns,)`` or ``(columns, outputs)``.
        toward: what the ridge pulls to, in the shape of ``cross``; zero by default.

    Returns:
        w, in the shape of ``cross``.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> least_squares(x.T @ x, x.T @ (x @ torch.tensor([3.0, -1.0]).double())).round(decimals=6)
        tensor([ 3., -1.], dtype=torch.float64)
    """
    start = torch.zeros_like(cross) if toward is None else toward.to(cross)
    target = (cross - gram @ start).reshape(len(gram), -1)
    size = gram.diagonal().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))[:, None]
    step = torch.cholesky_solve(target / size, _factor(gram / (size * size.T))) / size
    return start + step.reshape(cross.shape)


def _factor(unit: Tensor) -> Tensor:
    """Cholesky factor of a gram matrix with ones on its diagonal, with a ridge where it needs one."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(unit)
    if failed or float(factor.diagonal().square().min()) < _SINGULAR:
        factor = torch.linalg.cholesky(unit + _RIDGE * torch.eye(len(unit)).to(unit))
    return factor


def _batched(layer: Any, inputs: Tensor) -> Tensor:
    """The inputs with a batch dim, which layers also take without."""
    dims = 1 if isinstance(layer, nn.Linear) else 1 + len(layer.kernel_size)
    return inputs if inputs.ndim > dims else inputs[None]


def _spread(layer: Any, inputs: Tensor) -> Tensor:
    """The inputs padded as the layer pads them; those of a transposed layer with zeros in between."""
    if isinstance(layer, _Transposed):
        return _stuffed(layer, inputs)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)


def _stuffed(layer: Any, inputs: Tensor) -> Tensor:
    """A transposed convolution is a plain one of stride 1, its kernel flipped, over this."""
    sizes = [(n - 1) * s + 1 for n, s in zip(inputs.shape[2:], layer.stride, strict=True)]
    stuffed = inputs.new_zeros(*inputs.shape[:2], *sizes)
    every: Any = (..., *(slice(None, None, s) for s in layer.stride))
    stuffed[every] = inputs
    margins: list[int] = []
    for dim in reversed(range(len(sizes))):
        margin = layer.dilation[dim] * (layer.kernel_size[dim] - 1) - layer.padding[dim]
        margins += [margin, margin + layer.output_padding[dim]]
    return F.pad(stuffed, margins)


def _stride(layer: Any) -> tuple[int, ...]:
    stride: tuple[int, ...] = layer.stride
    return (1,) * len(stride) if isinstance(layer, _Transposed) else stride


def _offsets(layer: Any) -> list[Tensor]:
    """Where each kernel position lies, a vector a dim."""
    steps = [torch.arange(k) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return [s.flip(0) for s in steps] if isinstance(layer, _Transposed) else steps
